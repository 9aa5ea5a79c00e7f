"""What attention adds to the residual stream of each layer, seen by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import UnsupportedModel

# Layer, its input [T, E], and what attention adds to it [T, E].
Watcher = Callable[[int, torch.Tensor, torch.Tensor], None]


@contextmanager
def watch_residual(model: torch.nn.Module, see: Watcher) -> Iterator[None]:
    """Calls ``see`` at the end of each decoder layer of every forward pass in the ``with`` block.

    A decoder layer is the module that holds an attention module. What attention adds is its
    output, passed through each module that the layer applies to it before it is added (Gemma and
    OLMo 2 normalise it).

    Args:
        model: Of any family whose attention modules have a ``layer_idx``.
        see: Gets tensors that the model still uses: read only.

    Raises:
        UnsupportedModel: no decoder layer is found.
    """
    handles: list[Any] = []
    try:
        for parent in model.modules():
            for child in parent.children():
                if isinstance(getattr(child, "layer_idx", None), int) and not _holds_attention(child):
                    handles += _watch(parent, child, see)
        if not handles:
            raise UnsupportedModel(f"{type(model).__name__} has no attention modules with a layer_idx")
        yield
    finally:
        for handle in handles:
            handle.remove()


def _holds_attention(module: torch.nn.Module) -> bool:
    """Whether the module only numbers the layer, and attention is inside it."""
    return any(isinstance(getattr(inner, "layer_idx", None), int) for inner in list(module.modules())[1:])


def _watch(layer: torch.nn.Module, attention: torch.nn.Module, see: Watcher) -> Iterator[Any]:
    held: dict[str, torch.Tensor] = {}

    def begin(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        held["residual"] = args[0] if args else kwargs["hidden_states"]

    def attended(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        held["update"] = output[0] if isinstance(output, tuple) else output

    def passed(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and args[0] is held.get("update"):
            held["update"] = output

    def end(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        number: Any = attention.layer_idx
        see(number, held["residual"].flatten(0, -2), held["update"].flatten(0, -2))
        held.clear()

    yield layer.register_forward_pre_hook(begin, with_kwargs=True)
    yield attention.register_forward_hook(attended)
    for module in layer.children():
        if module is not attention:
            yield module.register_forward_hook(passed)
    yield layer.register_forward_hook(end)
