"""Linear layers with quantised weights by the compiled kernels of ``sparse_attn/ops/native``."""

from __future__ import annotations

import sys

import torch
from torch.nn import functional

from foveate.sparse_attn.ops.native import DTYPES, LINEAR_ISAS, Library, LinearCall, library

from .linear_weights import Int8Weight, Weight

# From this many rows of 16 bits on a 4-bit weight is widened once and multiplied by torch: one row costs about a tenth
# of that.
WIDEN_ROWS = 16
# The same for rows of 8 bits, where torch multiplies bfloat16 on tiles: a dot product of bytes for each group of 32
# channels leaves them idle. By the rates of the instructions and of memory, not measured.
TILE_WIDEN_ROWS = 128
NEVER = sys.maxsize


def supports(weight: Weight) -> bool:
    """Were the kernels compiled, is the weight on the CPU, and does the CPU have their instructions?"""
    kernels = library()
    return weight.values.device.type == "cpu" and kernels is not None and kernels.linear_isa is not None


class NativeLinear:
    """``linear_torch.linear`` of one layer, what does not change between calls prepared.

    Args:
        weight: Kept alive.
        bias: float32 ``[N]`` padded to 16, kept alive, or ``None``.
        activation_bits: See ``linear_torch.linear``.
        isa: For tests.

    Attributes:
        call: What is the same in all calls.

    Raises:
        RuntimeError: the kernels were not compiled.
    """

    def __init__(
        self, weight: Weight, bias: torch.Tensor | None, activation_bits: int, *, isa: str | None = None
    ) -> None:
        kernels = library()
        name = isa or (None if kernels is None else kernels.linear_isa)
        if kernels is None or name is None:
            raise RuntimeError("the native CPU kernels were not built")
        self._kernels: Library = kernels
        self._weight, self._bias = weight, bias
        call = LinearCall()
        call.weight = weight.values.data_ptr()
        call.in_channels, call.out_channels = weight.in_channels, weight.out_channels
        call.isa, call.activation_bits = LINEAR_ISAS.index(name), activation_bits
        call.bias = None if bias is None else bias.data_ptr()
        if isinstance(weight, Int8Weight):
            call.weight_bits = 8
            call.scales, call.sums = weight.scales.data_ptr(), weight.sums.data_ptr()
        else:
            call.weight_bits = 4
            call.groups = weight.groups.data_ptr()
            call.as_bytes = activation_bits == 8 and weight.fits_bytes
        self.call = call
        self._widen_rows = dict.fromkeys(DTYPES, NEVER)
        if call.weight_bits == 4 and activation_bits == 16:
            self._widen_rows = dict.fromkeys(DTYPES, WIDEN_ROWS)
        elif call.weight_bits == 4 and name == "amx":
            self._widen_rows[torch.bfloat16] = TILE_WIDEN_ROWS

    @property
    def most_rows(self) -> int | None:
        """As many as the kernels multiply; for more the weight is widened."""
        fewest = min(self._widen_rows.values())
        return None if fewest == NEVER else fewest - 1

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """``x [T, K]`` to ``[T, N]``; where a 4-bit weight is widened, for many rows, these are not rounded but
        multiplied in their type.

        ``residual [T, N]`` is added, and left as it is.

        Raises:
            RuntimeError: no memory is left.
        """
        if residual is not None:
            return self(x).add_(residual)
        dtype = DTYPES.get(x.dtype)
        if dtype is None:
            return self(x.float()).to(x.dtype)
        rows, weight = len(x), self._weight
        if rows >= self._widen_rows[x.dtype]:
            bias = None if self._bias is None else self._bias[: weight.out_channels].to(x.dtype)
            return functional.linear(x, self.widen(x.dtype), bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty((rows, weight.out_channels))
        if not rows:
            return out
        call = LinearCall.from_buffer_copy(self.call)  # its own: other threads may run the layer too
        call.input, call.out = x.data_ptr(), out.data_ptr()
        call.input_stride, call.rows, call.dtype = x.stride(0), rows, dtype
        call.num_threads = torch.get_num_threads()
        if self._kernels.linear(call):
            raise RuntimeError("no memory is left for the input of a linear layer")
        return out

    def widen(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that a 4-bit layer stands for, ``[N, K]`` in ``dtype``."""
        weight = self._weight
        out = torch.empty((weight.out_channels, weight.in_channels), dtype=dtype)
        call = LinearCall.from_buffer_copy(self.call)
        call.out, call.dtype, call.num_threads = out.data_ptr(), DTYPES[dtype], torch.get_num_threads()
        self._kernels.widen(call)
        return out
