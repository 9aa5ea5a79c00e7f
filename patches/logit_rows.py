"""Logits of further rows of a forward pass that was made already."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import UnsupportedModel


class LogitRows:
    """Keeps the hidden states of the last forward pass in the ``with`` block, and makes logits of them.

    The model's own code makes the logits (its soft cap or scale included): while it does, its body
    gives back what it gave before. So rows can be taken a few at a time, and ``[T, vocab]`` never
    stands in memory as a whole. The body is what the head calls: ``base_model``, or (OPT) the decoder inside.

    Raises:
        UnsupportedModel: the model has no body apart from its head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.base_model is model:
            raise UnsupportedModel(f"{type(model).__name__} has no body apart from its head")
        self._model = model
        self._bodies: set[Any] = {model.base_model, model.base_model.get_decoder()}  # type: ignore[operator]
        self._body: Any = None
        self._kept: Any = None

    def __enter__(self) -> LogitRows:
        self._hooks = [body.register_forward_hook(self._keep) for body in self._bodies]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._body = self._kept = None

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, vocab]`` of ``rows``, ``[N]`` int64: places in the row ``[1, T]`` of the pass."""
        body, own = self._body, self._body.__dict__.get("forward")
        body.forward = lambda *args, **kwargs: self._kept
        try:
            logits: torch.Tensor = self._model(use_cache=False, logits_to_keep=rows).logits[0]
        finally:
            if own is None:
                del body.forward
            else:
                body.forward = own
        return logits

    def _keep(self, body: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._body, self._kept = body, output  # the outer one comes last
