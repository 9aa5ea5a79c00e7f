"""Linear layers that compute in float32 and hold the checkpoint's bfloat16, where the CPU has no products for that.

Nothing is rounded: such a weight says in two bytes what it says in four. A token that is computed alone waits for the
bytes of the weights, so it comes in half the time, and the model takes half the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from foveate.sparse_attn.ops.native import ISAS, NarrowCall, library

from .linears import decoder_linears

# Output channels that lie side by side.
PANEL = 16


@dataclass(eq=False, slots=True)
class NarrowWeight:
    """A bfloat16 weight ``[N, K]`` as the kernel reads it, and the bias of its layer.

    Attributes:
        panels: ``[N / 16, K, 16]`` bfloat16, dense, N padded by zeros.
        bias: float32 ``[N padded to 16]``, or ``None``.
        channels: N.
    """

    panels: torch.Tensor
    bias: torch.Tensor | None
    channels: int

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> NarrowWeight:
        """``weight [N, K]`` and ``bias [N]``, which ``exact`` holds for."""
        padding = -len(weight) % PANEL
        padded = nn.functional.pad(weight.detach().bfloat16(), (0, 0, 0, padding))
        panels = padded.view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()
        return cls(panels, None if bias is None else nn.functional.pad(bias.detach(), (0, padding)), len(weight))

    def dense(self) -> torch.Tensor:
        """``[N, K]`` float32."""
        rows = self.panels.transpose(1, 2).flatten(0, 1)
        return rows[: self.channels].float()


def linear(x: torch.Tensor, weight: NarrowWeight, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The reference of ``NarrowProduct``."""
    bias = None if weight.bias is None else weight.bias[: weight.channels]
    out = nn.functional.linear(x, weight.dense(), bias)
    return out if residual is None else out + residual


class NarrowProduct:
    """``x [M, K]`` float32 times a bfloat16 weight, in float32.

    Args:
        weight: Kept alive.
        isa: For tests.

    Attributes:
        call: What is the same in all calls.
        most_rows: It multiplies any number of rows.

    Raises:
        RuntimeError: the kernels were not compiled.
    """

    most_rows: int | None = None

    def __init__(self, weight: NarrowWeight, *, isa: str | None = None) -> None:
        kernels = library()
        if kernels is None:
            raise RuntimeError("the native CPU kernels were not built")
        self._kernels, self._weight = kernels, weight
        self.call = NarrowCall(
            weight=weight.panels.data_ptr(),
            bias=None if weight.bias is None else weight.bias.data_ptr(),
            out_channels=weight.channels,
            in_channels=weight.panels.shape[1],
            isa=ISAS.index(isa or kernels.isa),
        )

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [M, K]`` to ``[M, N]``, added to ``residual [M, N]``, which is left as it is.

        Raises:
            TypeError: another type or width than the weight's.
        """
        if x.dtype is not torch.float32 or x.shape[1] != self.call.in_channels:
            raise TypeError(f"a product of float32 [M, {self.call.in_channels}], not of {x.dtype} {list(x.shape)}")
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty((len(x), self._weight.channels))
        call = NarrowCall.from_buffer_copy(self.call)  # its own: other threads may run the layer too
        call.input, call.input_stride, call.out = x.data_ptr(), x.stride(0), out.data_ptr()
        if residual is not None:
            if residual.stride(1) != 1:
                residual = residual.contiguous()
            call.residual, call.residual_stride = residual.data_ptr(), residual.stride(0)
        call.rows, call.num_threads = len(x), torch.get_num_threads()
        self._kernels.narrow(call)
        return out


class NarrowLinear(nn.Module):
    """Stands in for an ``nn.Linear`` in float32 whose weight is ``exact``, for inference.

    Args:
        linear: Not kept.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.hold(NarrowWeight.of(linear.weight, linear.bias))

    def hold(self, weight: NarrowWeight) -> None:
        """Takes ``weight`` as its own."""
        # no parameter: the model is one of float32, and what looks for its type asks the parameters
        self.narrow = weight
        self.product = NarrowProduct(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def joinable(parts: Sequence[Any]) -> bool:
    """Can ``joined`` take them?"""
    fitting = all(isinstance(part, NarrowLinear) and part.out_features % PANEL == 0 for part in parts)
    return fitting and len({part.narrow.bias is None for part in parts}) == 1


def joined(parts: Sequence[NarrowLinear]) -> NarrowProduct:
    """Layers of one input as one product; their weights become views of its weight."""
    whole = torch.cat([part.narrow.panels for part in parts])
    counts = [part.out_features // PANEL for part in parts]
    for part, panels in zip(parts, whole.split_with_sizes(counts), strict=True):
        part.hold(NarrowWeight(panels, part.narrow.bias, part.out_features))
    biases = [part.narrow.bias for part in parts if part.narrow.bias is not None]
    return NarrowProduct(NarrowWeight(whole, torch.cat(biases) if biases else None, PANEL * len(whole)))


def exact(weight: torch.Tensor) -> bool:
    """Does bfloat16 hold this float32 weight to the bit?"""
    return weight.dtype is torch.float32 and torch.equal(weight, weight.bfloat16().float())


@torch.inference_mode()
def narrow(model: PreTrainedModel) -> None:
    """Replaces, in place, the float32 linear layers of every decoder layer, and the output layer, that are ``exact``.

    An output layer that shares the embedding's weight gets a copy.
    """
    if library() is None:
        return
    found = list(decoder_linears(model))
    while found:  # each is let go before the next is made
        parent, name, layer = found.pop()
        if exact(layer.weight):
            setattr(parent, name, NarrowLinear(layer))
        del layer
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear and exact(head.weight):
        model.set_output_embeddings(NarrowLinear(head))  # type: ignore[no-untyped-call]
