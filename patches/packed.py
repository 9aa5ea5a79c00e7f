"""Linear layers in bfloat16 on a CPU, their weights laid out once as oneDNN's kernels read them.

As the checkpoint has them, weights are laid out anew in every call. Packed, one row read them at 22 to 25 GB/s where
``nn.Linear`` read at 15 (a plain ``sum``: 31), and 512 rows ran at 1.8 TFLOP/s instead of 1.6 (two cores with AMX,
layers of 896 x 9,728). What follows a product, an activation or a product with another, costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .linears import decoder_linears

# For how many rows the layout is chosen. One laid out for 512 serves one row as fast as one laid out for that.
ROWS = 512
# What oneDNN calls the activations of gated MLPs: name, and how it is approximated.
ACTIVATIONS: dict[str, tuple[str, str]] = {
    "silu": ("swish", ""),
    "gelu_tanh": ("gelu", "tanh"),
    "gelu": ("gelu", "none"),
}
_PARTS = ("gate_proj", "up_proj", "down_proj")
# Random rows on which a replacement is compared, as many large ones, on which whatever clips values must show, and how
# far a row may be off: bfloat16 rounds by 2^-8.
_ROWS_COMPARED = 4
_LARGE = 2.0**16
_RELATIVE_ERROR = 2**-6

_pack: Callable[..., torch.Tensor] = torch.ops.mkldnn._reorder_linear_weight
_linear: Any = torch.ops.mkldnn._linear_pointwise


class PackedLinear(nn.Module):
    """Stands in for an ``nn.Linear`` in bfloat16, for inference.

    Args:
        linear: Not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = _pack(linear.weight.detach().contiguous(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor, activation: str = "none", algorithm: str = "") -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``, and an activation of it by oneDNN's names."""
        out: torch.Tensor = _linear(x, self.packed, self.bias, activation, [], algorithm)
        return out

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``, multiplied by ``other [..., N]``."""
        out: torch.Tensor = _linear.binary(x, other, self.packed, self.bias, "mul")
        return out

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``, added to ``other [..., N]``."""
        out: torch.Tensor = _linear.binary(x, other, self.packed, self.bias, "add")
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class GatedMLP(nn.Module):
    """``down(act(gate(x)) * up(x))`` in three calls (GLU variants, arXiv:2002.05202).

    Args:
        mlp: Has these three as ``PackedLinear``; they are shared with it.
        activation: A key of ``ACTIVATIONS``.
    """

    def __init__(self, mlp: nn.Module, activation: str) -> None:
        super().__init__()
        self.gate_proj: PackedLinear = mlp.gate_proj  # type: ignore[assignment]
        self.up_proj: PackedLinear = mlp.up_proj  # type: ignore[assignment]
        self.down_proj: PackedLinear = mlp.down_proj  # type: ignore[assignment]
        self._activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., K]``."""
        gate = self.gate_proj(x, *self._activation)
        return self.down_proj(self.up_proj.times(x, gate))  # type: ignore[no-any-return]

    def plus(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., K]``, added to ``other [..., K]``."""
        gate = self.gate_proj(x, *self._activation)
        return self.down_proj.plus(self.up_proj.times(x, gate), other)


def supports(model: PreTrainedModel) -> bool:
    """Is the model one for which packing pays: in bfloat16, on a CPU for which oneDNN has it, be it widened?"""
    on_cpu = model.device.type == "cpu" and model.dtype is torch.bfloat16
    return on_cpu and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def pack(model: PreTrainedModel) -> None:
    """Replaces, in place, the linear layers of every decoder layer and the output layer, and the gated MLPs of them.

    An output layer that shares the embedding's weight gets a copy.
    """
    found = list(decoder_linears(model))
    while found:  # each is let go before the next is made
        parent, name, linear = found.pop()
        setattr(parent, name, PackedLinear(linear))
        del linear
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear:
        model.set_output_embeddings(PackedLinear(head))  # type: ignore[no-untyped-call]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not all(isinstance(getattr(child, part, None), PackedLinear) for part in _PARTS):
                continue
            activation = _activation_of(child)  # of each: what one layer computes another may clip
            if activation is not None:
                setattr(parent, name, GatedMLP(child, activation))


def _activation_of(mlp: nn.Module) -> str | None:
    """The activation with which ``GatedMLP`` computes what ``mlp`` does, found by trying; ``None`` if there is none."""
    gate: PackedLinear = mlp.gate_proj  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS_COMPARED, gate.in_features, generator=generator)
    x = torch.cat([x, _LARGE * x]).bfloat16()
    try:
        expected = mlp(x).float()
    except Exception:  # it takes more than one argument, and is something else
        return None

    def error(name: str) -> float:
        off = (GatedMLP(mlp, name)(x).float() - expected).norm(dim=1)
        return float((off / expected.norm(dim=1).clamp(min=1e-30)).max())

    errors = {name: error(name) for name in ACTIVATIONS}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= _RELATIVE_ERROR else None
