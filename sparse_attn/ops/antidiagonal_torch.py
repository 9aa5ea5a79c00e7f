"""Antidiagonal scores on a CPU, in torch: one matrix product per KV head and slab.

With the queries of a run put side by side in reverse, ``[runs, S * D]``, and the keys of a run as they lie in the
page, ``e`` is their product: 1 / S of the work of all logits.
"""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from ..selection import Tiles

# Scores held at once: 4 MiB, so that the passes over them stay in the cache. One tile may need more.
_SLAB_SCORES = 1 << 20


def antidiagonal_scores(query: torch.Tensor, view: PagedView, tiles: Tiles, stride: int, scale: float) -> torch.Tensor:
    """See ``ops.antidiagonal_scores``.

    Beside the result it holds a float32 copy of one sequence's queries, one of its keys of one KV
    head, and the scores of as many tiles as fit in 4 MiB, one at least: for one tile of a group of
    ``n`` heads, ``4 n * tile size / S * context / S`` bytes.
    """
    size = tiles.size
    blocks = -(-max(view.rows.host_context_lens, default=0) // size)
    scores = torch.zeros(len(tiles), query.shape[1], blocks)
    first = 0
    while first < len(tiles):
        sequence = tiles.host[first][0]
        last = first
        while last < len(tiles) and tiles.host[last][0] == sequence:
            last += 1
        _score_sequence(query, view, tiles, range(first, last), stride, scale, scores)
        first = last
    return scores


def _score_sequence(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    rows: range,
    stride: int,
    scale: float,
    scores: torch.Tensor,
) -> None:
    """Fills ``scores`` of the tiles ``rows``, which are all tiles of one sequence."""
    size, (_, heads, dim), kv_heads = tiles.size, query.shape, view.num_kv_heads
    group, runs = heads // kv_heads, size // stride
    sequence, start, _, position = tiles.host[rows[0]]
    count = view.rows.host_query_lens[sequence]
    begin = position // size * size
    # Queries on the grid of tiles, [H, tiles, runs of a tile, S * D], zeros where there is none.
    grid = torch.zeros(len(rows) * size, heads, dim)
    grid[position - begin : position - begin + count] = query[start : start + count]
    folded = grid.view(-1, stride, heads, dim).flip(1).permute(2, 0, 1, 3).reshape(heads, len(rows), runs, stride * dim)
    run = begin // stride + torch.arange(len(rows) * runs)
    there = (run >= position // stride) & (run <= (position + count - 1) // stride)
    there = there.view(len(rows), runs, 1)
    ends = begin // size + len(rows)  # blocks up to the last tile
    step = max(1, _SLAB_SCORES // (group * runs * ends * runs))
    for kv_head in range(kv_heads):
        keys = _keys(view, sequence, kv_head, ends * size).view(-1, stride * dim)
        part = slice(kv_head * group, (kv_head + 1) * group)
        for first in range(0, len(rows), step):
            last = min(first + step, len(rows))
            seen = (begin // size + last) * runs  # runs of keys up to the slab's last tile
            asked = folded[part, first:last].reshape(-1, stride * dim)
            logits = (asked @ keys[:seen].T).view(group, last - first, runs, seen).mul_(scale / stride)
            # Only the slab's own square has keys behind a query.
            own = (last - first) * runs
            behind = torch.ones(own, own, dtype=torch.bool).triu_(1).view(last - first, runs, own)
            logits[..., seen - own :].masked_fill_(behind, float("-inf"))
            shares = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
            shares = shares.view(group, last - first, runs, -1, runs).sum(-1)
            shares *= there[first:last] / shares.sum(-1, keepdim=True)
            scores[rows[first] : rows[first] + last - first, part, : seen // runs] = shares.sum(2).transpose(0, 1)


def _keys(view: PagedView, sequence: int, kv_head: int, length: int) -> torch.Tensor:
    """``[length, D]`` float32 keys of one head, in order of position, zeros behind the context."""
    context = min(view.rows.host_context_lens[sequence], length)
    used = -(-context // view.page_size)
    table = view.rows.block_tables[sequence, :used].long()
    keys = torch.zeros(length, view.head_dim)
    found = view.pages.key_rows()[table, kv_head].flatten(0, 1)
    keys[:context] = found[:context]
    return keys
