"""Linear layers: plain, packed, narrow, quantised in each kind, and what torch itself offers for quantised weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from foveate.patches.linear_torch import quantize_rows
from foveate.patches.narrow import NarrowLinear
from foveate.patches.packed import PackedLinear
from foveate.patches.quantize import KINDS, QuantizedLinear
from foveate.sparse_attn.ops.native import library

from .cases import Case, Setting, steps_to_walk
from .shapes import Shape


def linear(setting: Setting) -> Iterator[Case]:
    """Each kind of layer with a chunk's rows, in operations, and with one row, in bytes of weights.

    Quantised layers round their input too. Rows named ``torch`` are only the product: rounding the input and scaling
    the output, which ours include, would come on top.
    """
    for name, channels, depth in layers_of(setting.shape):
        weight_bytes = channels * depth * setting.dtype.itemsize
        for rows in (setting.queries, 1):
            copies = 1 if rows > 1 else steps_to_walk(weight_bytes)
            made = candidates(channels, depth, rows, copies, setting)
            calls = {kernel: partial(_each, call, copies) for kernel, (call, _) in made.items()}
            label = f"{name}, {channels} x {depth}, {rows} {'rows' if rows > 1 else 'row'}"
            if rows > 1:
                yield Case(label, calls, 2.0 * rows * channels * depth * copies, "mm", copies)
            else:
                work = {kernel: float(held * copies) for kernel, (_, held) in made.items()}
                yield Case(label, calls, work, "sum", copies)


def _each(call: Callable[[int], object], copies: int) -> None:
    for copy in range(copies):
        call(copy)


def layers_of(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, output and input channels of a decoder layer's products."""
    yield "q, o", shape.heads * shape.head_dim, shape.hidden
    yield "k, v", shape.kv_heads * shape.head_dim, shape.hidden
    yield "gate, up", shape.intermediate, shape.hidden
    yield "down", shape.hidden, shape.intermediate


def candidates(
    channels: int, depth: int, rows: int, copies: int, setting: Setting
) -> dict[str, tuple[Callable[[int], object], int]]:
    """Kernel -> what to call with the number of a copy, and the bytes of one copy's weight."""
    layers = [nn.Linear(depth, channels, bias=False, device=setting.device).to(setting.dtype) for _ in range(copies)]
    x = torch.randn(rows, depth, device=setting.device).to(setting.dtype)
    plain = str(setting.dtype).removeprefix("torch.")
    found: dict[str, tuple[Callable[[int], object], int]] = {}
    found[plain] = (lambda copy: functional.linear(x, layers[copy].weight), channels * depth * setting.dtype.itemsize)
    if setting.device.type != "cpu":
        return found
    if setting.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = [PackedLinear(layer) for layer in layers]
        found["bfloat16, packed"] = (partial(_layer, packed, x), found[plain][1])
    if setting.dtype is torch.float32 and library() is not None:
        narrowed = [NarrowLinear(layer) for layer in layers]
        found["float32, narrow"] = (partial(_layer, narrowed, x), channels * depth * narrowed[0].narrow.panels.itemsize)
    for kind in KINDS:
        made = [QuantizedLinear(layer, kind) for layer in layers]
        found[kind] = (partial(_layer, made, x), made[0].nbytes)
    return found | _torch_kernels(layers, x) if setting.dtype is torch.bfloat16 else found


def _layer(made: Sequence[nn.Module], x: torch.Tensor, copy: int) -> torch.Tensor:
    out: torch.Tensor = made[copy](x)
    return out


def _torch_kernels(layers: list[nn.Linear], x: torch.Tensor) -> dict[str, tuple[Callable[[int], object], int]]:
    channels, depth = layers[0].weight.shape
    found: dict[str, tuple[Callable[[int], object], int]] = {}
    rounded = quantize_rows(x, 8)[0].to(torch.int8)
    eights = [
        functional.normalize(layer.weight.float(), p=torch.inf).mul(127).round().to(torch.int8) for layer in layers
    ]
    found["torch _int_mm"] = (lambda copy: torch._int_mm(rounded, eights[copy].t()), channels * depth)
    scales = torch.ones(channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates these
        packed = [torch.ops.onednn.qlinear_prepack(weight, None) for weight in eights]
    zeros = torch.zeros(channels, dtype=torch.int64)
    found["torch onednn.qlinear"] = (
        lambda copy: torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 0, packed[copy], scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        ),
        channels * depth,
    )
    if len(x) > 1:  # the others take 20 times as long as bfloat16 with 512 rows
        return found
    halves = scales.bfloat16()
    found["torch _weight_int8pack_mm"] = (
        lambda copy: torch.ops.aten._weight_int8pack_mm(x, eights[copy], halves),
        channels * depth,
    )
    fours = torch.randint(0, 16, (channels, depth), dtype=torch.int32)
    nibbles = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(fours, 1) for _ in layers]
    groups = torch.ones(depth // 32, channels, 2, dtype=torch.bfloat16)
    found["torch _weight_int4pack_mm"] = (
        lambda copy: torch.ops.aten._weight_int4pack_mm_for_cpu(x, nibbles[copy], 32, groups),
        channels * depth * 5 // 8,
    )
    return found
