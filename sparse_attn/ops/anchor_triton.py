"""``anchor_scores`` in two passes over the keys: the normaliser of each row, then the pooled probabilities.

The second pass makes the logits again. Keeping them would take queries x keys, and the product is what a GPU has most
of; in decode a key is read twice, which is what dense attention reads for key and value.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Tiles
from .common_triton import LN2, LOG2E, soft_cap
from .decode_triton import num_splits
from .launch import Launch, key_arguments, last_dim_dense
from .tiling import Tiling, decode_tiling, power_of_two, scores_tiling, unit_of

# Blocks of keys that one program of the second pass goes through, so that its queries are loaded once for all of them.
_KEY_BLOCKS = 8


@triton.jit
def _load_keys(
    keys,
    table,
    place,
    end,
    PAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Keys at the positions ``place``; zeros behind ``end``, where memory may hold NaN."""
    dim = tl.arange(0, BLOCK_DIM)
    known = place < end
    page = tl.load(table + place // PAGE_SIZE, mask=known, other=0)
    row = page.to(tl.int64) * PAGE_STRIDE + (place % PAGE_SIZE) * ROW_STRIDE
    readable = known[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(keys + row[:, None] + dim[None, :], mask=readable, other=0.0)


@triton.jit
def _logits(tile, key, position, place, scale, SOFTCAP: tl.constexpr):
    """Logits in units of log 2, ``-inf`` for keys behind the query."""
    logits = tl.dot(tile, tl.trans(key.to(tile.dtype)), input_precision="ieee") * scale
    if SOFTCAP > 0:
        logits = soft_cap(logits, SOFTCAP)
    return tl.where(place[None, :] <= position[:, None], logits * LOG2E, float("-inf"))


@triton.jit
def _rows(first, count, start, head, FOLD: tl.constexpr, STEP: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """``(token, query head, place within the tile, valid)`` of a block of rows: queries x the heads of a group."""
    BLOCK_QUERIES: tl.constexpr = BLOCK_ROWS // FOLD
    rows = tl.arange(0, BLOCK_ROWS)
    local = first + rows // FOLD
    # Groups that do not divide the block leave a few rows over.
    valid = (rows < BLOCK_QUERIES * FOLD) & (local < count)
    return (start + local * STEP).to(tl.int64), head * FOLD + rows % FOLD, local * STEP, valid


@triton.jit(do_not_specialize=["blocks", "splits", "table_stride"])
def anchor_lse_kernel(
    query,
    lse,  # [T, H, splits]
    keys,
    block_tables,
    tile_sequence,
    tile_start,
    tile_count,
    tile_position,
    blocks,
    splits,
    scale,
    table_stride,
    FOLD: tl.constexpr,  # query heads per KV head, folded into the rows
    STEP: tl.constexpr,  # from one query of a tile to the next
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Program (tile x block of its queries, KV head, split of the keys)."""
    owner = tl.program_id(0) // blocks
    head = tl.program_id(1)
    split = tl.program_id(2)
    BLOCK_QUERIES: tl.constexpr = BLOCK_ROWS // FOLD
    first = tl.program_id(0) % blocks * BLOCK_QUERIES
    count = tl.load(tile_count + owner)
    if first >= count:
        return
    start_position = tl.load(tile_position + owner)
    token, row_head, local, valid = _rows(first, count, tl.load(tile_start + owner), head, FOLD, STEP, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    query_at = (token * QUERY_STRIDE + row_head * QUERY_HEAD_STRIDE)[:, None] + dim[None, :]
    tile = tl.load(query + query_at, mask=valid[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    table = block_tables + tl.load(tile_sequence + owner).to(tl.int64) * table_stride
    keys += head.to(tl.int64) * HEAD_STRIDE
    end = start_position + (tl.minimum(first + BLOCK_QUERIES, count) - 1) * STEP + 1
    span = tl.cdiv(tl.cdiv(end, BLOCK_KEYS), splits) * BLOCK_KEYS
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for at in range(split * span, tl.minimum((split + 1) * span, end), BLOCK_KEYS):
        place = at + tl.arange(0, BLOCK_KEYS)
        key = _load_keys(keys, table, place, end, PAGE_STRIDE, ROW_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_DIM)
        logits = _logits(tile, key, start_position + local, place, scale, SOFTCAP)
        higher = tl.maximum(peak, tl.max(logits, 1))
        # A row that has seen nothing yet has peak -inf, and -inf - -inf is NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(logits - shift[:, None]), 1)
        peak = higher
    seen = total != 0  # as in finish
    natural = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    tl.store(lse + (token * (tl.num_programs(1) * FOLD) + row_head) * splits + split, natural, mask=valid)


@triton.jit
def _load_rows(
    query,
    lse,
    first,
    count,
    start,
    head,
    lse_stride,
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    FOLD: tl.constexpr,
    STEP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """``(queries, their log-sum-exp in units of log 2, place within the tile)`` of a block of rows."""
    token, row_head, local, valid = _rows(first, count, start, head, FOLD, STEP, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    query_at = (token * QUERY_STRIDE + row_head * QUERY_HEAD_STRIDE)[:, None] + dim[None, :]
    rows = tl.load(query + query_at, mask=valid[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    # Rows that are not there are divided by infinity.
    return rows, tl.load(lse + token * lse_stride + row_head, mask=valid, other=float("inf")) * LOG2E, local


@triton.jit(do_not_specialize=["scores_stride", "scores_head_stride", "table_stride"])
def anchor_pool_kernel(
    query,
    lse,  # [T, H]
    scores,  # [R, G, U], zeros
    keys,
    block_tables,
    tile_sequence,
    tile_start,
    tile_count,
    tile_position,
    scale,
    table_stride,
    scores_stride,
    scores_head_stride,
    FOLD: tl.constexpr,
    STEP: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # of rows holds each tile: it is loaded once for all keys of the program
):
    """Program (tile, run of blocks of keys, KV head): all rows of the tile against each key, which is read once."""
    owner = tl.program_id(0)
    first_key = tl.program_id(1) * (KEY_BLOCKS * BLOCK_KEYS)
    head = tl.program_id(2)
    count = tl.load(tile_count + owner)
    start_position = tl.load(tile_position + owner)
    end = start_position + (count - 1) * STEP + 1
    if first_key >= end:
        return
    start = tl.load(tile_start + owner)
    lse_stride = tl.num_programs(2) * FOLD
    table = block_tables + tl.load(tile_sequence + owner).to(tl.int64) * table_stride
    keys += head.to(tl.int64) * HEAD_STRIDE
    scores += owner.to(tl.int64) * scores_stride + head * scores_head_stride
    if ONE_BLOCK:
        rows, row_lse, local = _load_rows(
            query, lse, 0, count, start, head, lse_stride,
            QUERY_STRIDE, QUERY_HEAD_STRIDE, FOLD, STEP, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
        )  # fmt: skip
    for at in range(first_key, tl.minimum(first_key + KEY_BLOCKS * BLOCK_KEYS, end), BLOCK_KEYS):
        place = at + tl.arange(0, BLOCK_KEYS)
        key = _load_keys(keys, table, place, end, PAGE_STRIDE, ROW_STRIDE, PAGE_SIZE, HEAD_DIM, BLOCK_DIM)
        if ONE_BLOCK:
            logits = _logits(rows, key, start_position + local, place, scale, SOFTCAP)
            pooled = tl.sum(tl.exp2(logits - row_lse[:, None]), 0)
        else:
            pooled = tl.zeros([BLOCK_KEYS], tl.float32)
            for first in range(0, count, BLOCK_ROWS // FOLD):
                some, some_lse, near = _load_rows(
                    query, lse, first, count, start, head, lse_stride,
                    QUERY_STRIDE, QUERY_HEAD_STRIDE, FOLD, STEP, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS,
                )  # fmt: skip
                logits = _logits(some, key, start_position + near, place, scale, SOFTCAP)
                pooled += tl.sum(tl.exp2(logits - some_lse[:, None]), 0)
        tl.store(scores + place, pooled, mask=place < end)


def plan(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    spec: AttentionSpec,
    rows: range,
    lse_parts: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
    tiling: Tiling | None = None,
) -> tuple[Launch, Launch]:
    """The launches of both passes over the tiles ``rows``; between them ``lse_parts`` becomes ``lse``."""
    heads, kv_heads = query.shape[1], view.num_kv_heads
    fold, part = heads // kv_heads, slice(rows.start, rows.stop)
    longest = max(tiles.host[row][2] for row in rows)
    unit = unit_of(query.device)
    if tiling is None and tiles.size > 1:
        tiling = scores_tiling(unit, longest * fold, view.head_dim, query.dtype)
    tiling = tiling or decode_tiling(unit, fold, view.head_dim, query.dtype)
    block_rows = max(tiling.rows, power_of_two(fold))
    blocks, splits = -(-longest // (block_rows // fold)), lse_parts.shape[2]
    known = key_arguments(view, spec)
    shared = {
        name: known[name]
        for name in (
            "keys", "block_tables", "scale", "table_stride", "PAGE_STRIDE", "HEAD_STRIDE", "ROW_STRIDE", "SOFTCAP",
            "PAGE_SIZE", "HEAD_DIM", "BLOCK_DIM",
        )
    } | {
        "query": query,
        "tile_sequence": tiles.sequence[part],
        "tile_start": tiles.query_start[part],
        "tile_count": tiles.query_count[part],
        "tile_position": tiles.position[part],
        "FOLD": fold,
        "STEP": tiles.step,
        "QUERY_STRIDE": query.stride(0),
        "QUERY_HEAD_STRIDE": query.stride(1),
        "BLOCK_ROWS": block_rows,
        "BLOCK_KEYS": tiling.keys,
    }  # fmt: skip
    first = shared | {"lse": lse_parts, "blocks": blocks, "splits": splits}
    second = shared | {
        "lse": lse,
        "scores": scores,
        "scores_stride": scores.stride(0),
        "scores_head_stride": scores.stride(1),
        "KEY_BLOCKS": _KEY_BLOCKS,
        "ONE_BLOCK": blocks == 1,
    }
    runs = -(-scores.shape[2] // (tiling.keys * _KEY_BLOCKS))
    pooling = replace(tiling, num_stages=min(tiling.num_stages, 2 if blocks > 1 else 3))
    return (
        Launch(anchor_lse_kernel, (len(rows) * blocks, kv_heads, splits), first, tiling),
        Launch(anchor_pool_kernel, (len(rows), runs, kv_heads), second, pooling),
    )


def scores(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    spec: AttentionSpec,
    rows: range,
    pool_all: bool,
    tiling: Tiling | None = None,
) -> torch.Tensor:
    """See ``ops.anchor_scores``; ``tiling`` overrides the target's own block sizes."""
    query = last_dim_dense(query)
    device = query.device
    longest = max(tiles.ends[rows.start : rows.stop])
    # Decode has one block of rows per sequence and head; splits keep the processors busy.
    splits = num_splits(longest, len(rows) * view.num_kv_heads) if tiles.size == 1 else 1
    lse_parts = torch.empty(*query.shape[:2], splits, dtype=torch.float32, device=device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=device)
    pooled = torch.zeros(len(rows), view.num_kv_heads, longest, dtype=torch.float32, device=device)
    first, second = plan(query, view, tiles, spec, rows, lse_parts, lse, pooled, tiling)
    first.run()
    torch.logsumexp(lse_parts, dim=2, out=lse)
    if spec.sinks is not None:
        torch.logaddexp(lse, spec.sinks.float().expand_as(lse), out=lse)
    second.run()
    return pooled.sum(1, keepdim=True) if pool_all else pooled
