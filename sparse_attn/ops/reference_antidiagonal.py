"""Float32 truth for ``antidiagonal_scores``: the definition, one tile and one antidiagonal at a time."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from ..selection import Tiles
from .reference import gather_sequence


def antidiagonal_scores(query: torch.Tensor, view: PagedView, tiles: Tiles, stride: int, scale: float) -> torch.Tensor:
    """See ``ops.antidiagonal_scores``."""
    size, heads, dim = tiles.size, query.shape[1], query.shape[2]
    blocks = -(-max(view.rows.host_context_lens, default=0) // size)
    scores = torch.zeros(len(tiles), heads, blocks, device=query.device)
    for row, (sequence, start, count, position) in enumerate(tiles.host):
        found, _ = gather_sequence(view, sequence)
        keys = torch.zeros(heads, blocks * size, dim, device=query.device)
        keys[:, : found.shape[1]] = found.float().repeat_interleave(heads // view.num_kv_heads, dim=0)
        begin = position // size * size
        asked = torch.zeros(heads, size, dim, device=query.device)
        asked[:, position - begin : position - begin + count] = query[start : start + count].float().transpose(0, 1)
        logits = torch.zeros(heads, size // stride, blocks * size // stride, device=query.device)
        for t in range(stride):
            logits += asked[:, stride - 1 - t :: stride] @ keys[:, t::stride].transpose(1, 2)
        run = begin // stride + torch.arange(size // stride, device=query.device)
        behind = torch.arange(logits.shape[2], device=query.device) > run[:, None]
        shares = torch.softmax((logits * scale / stride).masked_fill(behind, float("-inf")), dim=-1)
        there = (run >= position // stride) & (run <= (position + count - 1) // stride)
        scores[row] = (shares * there[:, None]).view(heads, size // stride, blocks, -1).sum(dim=(1, 3))
    return scores
