"""Where the time of a forward pass goes: attention, selection, linear layers.

The seam costs nothing when nobody looks: hooks and timed functions are there while a ``with`` block runs, and the
model and this package are as before when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from transformers import AttentionInterface, PreTrainedModel

from foveate.sparse_attn import attend

from .decoder_layer import fused_layers
from .interface import NAME, paged_attention, register

# Writing K and V, reading the selected keys, and booking the reads; choosing the keys; products with weights.
PARTS = ("attention", "selection", "linear")
# The same of what a fused decoder layer is made of: rotation counts to attention, the MLP's activation and the norm
# before it to its products.
FUSED_PARTS = {
    "project": "linear",
    "read": "attention",
    "finish": "linear",
    "keys_values": "linear",
    "write": "attention",
}

P = ParamSpec("P")
R = TypeVar("R")


class PartClock:
    """Seconds by part. While an inner part runs, the outer one's time stands still.

    For one thread, the one that runs the model.

    Attributes:
        seconds: Part -> seconds so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, part: str) -> None:
        """Begins a part inside of those that are open."""
        self._book()
        self._open.append(part)

    def leave(self) -> None:
        """Ends the innermost part."""
        self._book()
        self._open.pop()

    def timed(self, part: str, function: Callable[P, R]) -> Callable[P, R]:
        """``function``, its time booked to ``part``."""

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run

    def _book(self) -> None:
        if self._device.type == "cuda":  # what was launched counts to the part that launched it
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def watch_parts(model: PreTrainedModel) -> Iterator[PartClock]:
    """Times the parts of every forward pass of an attached model in the ``with`` block.

    A linear layer is a module that says its ``in_features`` and ``out_features``, quantised ones and the output layer
    included, or one made of such alone (a fused MLP). A fused decoder layer is timed by its own pieces. Not for two
    models at once: there is one attention function.
    """
    clock = PartClock(model.device)
    choose = attend.segments_of
    handles: list[Any] = []
    fused = list(fused_layers(model))
    whole = [layer.whole for layer in fused]
    inner = {id(module) for layer in fused for module in layer.modules()}
    try:
        for layer in fused:
            layer.whole = None  # one call cannot be told apart
            for piece, part in FUSED_PARTS.items():
                setattr(layer, piece, clock.timed(part, getattr(layer, piece)))
        for module in model.modules():
            if id(module) not in inner and (_is_linear(module) or _is_made_of_linears(module)):
                handles.append(module.register_forward_pre_hook(lambda *_: clock.enter("linear")))
                handles.append(module.register_forward_hook(lambda *_: clock.leave(), always_call=True))
        attend.segments_of = clock.timed("selection", choose)
        AttentionInterface.register(NAME, clock.timed("attention", paged_attention))
        yield clock
    finally:
        attend.segments_of = choose
        register()
        for layer, before in zip(fused, whole, strict=True):
            layer.whole = before
            for piece in FUSED_PARTS:
                setattr(layer, piece, getattr(layer, piece).__wrapped__)
        for handle in handles:
            handle.remove()


def _is_linear(module: torch.nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _is_made_of_linears(module: torch.nn.Module) -> bool:
    """An attention module is made of them too, but computes something else between."""
    children = list(module.children())
    return bool(children) and not hasattr(module, "layer_idx") and all(map(_is_linear, children))
