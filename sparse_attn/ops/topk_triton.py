"""``top_units`` on a GPU: a radix select over bits of the scores, then the chosen units in order.

Radix select: Alabi et al., "Fast k-selection algorithms for graphics processing units", ACM JEA 17 (2012).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch
from .tiling import Tiling, power_of_two

# Scores per step of a program, and of these per warp. With twice as many of either, registers spill on one target or
# another.
_MOST_SCORES, _WARP_SCORES = 2048, 256
_SIGN = tl.constexpr(-(2**31))


@triton.jit
def _read(scores, mask, place, end):
    """Scores as unsigned integers that ascend with them, -0 as 0; and which of these are candidates."""
    valid = place < end
    if mask is not None:
        valid &= tl.load(mask + place, mask=valid, other=0) != 0
    bits = tl.load(scores + place, mask=valid, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits == _SIGN, 0, bits)
    # Bits of a float, as an integer, ascend with it if those of a negative one are turned round.
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ _SIGN).to(tl.uint32, bitcast=True), valid


@triton.jit(do_not_specialize=["most", "units", "width", "mask_stride", "mask_kind_stride"])
def top_units_kernel(
    scores,  # [R, K, U] float32
    indices,  # [R, K, width]
    counts,  # [R, K]
    firsts,  # [R], or None: every unit
    ends,
    mask,  # [R or R x K, U] uint8, or None
    limits,  # [R] units to choose, or None: `most`
    most,
    units,
    width,
    mask_stride,
    mask_kind_stride,
    KINDS: tl.constexpr,
    HIGHER: tl.constexpr,  # of equal scores, those with the higher index first
    BLOCK: tl.constexpr,
):
    """Program (row, kind): eight bits per pass fix the least score that is chosen; a fifth pass writes."""
    row = tl.program_id(0).to(tl.int64)
    owner = row // KINDS
    scores += row * units
    if mask is not None:
        mask += owner * mask_stride + row % KINDS * mask_kind_stride
    first, end = 0, units
    if firsts is not None:
        first = tl.maximum(tl.load(firsts + owner).to(tl.int32), 0)
        end = tl.minimum(tl.load(ends + owner).to(tl.int32), units)
    left = most
    if limits is not None:
        left = tl.minimum(tl.maximum(tl.load(limits + owner).to(tl.int32), 0), most)
    digits = tl.arange(0, 256)
    least = tl.full([], 0, tl.uint32)
    equals = 0
    for step in tl.static_range(4):
        found = tl.zeros([256], tl.int32)
        for at in range(first, end, BLOCK):
            key, valid = _read(scores, mask, at + tl.arange(0, BLOCK), end)
            if step > 0:
                valid &= (key >> (32 - 8 * step)) == least
            found += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=valid)
        total = tl.sum(found, 0)
        left = tl.minimum(left, total)
        # Scores whose digit is this one or higher. Where none is wanted the highest digit will do: nothing exceeds it.
        reached = total - tl.cumsum(found, 0) + found
        digit = tl.max(tl.where(reached >= left, digits, 0), 0)
        left -= tl.sum(tl.where(digits > digit, found, 0), 0)
        equals = tl.sum(tl.where(digits == digit, found, 0), 0)
        least = (least << 8) | digit.to(tl.uint32)
    out = indices + row * width
    written, met = 0, 0
    for at in range(first, end, BLOCK):
        place = at + tl.arange(0, BLOCK)
        key, valid = _read(scores, mask, place, end)
        equal = (valid & (key == least)).to(tl.int32)
        rank = met + tl.cumsum(equal, 0) - equal
        if HIGHER:
            rank = equals - 1 - rank
        kept = (valid & (key > least)) | ((equal > 0) & (rank < left))
        number = kept.to(tl.int32)
        tl.store(out + written + tl.cumsum(number, 0) - number, place, mask=kept)
        written += tl.sum(number, 0)
        met += tl.sum(equal, 0)
    for at in range(written, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        tl.store(out + place, -1, mask=place < width)
    tl.store(counts + row, written)


def plan(
    scores: torch.Tensor,
    candidates: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    limits: torch.Tensor | None,
    higher: bool,
    indices: torch.Tensor,
    counts: torch.Tensor,
) -> Launch:
    """The launch that fills ``indices`` and ``counts``."""
    rows, kinds, units = scores.shape
    arguments: dict[str, Any] = {"firsts": None, "ends": None, "mask": None, "mask_stride": 0, "mask_kind_stride": 0}
    if isinstance(candidates, tuple):
        arguments["firsts"], arguments["ends"] = (bound.contiguous() for bound in candidates)
    else:
        mask = (candidates if candidates.dim() == 2 else candidates.expand(scores.shape)).contiguous()
        arguments["mask"] = mask.view(torch.uint8)
        arguments["mask_stride"] = mask.stride(0)
        arguments["mask_kind_stride"] = mask.stride(1) if mask.dim() == 3 else 0
    block = min(_MOST_SCORES, max(_WARP_SCORES, power_of_two(units)))
    arguments |= {
        "scores": scores,
        "indices": indices,
        "counts": counts,
        "limits": None if limits is None else limits.contiguous(),
        "most": indices.shape[2],
        "units": units,
        "width": indices.shape[2],
        "KINDS": kinds,
        "HIGHER": higher,
        "BLOCK": block,
    }
    return Launch(top_units_kernel, (rows * kinds,), arguments, Tiling(1, block, block // _WARP_SCORES, 1))


def top_units(
    scores: torch.Tensor,
    candidates: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    limits: torch.Tensor | None,
    width: int,
    higher: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``topk.top_units``; without ``limits`` each row chooses ``width``, which no row exceeds."""
    rows, kinds, _ = scores.shape
    indices = torch.empty(rows, kinds, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(rows, kinds, dtype=torch.int32, device=scores.device)
    if counts.numel():
        plan(scores.float().contiguous(), candidates, limits, higher, indices, counts).run()
    return indices, counts
