"""Prefill: tiles of queries over all keys or over selected keys, through the block table."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from .common_triton import attend, finish, places
from .launch import PER_STEP, Launch, key_arguments, last_dim_dense, selection_arguments
from .tiling import Tiling, power_of_two, prefill_tiling, unit_of


@triton.jit(do_not_specialize=["blocks", *PER_STEP])
def prefill_kernel(
    query,
    out,  # [T, H, D]
    lse,  # [T, H]
    keys,
    values,
    block_tables,
    context_lens,
    query_offsets,  # dense only, as `indices` and what follows it is for selections only
    indices,
    counts,
    tile_sequence,
    tile_start,
    tile_count,
    tile_position,
    sinks,
    blocks,
    scale,
    nearest,
    farthest,
    table_stride,
    indices_stride,
    indices_head_stride,
    counts_stride,
    FOLD: tl.constexpr,  # query heads of one program, folded into its rows
    GROUP: tl.constexpr,  # query heads per KV head
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Program (owner x block, head): a block of queries of one tile, or of one sequence if dense."""
    owner = tl.program_id(0) // blocks
    # The last block of a causal chunk has the most keys: longest first leaves no long tail.
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(1)
    if indices is None:
        sequence = owner
        owner_start = tl.load(query_offsets + sequence)
        owner_count = tl.load(query_offsets + sequence + 1) - owner_start
        context = tl.load(context_lens + sequence)
        owner_position = context - owner_count
    else:
        sequence = tl.load(tile_sequence + owner)
        owner_start = tl.load(tile_start + owner)
        owner_count = tl.load(tile_count + owner)
        context = tl.load(context_lens + sequence)
        owner_position = tl.load(tile_position + owner)
    BLOCK_QUERIES: tl.constexpr = BLOCK_ROWS // FOLD
    first_query = block * BLOCK_QUERIES
    if first_query >= owner_count:
        return

    rows = tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    local = first_query + rows // FOLD
    row_head = head * FOLD + rows % FOLD
    # Groups that do not divide the block leave a few rows over.
    row_valid = (rows < BLOCK_QUERIES * FOLD) & (local < owner_count)
    valid = row_valid[:, None] & (dim < HEAD_DIM)[None, :]
    token = (owner_start + local).to(tl.int64)
    position = owner_position + local
    query_at = (token * QUERY_STRIDE + row_head * QUERY_HEAD_STRIDE)[:, None] + dim[None, :]
    tile = tl.load(query + query_at, mask=valid, other=0.0)

    kv_head = ((head * FOLD) // GROUP).to(tl.int64)
    keys += kv_head * HEAD_STRIDE
    values += kv_head * HEAD_STRIDE
    table = block_tables + sequence.to(tl.int64) * table_stride
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)

    first_position = owner_position + first_query
    last_position = owner_position + tl.minimum(first_query + BLOCK_QUERIES, owner_count) - 1
    start = 0
    if indices is None:
        stop = last_position - nearest + 1
        if farthest is None:
            # Keys behind every row of the block need no mask; without a window they are most.
            plain = tl.maximum(first_position - nearest + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
            acc, peak, total = attend(
                tile, position, acc, peak, total, 0, plain, context, keys, values, table, None,
                scale, nearest, farthest, PAGE_STRIDE, ROW_STRIDE, SOFTCAP, UNIT, PAGE_SIZE,
                HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, False,
            )  # fmt: skip
            start = plain
        else:
            start = tl.maximum(first_position - farthest + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
        chosen = None
    else:
        chosen = indices + owner.to(tl.int64) * indices_stride + head * indices_head_stride
        count = tl.load(counts + owner * counts_stride + head)
        stop = places(chosen, count, last_position - nearest + 1, UNIT, BLOCK_KEYS)
    acc, peak, total = attend(
        tile, position, acc, peak, total, start, stop, context, keys, values, table, chosen,
        scale, nearest, farthest, PAGE_STRIDE, ROW_STRIDE, SOFTCAP, UNIT, PAGE_SIZE,
        HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, True,
    )  # fmt: skip

    sink = None
    if sinks is not None:
        sink = tl.load(sinks + row_head, mask=row_valid, other=0.0)
    result, row_lse = finish(acc, peak, total, sink)
    out_row = token * (tl.num_programs(1) * FOLD) + row_head
    tl.store(out + out_row[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=valid)
    tl.store(lse + out_row, row_lse, mask=row_valid)


def plan(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiling: Tiling | None = None,
) -> Launch:
    """Grid, arguments and compile options of one prefill."""
    rows, heads = view.rows, query.shape[1]
    programs = view.num_kv_heads if selection is None else selection.indices.shape[1]
    fold = heads // programs
    tiles = selection.tiles if selection is not None else None
    owners = rows.num_sequences if tiles is None else len(tiles)
    longest = max(rows.host_query_lens) if tiles is None else min(max(rows.host_query_lens), tiles.size)
    tiling = tiling or prefill_tiling(unit_of(query.device), longest * fold, view.head_dim, query.dtype)
    block_rows = max(tiling.rows, power_of_two(fold))
    blocks = -(-longest // (block_rows // fold))
    arguments = (
        key_arguments(view, spec)
        | selection_arguments(selection)
        | {
            "query": query,
            "out": out,
            "lse": lse,
            "query_offsets": rows.query_offsets if tiles is None else None,
            "tile_sequence": None if tiles is None else tiles.sequence,
            "tile_start": None if tiles is None else tiles.query_start,
            "tile_count": None if tiles is None else tiles.query_count,
            "tile_position": None if tiles is None else tiles.position,
            "blocks": blocks,
            "FOLD": fold,
            "GROUP": heads // view.num_kv_heads,
            "QUERY_STRIDE": query.stride(0),
            "QUERY_HEAD_STRIDE": query.stride(1),
            "BLOCK_ROWS": block_rows,
            "BLOCK_KEYS": tiling.keys,
        }
    )
    return Launch(prefill_kernel, (owners * blocks, programs), arguments, tiling)


def prefill(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.prefill``; ``tiling`` overrides the target's own block sizes."""
    query = last_dim_dense(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if query.numel():
        plan(query, view, selection, spec, out, lse, tiling).run()
    return out, lse
