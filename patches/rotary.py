"""The model's rotary embedding, as far as schemes that move positions need it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import UnsupportedModel, UnsupportedRotary
from .families import facts, rope_parameters

_log = logging.getLogger(__name__)

# Kinds whose frequencies do not depend on the length of the sequence.
FIXED_KINDS = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


class ModelRotary:
    """Moves queries that the model has rotated to other positions.

    A rotation by ``a`` followed by one by ``b - a`` is one by ``b``; factors that the model put on
    cos and sin are in the query already and stay. At construction a few random vectors are
    rotated by the model's own code and compared, so an embedding of another kind (interleaved
    pairs, for one) is found here and not in wrong answers.

    Args:
        model: A causal LM.

    Raises:
        UnsupportedRotary: the embedding is of an unknown kind, or its frequencies change with length.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        try:
            known = facts(model.config)
        except UnsupportedModel as error:
            raise UnsupportedRotary(str(error)) from error
        text = model.config.get_text_config()
        kinds = {str(rope.get("rope_type", "default")) for rope in rope_parameters(text)}
        if kinds - FIXED_KINDS:
            raise UnsupportedRotary(f"rotary frequencies of kind {', '.join(sorted(kinds))} change with length")
        rotary = _find(model)
        types: list[str | None] = [None] * known.num_layers
        if not hasattr(rotary, "inv_freq"):
            types = list(getattr(text, "layer_types", None) or types)[: known.num_layers]
        # Read at every call, so that a model moved to another device takes its frequencies along.
        self._rotary = rotary
        self._buffers: tuple[str | None, ...] = tuple(
            (f"{kind}_inv_freq" if kind else "inv_freq") if rotates else None
            for kind, rotates in zip(types, known.rotates, strict=True)
        )
        for layer, name in {name: layer for layer, name in enumerate(self._buffers) if name}.items():
            if not isinstance(getattr(rotary, layer, None), torch.Tensor):
                raise UnsupportedRotary(f"{type(rotary).__name__} has no {layer}")
            self._probe(name, types[name], known.head_dim)

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelRotary | None:
        """``ModelRotary(model)``, or ``None`` where that fails; the reason goes to the log."""
        try:
            return cls(model)
        except UnsupportedRotary as error:
            _log.warning("schemes that move positions are not available for this model: %s", error)
            return None

    def cap(self, query: torch.Tensor, positions: torch.Tensor, cap: int, layer: int) -> torch.Tensor:
        """Moves rotated queries from their positions to ``min(position, cap)``.

        Args:
            query: ``[T, H, D]``, as the model rotated it.
            positions: ``[T]`` int64.
            cap: Last position that a query may stand at.
            layer: Attention layer; a NoPE layer's queries stay as they are.

        Returns:
            ``[T, H, D]`` in query's dtype, computed in float32.
        """
        name = self._buffers[layer]
        if name is None:
            return query
        inv_freq = getattr(self._rotary, name).to(query.device, torch.float32)
        # Both angles are rounded as the model rounds its own; one angle for the difference would not be.
        was = positions[:, None].float() * inv_freq
        now = positions.clamp(max=cap)[:, None].float() * inv_freq
        cos = (was.cos() * now.cos() + was.sin() * now.sin())[:, None]
        sin = (now.sin() * was.cos() - now.cos() * was.sin())[:, None]
        half = inv_freq.shape[0]
        full = query.float()
        first, second, rest = full[..., :half], full[..., half : 2 * half], full[..., 2 * half :]
        moved = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return moved.to(query.dtype)

    def _probe(self, layer: int, kind: str | None, head_dim: int) -> None:
        apply: Any = getattr(sys.modules[type(self._rotary).__module__], "apply_rotary_pos_emb", None)
        if apply is None:
            raise UnsupportedRotary(f"{type(self._rotary).__module__} has no apply_rotary_pos_emb")
        device = getattr(self._rotary, self._buffers[layer] or "").device
        query = torch.randn(1, 2, 5, head_dim, generator=torch.Generator().manual_seed(0)).to(device)
        positions, limit = torch.tensor([0, 3, 19, 50, 1000], device=device), 19

        def rotated(at: torch.Tensor) -> torch.Tensor:
            arguments = (query, at[None]) if kind is None else (query, at[None], kind)
            try:
                return torch.as_tensor(apply(query, query, *self._rotary(*arguments))[0])[0].transpose(0, 1)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                width = 2 * getattr(self._rotary, self._buffers[layer] or "").shape[0]
                if width < head_dim:
                    raise UnsupportedRotary(
                        f"the layers rotate {width} of the {head_dim} channels of a head, which they divide by code of "
                        "their own"
                    ) from error
                raise UnsupportedRotary(
                    f"{type(self._rotary).__name__} is called in an unknown way: {error}"
                ) from error

        ours = self.cap(rotated(positions), positions, limit, layer)
        theirs = rotated(positions.clamp(max=limit))
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-3, rtol=0):
            raise UnsupportedRotary(f"{type(self._rotary).__name__} does not rotate halves by fixed frequencies")


def plain_angles(rotary: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What ``rotary`` computes, without what ``transformers`` wraps it in; itself if it is of another kind.

    Takes ``x``, of whose type and device the result is, and ``position_ids [B, L]``; gives cos and sin ``[B, L, R]``.
    """
    kind, frequencies = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    if not isinstance(kind, str) or kind not in FIXED_KINDS or not isinstance(frequencies, torch.Tensor):
        return rotary  # type: ignore[no-any-return]

    def angles(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = position_ids[..., None].float() * rotary.inv_freq
        both = torch.cat((half, half), dim=-1)
        cos, sin = both.cos(), both.sin()
        if rotary.attention_scaling != 1:
            cos, sin = cos * rotary.attention_scaling, sin * rotary.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    x, positions = frequencies.new_empty(1, 1, 1), torch.tensor([[0, 1, 700, 40_000]], device=frequencies.device)
    try:
        expected = rotary(x, position_ids=positions)
        same = all(torch.equal(*pair) for pair in zip(angles(x, positions), expected, strict=True))
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError):  # it is called in another way
        return rotary  # type: ignore[no-any-return]
    return angles if same else rotary


def _find(model: PreTrainedModel) -> torch.nn.Module:
    decoder: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    found = [
        module
        for module in decoder.modules()
        if any(name == "inv_freq" or name.endswith("_inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]
    if len(found) != 1:
        raise UnsupportedRotary(f"one rotary embedding for all layers expected, found {len(found)}")
    return found[0]
