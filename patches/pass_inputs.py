"""What a forward pass is given: which of it are tokens, and what pages cannot serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .cache import PagedGenerateCache
from .errors import UnsupportedCall

# Inputs that change what attention reads in ways that a step does not carry.
_FOREIGN_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "mm_encoder_outputs",
    "encoder_hidden_states",
)


def refuse(given: dict[str, Any], training: bool) -> None:
    """Refuses what pages cannot serve, and takes out what says nothing.

    Args:
        given: Inputs of the pass by name.
        training: Whether the model is in training mode, where some read other things from the same inputs.

    Raises:
        UnsupportedCall: an input changes what attention reads.
    """
    for name in _FOREIGN_INPUTS:
        value = given.get(name)
        # An empty mapping is how generate() hands on that there is nothing.
        if value is not None and not (isinstance(value, Mapping) and not value):
            raise UnsupportedCall(f"an attached model takes text only, got {name}")
    if given.get("output_attentions"):
        raise UnsupportedCall("paged attention never has the whole attention matrix: leave output_attentions out")
    kinds = given.get("token_type_ids")
    if kinds is not None:
        if training or bool(kinds.any()):
            raise UnsupportedCall(
                "token_type_ids change which tokens see each other, and paged attention is causal: leave them out; "
                "in eval mode they may be all 0"
            )
        del given["token_type_ids"]


def real_tokens(mask: Any, cache: PagedGenerateCache, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries are tokens, bool on the host: with all that came before, and of the new ones alone, ``[B, L]``.

    Raises:
        UnsupportedCall: the mask is of another shape, or contradicts what the cache holds.
    """
    batch, past = cache.batch_size, cache.get_seq_length()
    if mask is None:
        if past != max((table.num_tokens for table in cache.tables), default=0) or any(
            table.num_tokens != past for table in cache.tables
        ):
            raise UnsupportedCall("the rows of this cache are padded, so each pass needs the attention_mask")
        real = torch.ones(batch, columns, dtype=torch.bool)
        return real, real
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, past + columns):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedCall(
            f"attention_mask must be [batch, past + new] = {(batch, past + columns)} and mark padding, got {shape}"
        )
    seen = mask.bool().cpu()
    if seen[:, :past].sum(1).tolist() != [table.num_tokens for table in cache.tables]:
        raise UnsupportedCall("attention_mask marks other tokens of the past as padding than before")
    real = seen[:, past:]
    if not real.any():
        raise UnsupportedCall("attention_mask marks every token as padding")
    return seen, real


def check_positions(given: Any, expected: torch.Tensor, real: torch.Tensor, seen: torch.Tensor) -> None:
    """Refuses positions other than those of the tables.

    Args:
        given: ``position_ids`` of the caller; models that also see give several planes, alike for text: ``[N, B, L]``.
        expected: ``[B, L]``, those of the step.
        real: ``[B, L]``, which of them are tokens.
        seen: The same, with all that came before them.

    Raises:
        UnsupportedCall: they differ where there are tokens, or the model would find others by itself.
    """
    if given is None:
        # Then the model itself would count the padding. That alters no distance, unless it stands between tokens.
        runs = seen[:, :1].sum(1) + (seen[:, 1:] & ~seen[:, :-1]).sum(1)
        if bool((runs > 1).any()):
            raise UnsupportedCall(
                "attention_mask marks padding between tokens: pad on the left, or pass position_ids that count the "
                "tokens of each row from 0, padding left out"
            )
        return
    if given.ndim in (2, 3):
        planes = given.to(expected.device).expand(*given.shape[:-2], *expected.shape)
        if bool((planes == expected)[..., real.to(expected.device)].all()):
            return
    if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        raise UnsupportedCall(
            "position_ids do not count the tokens of each row, and padding stands behind tokens: pad on the left "
            '(tokenizer.padding_side = "left"), as generate() needs it'
        )
    raise UnsupportedCall(
        "position_ids must count the tokens of each row from 0, padding left out; "
        "give packed sequences as a padded batch instead"
    )
