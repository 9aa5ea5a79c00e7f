"""Chunks of keys: runs of positions that a scheme scores as one, and for which tiles they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .ops.boundaries import chunk_table, limit_lengths, pick_boundaries

FOREVER = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """C chunks of each of S sequences, all ``[S, C]`` int64; those of length 0 are none.

    A chunk stands for the tiles that begin at ``live_from`` up to ``live_until - 1``. Chunks that
    stand for the same tile do not overlap and ascend.
    """

    start: torch.Tensor
    length: torch.Tensor
    live_from: torch.Tensor
    live_until: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[Chunks]) -> Chunks:
        """The chunks of several tables, one table behind the other."""
        fields = [(part.start, part.length, part.live_from, part.live_until) for part in parts]
        return cls(*(torch.cat(field, 1) for field in zip(*fields, strict=True)))


def grid(
    begins: Sequence[int], ends: Sequence[int], size: int, segment: int | None, device: torch.device, least: int = 0
) -> Chunks:
    """Chunks of ``size`` from ``begins`` to ``ends``, host numbers per sequence, the last of them cut short.

    Each stands for the tiles behind it; with ``segment``, only for those in its own segment of so
    many positions. There are ``least`` columns at least.
    """
    count = max(max(-(-(end - begin) // size) for begin, end in zip(begins, ends, strict=True)), least)
    begin, end = torch.tensor([list(begins), list(ends)]).to(device, non_blocking=True)[..., None]
    start = begin + torch.arange(count, device=device) * size
    length = (end - start).clamp(0, size)
    until = torch.full_like(start, FOREVER) if segment is None else (start // segment + 1) * segment
    return Chunks(start, length, start + length, until)


def single(starts: Sequence[int], ends: Sequence[int], device: torch.device) -> Chunks:
    """One chunk per sequence, from ``starts`` to ``ends``, host numbers; it always stands."""
    start, end = torch.tensor([list(starts), list(ends)]).to(device, non_blocking=True)[..., None]
    return Chunks(start, end - start, torch.zeros_like(start), torch.full_like(start, FOREVER))


@dataclass(frozen=True, slots=True)
class Cut:
    """How gap scores become chunks.

    Attributes:
        block: A segment of n tokens gets ``n // block * per_block`` boundaries at most, the best ones.
        per_block: See ``block``.
        threshold: Only scores above it make a boundary.
        distance: Boundaries of the scores are further apart than this.
        window: Gaps with fewer tokens on either side in their segment make no boundary.
        shortest: Tokens that a chunk has at least, if its segment has them.
        longest: Tokens that a chunk has at most; longer ones are cut into equal parts.
        fallback: Size of the chunks of a segment without any boundary.
    """

    block: int
    per_block: int
    threshold: float
    distance: int
    window: int
    shortest: int
    longest: int
    fallback: int


def from_scores(scores: torch.Tensor, ends: torch.Tensor, cut: Cut, whole: bool) -> Chunks:
    """Chunks by the score of each gap, segment by segment.

    Args:
        scores: ``[S, N, L]`` float32, N segments of L positions; gap ``i`` lies behind position ``i``.
        ends: ``[S]`` integer, where the keys of each sequence end.
        cut: The rules.
        whole: Only finished segments have chunks, and these stand for the tiles behind the segment.
            Otherwise a segment may be cut short by ``ends`` and its chunks stand for all tiles
            behind their first token.

    Returns:
        ``N * ceil(L / shortest)`` chunks per sequence, most of them none.
    """
    sequences, segments, size = scores.shape
    device = scores.device
    first = torch.arange(segments, device=device) * size
    end = (ends[:, None] - first).clamp(0, size)
    if whole:
        end = torch.where(end == size, end, 0)
    end = end.flatten()
    place = torch.arange(size, device=device)
    margin = max(cut.window, cut.shortest)
    possible = (place >= margin - 1) & (place < end[:, None] - margin)
    scores = torch.where(possible, scores.flatten(0, 1), float("-inf"))
    limits = end // cut.block * cut.per_block
    picked = pick_boundaries(scores, limits, cut.threshold, max(cut.distance, cut.shortest - 1))
    begins = torch.nn.functional.pad(picked[:, :-1], (1, 0), value=True)
    begins = torch.where(picked.any(1, keepdim=True), begins, place % cut.fallback == 0)
    start, length = chunk_table(limit_lengths(begins, end, cut.longest), end, -(-size // cut.shortest))
    start = (start.reshape(sequences, segments, -1) + first[:, None]).flatten(1)
    length = length.reshape(sequences, -1)
    live_from = (start // size + 1) * size if whole else start + 1
    return Chunks(start, length, live_from, torch.full_like(start, FOREVER))
