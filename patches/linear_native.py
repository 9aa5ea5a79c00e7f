"""Linear layers with quantised weights by the compiled kernels of ``sparse_attn/ops/native``."""

from __future__ import annotations

import torch

from foveate.sparse_attn.ops.native import DTYPES, LINEAR_ISAS, LinearCall, library

from .linear_weights import BLOCK, Int8Weight, Weight

# From this many rows on a 4-bit weight is widened once and multiplied by torch: one row costs about a tenth of that.
WIDEN_ROWS = 16


def supports(weight: Weight) -> bool:
    """Were the kernels compiled, is the weight on the CPU, and does the CPU have their instructions?"""
    kernels = library()
    return weight.values.device.type == "cpu" and kernels is not None and kernels.linear_isa is not None


def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation_bits: int, *, isa: str | None = None
) -> torch.Tensor:
    """See ``linear_torch.linear``; many rows of a 4-bit layer are multiplied in the type of ``x``.

    ``isa`` is for tests.

    Raises:
        RuntimeError: the kernels were not compiled, or have no memory left.
    """
    if x.dtype not in DTYPES:
        return linear(x.float(), weight, bias, activation_bits, isa=isa).to(x.dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    if not isinstance(weight, Int8Weight) and len(x) >= WIDEN_ROWS:
        out = torch.mm(x, widen(weight, x.dtype, isa=isa))
        return out if bias is None else out + bias[: weight.out_channels].to(x.dtype)
    out = torch.empty((len(x), weight.out_channels), dtype=x.dtype)
    if not len(x):
        return out
    call = _call(weight, x.dtype, isa)
    call.input, call.out = x.data_ptr(), out.data_ptr()
    call.bias = None if bias is None else bias.data_ptr()
    call.input_stride, call.rows, call.activation_bits = x.stride(0), len(x), activation_bits
    _run("linear", call)
    return out


def widen(weight: Weight, dtype: torch.dtype, *, isa: str | None = None) -> torch.Tensor:
    """A 4-bit weight in ``dtype``, transposed: ``[K, N]``."""
    columns = -(-weight.out_channels // BLOCK) * BLOCK
    out = torch.empty((weight.in_channels, columns), dtype=dtype)
    call = _call(weight, dtype, isa)
    call.out = out.data_ptr()
    _run("widen", call)
    return out[:, : weight.out_channels]


def _call(weight: Weight, dtype: torch.dtype, isa: str | None) -> LinearCall:
    kernels = library()
    name = isa or (None if kernels is None else kernels.linear_isa)
    if name is None:
        raise RuntimeError("the native CPU kernels were not built")
    call = LinearCall()
    call.weight = weight.values.data_ptr()
    call.in_channels, call.out_channels = weight.in_channels, weight.out_channels
    call.dtype, call.isa, call.num_threads = DTYPES[dtype], LINEAR_ISAS.index(name), torch.get_num_threads()
    if isinstance(weight, Int8Weight):
        call.weight_bits = 8
        call.scales, call.sums = weight.scales.data_ptr(), weight.sums.data_ptr()
    else:
        call.weight_bits = 4
        call.groups = weight.groups.data_ptr()
    return call


def _run(name: str, call: LinearCall) -> None:
    kernels = library()
    if kernels is None:
        raise RuntimeError("the native CPU kernels were not built")
    if getattr(kernels, name)(call):
        raise RuntimeError("no memory is left for the input of a linear layer")
