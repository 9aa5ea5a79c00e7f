"""Greedy one-dimensional non-maximum suppression, a row of scores in the registers of one program."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .boundaries import MOST_SCORES_ON_GPU
from .launch import Launch
from .tiling import Tiling, power_of_two


@triton.jit(do_not_specialize=["length", "distance"])
def pick_kernel(
    scores,  # [B, length] float32
    limits,  # [B] int32
    picked,  # [B, length] int8
    length,
    threshold,
    distance,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    left = tl.load(scores + row * length + place, mask=place < length, other=float("-inf"))
    left = tl.where(left > threshold, left, float("-inf"))
    chosen = tl.zeros([BLOCK], tl.int32)
    for _ in range(tl.load(limits + row)):
        best = tl.max(left, 0)
        # Of equal scores the lower gap; a place beyond all where nothing is left.
        at = tl.min(tl.where((left == best) & (left > float("-inf")), place, 2 * BLOCK), 0)
        chosen = tl.where(place == at, 1, chosen)
        left = tl.where(tl.abs(place - at) <= distance, float("-inf"), left)
    tl.store(picked + row * length + place, chosen.to(tl.int8), mask=place < length)


def plan(scores: torch.Tensor, limits: torch.Tensor, threshold: float, distance: int, picked: torch.Tensor) -> Launch:
    """Grid, arguments and compile options.

    Raises:
        ValueError: a row is longer than ``MOST_SCORES_ON_GPU``.
    """
    rows, length = scores.shape
    if length > MOST_SCORES_ON_GPU:
        raise ValueError(f"{length} scores do not fit a program, which holds {MOST_SCORES_ON_GPU}")
    arguments = {
        "scores": scores.contiguous(),
        # No more rounds than there are picks, as a request may ask for more than 32 bits hold.
        "limits": limits.clamp(max=-(-length // (distance + 1))).int(),
        "picked": picked,
        "length": length,
        "threshold": threshold,
        "distance": distance,
        "BLOCK": power_of_two(length),
    }
    warps = 4 if length <= 1024 else 8
    return Launch(pick_kernel, (rows,), arguments, Tiling(rows=1, keys=length, num_warps=warps, num_stages=1))


def pick_boundaries(scores: torch.Tensor, limits: torch.Tensor, threshold: float, distance: int) -> torch.Tensor:
    """See ``ops.boundaries.pick_boundaries``."""
    picked = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    if picked.numel():
        plan(scores, limits, threshold, distance, picked).run()
    return picked.bool()
