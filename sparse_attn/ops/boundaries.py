"""From a score for every gap between two keys to chunks: suppression, length limits, tables.

Sources: DHSA (arXiv:2510.24606), the authors' ``_select_boundary_candidates`` and
``predict_boundaries``; limits on chunk lengths are ours.

A gap ``i`` lies behind token ``i``: a chunk that ends there is followed by one that begins at ``i + 1``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import max_pool1d, pad

Backend = Literal["reference", "torch", "triton"]

# Longer rows do not fit the registers of a Triton program; they are rare (``segment_tokens=0``).
MOST_SCORES_ON_GPU = 4096


def pick_boundaries(
    scores: torch.Tensor, limits: torch.Tensor, threshold: float, distance: int, *, backend: Backend | None = None
) -> torch.Tensor:
    """Greedy one-dimensional non-maximum suppression: the best gap of each row, then the best far enough from it...

    Args:
        scores: ``[B, L]`` float32, ``-inf`` where no boundary may be; of equal scores the lower gap is better.
        limits: ``[B]`` integer, picks per row at most.
        threshold: Only scores above it are picked.
        distance: Two picks are further apart than this.
        backend: For tests.

    Returns:
        Bool ``[B, L]``.
    """
    short = scores.shape[1] <= MOST_SCORES_ON_GPU
    chosen = backend or ("triton" if scores.is_cuda and short else "torch")
    if chosen == "triton":
        from . import boundaries_triton

        return boundaries_triton.pick_boundaries(scores, limits, threshold, distance)
    if chosen == "torch":
        return _pick_in_rounds(scores, limits, threshold, distance)
    return _pick_one_by_one(scores, limits, threshold, distance)


def _pick_one_by_one(scores: torch.Tensor, limits: torch.Tensor, threshold: float, distance: int) -> torch.Tensor:
    """The definition."""
    picked = torch.zeros(scores.shape, dtype=torch.bool)
    for row, (gaps, limit) in enumerate(zip(scores.tolist(), limits.tolist(), strict=True)):
        chosen: list[int] = []
        for gap in sorted(range(len(gaps)), key=lambda gap: (-gaps[gap], gap)):
            far = all(abs(gap - other) > distance for other in chosen)
            if gaps[gap] > threshold and far and len(chosen) < limit:
                chosen.append(gap)
        picked[row, chosen] = True
    return picked.to(scores.device)


def _pick_in_rounds(scores: torch.Tensor, limits: torch.Tensor, threshold: float, distance: int) -> torch.Tensor:
    """All rows at once. A gap that is the best of its own surroundings is picked whatever happens elsewhere, so all
    of these are picked in one round; few rounds are needed but for scores that ascend for long."""
    length = scores.shape[1]
    # Ranks instead of scores: no two are equal, and they are exact in float32.
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(scores).scatter_(
        1, order, torch.arange(length, 0, -1, dtype=torch.float32, device=scores.device).expand_as(scores)
    )
    left = torch.where(scores > threshold, rank, 0.0)
    picked = torch.zeros_like(left)
    # Each round picks at least one gap of a row; on a GPU it is not asked whether any are left.
    for _ in range(-(-length // (distance + 1))):
        best = (left > 0) & (left == _around(left, distance))
        picked = torch.where(best, left, picked)
        left = left.masked_fill(_around(best.float(), distance) > 0, 0.0)
        if not scores.is_cuda and not bool(left.any()):
            break
    ranked = picked.sort(dim=1, descending=True).values
    least = ranked.gather(1, (limits[:, None].long() - 1).clamp(0, length - 1))
    return (picked > 0) & (picked >= least) & (limits[:, None] > 0)


def _around(values: torch.Tensor, distance: int) -> torch.Tensor:
    """The largest value within ``distance`` of each place; values are not negative."""
    return max_pool1d(values[:, None], 2 * distance + 1, 1, distance)[:, 0]


def global_boundaries(
    scores: torch.Tensor,
    block_tokens: int,
    chunks_per_block: int = 8,
    threshold: float = 1.1,
    distance: int = 8,
    instruction_tokens: int | None = None,
) -> list[int]:
    """Boundaries of a whole prompt, as the authors choose them.

    Args:
        scores: ``[L]`` one score per gap.
        block_tokens: Queries per block; ``L // block_tokens * chunks_per_block`` boundaries are chosen at most.
        chunks_per_block: ``chunk_beta``.
        threshold: ``theta``.
        distance: Window of the suppression.
        instruction_tokens: T; gap ``L - T`` is chosen first and none behind it.

    Returns:
        ``0``, one position behind each chosen gap, ``L``; ascending, without repeats.
    """
    length = len(scores)
    limit = length // block_tokens * chunks_per_block
    scores = scores.float().clone()
    chosen = {0, length}
    if instruction_tokens is not None:
        gap = length - instruction_tokens
        scores[max(gap - distance, 0) :] = float("-inf")
        chosen.add(min(gap + 1, length))
        limit -= 1
    picked = pick_boundaries(scores[None], torch.tensor([limit], device=scores.device), threshold, distance)[0]
    return sorted(chosen | {gap + 1 for gap in torch.nonzero(picked)[:, 0].tolist()})


def limit_lengths(begins: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
    """Cuts chunks that are too long into parts of nearly equal length.

    Args:
        begins: Bool ``[B, L]``, true where a chunk begins; place 0 does.
        ends: ``[B]`` integer, where each row's last chunk ends.
        longest: Tokens that a chunk may have.

    Returns:
        Bool ``[B, L]``; parts of a chunk of n tokens have ``n // k`` or one more, ``k = ceil(n / longest)``.
    """
    place = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
    begun = torch.where(begins, place, 0).cummax(1).values
    beyond = torch.where(begins, place, begins.shape[1]).flip(1).cummin(1).values.flip(1)
    behind = torch.minimum(pad(beyond[:, 1:], (0, 1), value=begins.shape[1]), ends[:, None])
    length = (behind - begun).clamp(min=1)
    parts = -(-length // longest)
    offset = place - begun
    return begins | (offset * parts // length > (offset - 1).clamp(min=0) * parts // length)


def chunk_table(begins: torch.Tensor, ends: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the chunks of each row.

    Args:
        begins: Bool ``[B, L]``, true where a chunk begins.
        ends: ``[B]`` integer, where each row's last chunk ends; 0 for a row without chunks.
        most: Chunks that a row has at most.

    Returns:
        ``(start, length)`` ``[B, most]`` int64, ascending; chunks that are none have length 0.
    """
    place = torch.arange(begins.shape[1], device=begins.device).expand(begins.shape)
    begins = begins & (place < ends[:, None])
    slot = torch.where(begins, begins.cumsum(1) - 1, most + 1)
    start = ends[:, None].long().repeat(1, most + 2).scatter_(1, slot, place)[:, : most + 1]
    return start[:, :-1], start[:, 1:] - start[:, :-1]
