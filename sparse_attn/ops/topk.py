"""From scores or masks to lists of units: ``top_units``, the same ones on every device, and ``units_of``."""

from __future__ import annotations

from typing import Literal

import torch

from . import pick_native

_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1


def top_units(
    scores: torch.Tensor,
    candidates: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    k: int | torch.Tensor,
    *,
    most: int | None = None,
    ties: Literal["lower", "higher"] = "lower",
    backend: Literal["torch", "native", "triton"] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` candidates with the highest scores of each row, as a ``Selection`` wants them.

    ``torch.topk`` takes any of several equal scores. Here score and index make one integer, no two
    of which are equal, so what is chosen depends on nothing else. Takes 16 bytes per score; on a GPU
    nothing but its result.

    Args:
        scores: ``[R, K, U]``, taken as float32.
        candidates: Bool ``[R, U]`` or ``[R, K, U]``, or ``(first, end)`` ``[R]`` as
            ``budget.free_units`` makes them: the units ``first`` to ``end - 1``.
        k: How many to choose, or ``[R]`` of them, one per row.
        most: No row chooses more; bounds the width of the result where ``k`` is a tensor.
        ties: Which of two units with equal scores is chosen first: the one with the lower index,
            or with the higher.
        backend: For tests.

    Returns:
        ``(indices [R, K, M] int32, ascending and padded by -1, counts [R, K] int32)`` with
        ``M = min(k or most, U)``, at least 1. A row with fewer candidates than ``k`` has them all.
    """
    rows, kinds, units = scores.shape
    device = scores.device
    limit = k if isinstance(k, int) else units if most is None else most
    width = min(limit, units)
    if isinstance(candidates, tuple) and backend in (None, "native") and pick_native.supports(scores):
        limits = torch.full((rows,), k) if isinstance(k, int) else k
        return pick_native.top_units(scores, candidates, limits, max(width, 1), ties == "higher")
    if width > 0 and (backend == "triton" or (backend is None and scores.is_cuda)):
        from . import topk_triton

        return topk_triton.top_units(scores, candidates, None if isinstance(k, int) else k, width, ties == "higher")
    index = torch.arange(units, device=device)
    if isinstance(candidates, tuple):
        first, end = (part[:, None] for part in candidates)
        candidates = (index >= first) & (index < end)
    if candidates.dim() == 2:
        candidates = candidates[:, None, :]
    if width <= 0:
        shape = (rows, kinds)
        return (
            torch.full((*shape, 1), -1, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.int32, device=device),
        )
    # Bits of a float, as an integer, ascend with it if those of a negative one are turned round. -0 + 0 is 0.
    bits = (scores.float() + 0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << _INDEX_BITS
    key |= _INDEX_MASK - index if ties == "lower" else index
    key = key.masked_fill_(~candidates, torch.iinfo(torch.int64).min)
    best = torch.topk(key, width, dim=-1).values & _INDEX_MASK
    chosen = (_INDEX_MASK - best if ties == "lower" else best).int()
    asked = k if isinstance(k, int) else k[:, None]
    counts = candidates.sum(-1, dtype=torch.int32).expand(rows, kinds).clamp(max=asked).clamp(0, width)
    big = torch.iinfo(torch.int32).max
    valid = torch.arange(width, device=device) < counts[..., None]
    ordered = torch.where(valid, chosen, big).sort(dim=-1).values
    return torch.where(ordered == big, -1, ordered), counts.int()


def units_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The units set in each row of ``mask`` ``[R, K, U]``, without a wait for the device.

    Returns:
        ``(indices [R, K, M] int32, ascending and padded by -1, counts [R, K] int32)``, with
        ``M = U``, or on a CPU what the longest row needs, at least 1.
    """
    counts = mask.sum(-1, dtype=torch.int32)
    index = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
    big = torch.iinfo(torch.int32).max
    ordered = torch.where(mask, index, big).sort(dim=-1).values
    if mask.device.type == "cpu" and counts.numel():
        ordered = ordered[..., : max(int(counts.max()), 1)]
    return torch.where(ordered == big, -1, ordered), counts
