"""A causal LM's own forward pass around its fused body: the rows that are wanted, and their logits.

What ``transformers`` does there, its decorators and two output objects, took 0.25 ms of the 17 ms of a token
(SmolLM2-135M). Which models can be computed so is found by trying.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from foveate.sparse_attn.protocol import StepState

from .decoder_layer import hooks_of
from .fused_model import FusedModel
from .interface import PackedStep

# Rows on which a model is compared with the original, and those of them that are wanted.
_ROWS_COMPARED, _ROWS_WANTED = 4, (1, 3)


class FusedCausal:
    """Stands in for the ``forward`` of a model whose logits are its output layer's, of the body's last rows.

    Args:
        model: A causal LM whose ``base_model`` has a ``FusedModel`` for its ``forward``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._inner = model, model.base_model
        self._head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._body: FusedModel = self._inner.forward  # type: ignore[assignment]
        self._stock: Callable[..., Any] = type(model).forward.__get__(model)
        self._hooks = hooks_of([self._inner, self._head])
        self.__signature__ = inspect.signature(self._stock)  # by which others tell what it takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own ``forward``."""
        known = self._known(*args, **kwargs)
        if known is None:
            return self._stock(*args, **kwargs)
        ids, positions, step, rows = known
        return CausalLMOutputWithPast(logits=self.logits(self._body.compute(ids, positions, step), rows))

    def _known(
        self,
        input_ids: torch.Tensor | None = None,
        *more: Any,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        foveate_step: PackedStep | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, StepState, torch.Tensor] | None:
        """What is computed here, of a model that is as it was; else ``None``."""
        if more or use_cache is not False or any(given is not None for given in others.values()):
            return None
        if not isinstance(logits_to_keep, torch.Tensor) or logits_to_keep.dim() != 1:
            return None
        head = self._model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is not self._head or self._model.base_model is not self._inner:
            return None
        if self._inner.__dict__.get("forward") is not self._body or any(self._hooks):
            return None
        known = self._body.known(input_ids, position_ids, foveate_step)
        return None if known is None else (*known, logits_to_keep)

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Of ``rows [N]`` of ``hidden [1, T, E]``, ``[1, N, vocab]``."""
        made: torch.Tensor = self._head(hidden[:, rows])
        return made


@torch.inference_mode()
def fuse_causal(model: PreTrainedModel) -> None:
    """Replaces, in place, the ``forward`` of a model with a fused body, if it computes what it seems to."""
    inner: Any = model.base_model
    if not isinstance(inner.__dict__.get("forward"), FusedModel):
        return
    if not isinstance(model.get_output_embeddings(), torch.nn.Module):  # type: ignore[no-untyped-call]
        return
    fused = FusedCausal(model)
    if _computes_the_same(fused, inner):
        model.forward = fused


def _computes_the_same(fused: FusedCausal, inner: Any) -> bool:
    weight = inner.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    # Large, so that a soft cap on the logits shows.
    hidden = 100 * torch.randn(1, _ROWS_COMPARED, weight.shape[1], generator=generator).to(weight.dtype)
    ids, rows = torch.zeros(1, _ROWS_COMPARED, dtype=torch.int64), torch.tensor(_ROWS_WANTED)
    inner.forward = lambda *args, **kwargs: fused._body.output(hidden)
    try:
        expected = fused._stock(input_ids=ids, use_cache=False, logits_to_keep=rows).logits
        return torch.equal(fused.logits(hidden, rows), expected)
    except (ValueError, TypeError, RuntimeError, AttributeError):  # another kind of model
        return False
    finally:
        inner.forward = fused._body
