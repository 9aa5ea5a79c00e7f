"""Antidiagonal scores: each program sums S products of strided queries and keys, and keeps a log-sum-exp per block."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from ..selection import Tiles
from .common_triton import LN2, LOG2E
from .launch import Launch, last_dim_dense
from .tiling import antidiagonal_tiling, power_of_two, unit_of

# Log-sum-exps held at once, float32: 64 MiB. One tile may need more.
_SLAB_SCORES = 1 << 24
# Steps over keys that one program takes, so that its queries are read from the cache again.
_STEPS = 8


@triton.jit(do_not_specialize=["first_tile", "blocks", "table_stride"])
def antidiagonal_kernel(
    query,
    parts,  # [tiles of the slab, H, RUNS, blocks] float32, natural log
    keys,
    block_tables,
    context_lens,
    tile_sequence,
    tile_start,
    tile_count,
    tile_position,
    first_tile,
    blocks,
    scale,
    table_stride,
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDE: tl.constexpr,  # tokens per run
    RUNS: tl.constexpr,  # runs per tile and per block
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,  # runs of keys per step, a multiple of RUNS
    STEPS: tl.constexpr,
):
    """Program (tile, KV head x rows, keys); a row is one run of queries of one head of the group."""
    local_tile = tl.program_id(0).to(tl.int64)
    tile = first_tile + local_tile
    ROW_BLOCKS: tl.constexpr = (RUNS * GROUP + BLOCK_ROWS - 1) // BLOCK_ROWS
    kv_head = tl.program_id(1) // ROW_BLOCKS
    sequence = tl.load(tile_sequence + tile).to(tl.int64)
    start = tl.load(tile_start + tile).to(tl.int64)
    count = tl.load(tile_count + tile)
    position = tl.load(tile_position + tile)
    context = tl.load(context_lens + sequence)
    row = tl.program_id(1) % ROW_BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    run = row // GROUP
    head = kv_head * GROUP + row % GROUP
    first_run = position // (STRIDE * RUNS) * RUNS
    # The first query of a run stands where its last key does: both run from there, one down, one up.
    asked = (first_run + run) * STRIDE + STRIDE - 1
    in_tile = row < RUNS * GROUP
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    keys += kv_head.to(tl.int64) * HEAD_STRIDE
    table = block_tables + sequence * table_stride
    out = ((local_tile * (tl.num_programs(1) // ROW_BLOCKS * GROUP) + head) * RUNS + run) * blocks
    BLOCKS: tl.constexpr = BLOCK_RUNS // RUNS

    for step in range(STEPS):
        first_key_run = (tl.program_id(2) * STEPS + step) * BLOCK_RUNS
        # Blocks behind the tile keep the -inf that they were made with.
        if first_key_run < first_run + RUNS:
            key_run = first_key_run + tl.arange(0, BLOCK_RUNS)
            logits = tl.zeros([BLOCK_ROWS, BLOCK_RUNS], tl.float32)
            for t in range(STRIDE):
                query_position = asked - t
                there = in_tile & (query_position >= position) & (query_position < position + count)
                query_at = (start + query_position - position) * QUERY_STRIDE + head * QUERY_HEAD_STRIDE
                rows = tl.load(query + query_at[:, None] + dim, mask=there[:, None] & in_dim[None, :], other=0.0)
                key_position = key_run * STRIDE + t
                known = key_position < context
                page = tl.load(table + key_position // PAGE_SIZE, mask=known, other=0).to(tl.int64)
                key_at = page * PAGE_STRIDE + key_position % PAGE_SIZE * ROW_STRIDE
                key = tl.load(keys + key_at[:, None] + dim, mask=known[:, None] & in_dim[None, :], other=0.0)
                logits = tl.dot(rows, tl.trans(key.to(rows.dtype)), logits, input_precision="ieee")
            logits = tl.where(key_run[None, :] <= (first_run + run)[:, None], logits * (scale * LOG2E), float("-inf"))
            logits = tl.reshape(logits, [BLOCK_ROWS, BLOCKS, RUNS])
            peak = tl.max(logits, 2)
            shift = tl.where(peak == float("-inf"), 0.0, peak)
            total = tl.sum(tl.exp2(logits - shift[:, :, None]), 2)
            part = tl.where(total > 0, (shift + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, float("-inf"))
            # A run without a query has no attention to share out.
            held = in_tile & (asked >= position) & (asked - STRIDE + 1 < position + count)
            part = tl.where(held[:, None], part, float("-inf"))
            block = first_key_run // RUNS + tl.arange(0, BLOCKS)
            tl.store(parts + out[:, None] + block[None, :], part, mask=in_tile[:, None] & (block < blocks)[None, :])


def plan(
    query: torch.Tensor, view: PagedView, tiles: Tiles, stride: int, scale: float, first: int, parts: torch.Tensor
) -> Launch:
    """One launch over the tiles from ``first`` on, for which ``parts`` ``[tiles, H, runs, blocks]`` has room.

    Raises:
        ValueError: channels are not next to each other.
    """
    keys = view.pages.keys
    if keys.stride(3) != 1 or view.rows.block_tables.stride(1) != 1:
        raise ValueError("K pages need stride 1 between channels, and the table between entries")
    count, heads, runs, blocks = parts.shape
    group, dim = heads // view.num_kv_heads, query.shape[2]
    tiling = antidiagonal_tiling(unit_of(query.device), runs * group, runs, dim, query.dtype)
    arguments = {
        "query": query,
        "parts": parts,
        "keys": keys,
        "block_tables": view.rows.block_tables,
        "context_lens": view.rows.context_lens,
        "tile_sequence": tiles.sequence,
        "tile_start": tiles.query_start,
        "tile_count": tiles.query_count,
        "tile_position": tiles.position,
        "first_tile": first,
        "blocks": blocks,
        "scale": scale / stride,
        "table_stride": view.rows.block_tables.stride(0),
        "QUERY_STRIDE": query.stride(0),
        "QUERY_HEAD_STRIDE": query.stride(1),
        "PAGE_STRIDE": keys.stride(0),
        "HEAD_STRIDE": keys.stride(1),
        "ROW_STRIDE": keys.stride(2),
        "GROUP": group,
        "STRIDE": stride,
        "RUNS": runs,
        "PAGE_SIZE": view.page_size,
        "HEAD_DIM": dim,
        "BLOCK_DIM": max(16, power_of_two(dim)),
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_RUNS": tiling.keys,
        "STEPS": _STEPS,
    }
    row_blocks = -(-runs * group // tiling.rows)
    key_programs = -(-blocks * runs // (tiling.keys * _STEPS))
    return Launch(antidiagonal_kernel, (count, view.num_kv_heads * row_blocks, key_programs), arguments, tiling)


def antidiagonal_scores(query: torch.Tensor, view: PagedView, tiles: Tiles, stride: int, scale: float) -> torch.Tensor:
    """See ``ops.antidiagonal_scores``.

    Beside the result it holds a log-sum-exp per head, run and block for as many tiles as fit in 64 MiB.
    """
    query = last_dim_dense(query)
    heads, runs = query.shape[1], tiles.size // stride
    blocks = -(-max(view.rows.host_context_lens, default=0) // tiles.size)
    scores = torch.empty(len(tiles), heads, blocks, dtype=torch.float32, device=query.device)
    step = max(1, _SLAB_SCORES // max(1, heads * runs * blocks))
    for first in range(0, len(tiles), step):
        shape = (min(step, len(tiles) - first), heads, runs, blocks)
        parts = torch.full(shape, float("-inf"), dtype=torch.float32, device=query.device)
        plan(query, view, tiles, stride, scale, first, parts).run()
        # A run without queries is -inf throughout, and softmax over nothing is NaN.
        scores[first : first + step] = torch.softmax(parts, dim=3).nan_to_num_(0.0).sum(2)
    return scores
