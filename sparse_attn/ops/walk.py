"""``walk_chunks``: a token budget spent chunk by chunk, best chunk first (DHSA, arXiv:2510.24606)."""

from __future__ import annotations

from typing import Literal

import torch

from . import pick_native


def walk_chunks(
    scores: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    room: torch.Tensor,
    width: int,
    *,
    backend: Literal["torch", "native"] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the chunks in order of score, and of each the first tokens, until the room is used.

    All tokens of a chunk have its score, so this is the token-level top-k of the upsampled scores
    where equal scores go to the lower token first, at the cost of sorting C scores. At most one
    chunk of a row is taken in part.

    Args:
        scores: ``[R, K, C]`` float32; of equal scores the lower chunk comes first.
        start: ``[R, C]`` integer, first token that may be taken of each chunk; ascending over the
            chunks that have any.
        length: ``[R, C]`` integer, tokens that may be taken; 0 where a row does not see the chunk.
            What is read anyway (sinks, window, own tile) is left out by ``start`` and ``length``.
        room: ``[R]`` integer, tokens to take, at most ``width``.
        width: Bound of ``room`` on the host.
        backend: For tests.

    Returns:
        ``(indices [R, K, width] int32, ascending and padded by -1, counts [R, K] int32)``.
    """
    rows, kinds, chunks = scores.shape
    if chunks == 0 or width == 0:
        shape = (rows, kinds)
        return (
            torch.full((*shape, 1), -1, dtype=torch.int32, device=scores.device),
            torch.zeros(shape, dtype=torch.int32, device=scores.device),
        )
    if backend != "torch" and pick_native.supports(scores):
        return pick_native.walk_chunks(scores, start, length, room, width)
    spread = length.long()[:, None].expand(-1, kinds, -1)
    scores = scores.masked_fill(spread == 0, float("-inf"))
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    offered = spread.gather(-1, order)
    before = torch.cumsum(offered, -1) - offered
    taken = torch.minimum((room.long()[:, None, None] - before).clamp(min=0), offered)
    # Back in order of position: the place of each token in the result follows from the counts before it.
    taken = torch.zeros_like(taken).scatter_(-1, order, taken)
    ends = torch.cumsum(taken, -1)
    place = torch.arange(width, device=scores.device).expand(rows, kinds, -1).contiguous()
    chunk = torch.searchsorted(ends, place, right=True).clamp(max=chunks - 1)
    first = (start.long()[:, None] - (ends - taken)).gather(-1, chunk)
    counts = ends[..., -1]
    return torch.where(place < counts[..., None], first + place, -1).int(), counts.int()
