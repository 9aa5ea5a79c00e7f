"""Prefill on a GPU where each query has keys of its own: queries are gathered per unit of keys (FlashMoBA).

Four launches per slab of queries (arXiv:2511.11571, section 4, "gather and densify"): count the queries that chose each
unit; put them into lists; multiply each list with its unit as dense rows; merge each query's parts by log-sum-exp. The
places in a list depend on the order of atomic additions, the results do not: no row depends on its neighbours.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from .common_triton import LOG2E, attend, finish
from .launch import Launch, key_arguments, last_dim_dense
from .tiling import Tiling, power_of_two, prefill_tiling, unit_of

# Partial results held at once.
_SLAB_BYTES = 128 * 2**20
# Entries of a selection per program of the two kernels that make lists.
_ENTRIES = 1024
_MERGED_PARTS = 16


@triton.jit
def _column(entry, known, indices, sequences, units, KINDS: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr):
    """The list that each entry of a selection belongs to, one per (sequence, KV head, unit); -1 for none."""
    unit = tl.load(indices + entry, mask=known, other=-1)
    sequence = tl.load(sequences + entry // (KINDS * WIDTH), mask=known, other=0).to(tl.int64)
    head = entry // WIDTH % KINDS // (KINDS // KV_HEADS)
    return tl.where(unit >= 0, (sequence * KV_HEADS + head) * units + unit, -1)


@triton.jit(do_not_specialize=["entries", "units"])
def list_count_kernel(
    indices,
    sequences,
    sizes,  # [S * G * U] int32, zero at first
    ranks,  # [entries] int32
    entries,
    units,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the entries of each list, and gives each its place among them."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = entry < entries
    column = _column(entry, known, indices, sequences, units, KINDS, WIDTH, KV_HEADS)
    listed = column >= 0
    rank = tl.atomic_add(sizes + tl.where(listed, column, 0), 1, mask=listed, sem="relaxed")
    tl.store(ranks + entry, rank, mask=listed)


@triton.jit(do_not_specialize=["entries", "units"])
def list_fill_kernel(
    indices,
    sequences,
    starts,  # [S * G * U] int64, where each list begins
    ranks,
    lists,  # [places] int32
    entries,
    units,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes each entry's number to its place."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    known = entry < entries
    column = _column(entry, known, indices, sequences, units, KINDS, WIDTH, KV_HEADS)
    listed = column >= 0
    start = tl.load(starts + tl.where(listed, column, 0), mask=listed, other=0)
    rank = tl.load(ranks + entry, mask=listed, other=0)
    tl.store(lists + start + rank, entry.to(tl.int32), mask=listed)


@triton.jit(do_not_specialize=["units", "columns", "steps", "nearest", "farthest", "table_stride"])
def gathered_kernel(
    query,  # at the slab's first query
    parts,  # [entries, FOLD, D]
    part_lse,  # [entries, FOLD] float32
    keys,
    values,
    block_tables,
    context_lens,
    positions,  # [n] int32, at the slab's first query
    lists,
    ends,  # [S * G * U] int64, programs up to the end of each list
    sizes,
    units,
    columns,  # S * G * U
    steps,  # halvings that find one of them
    scale,
    nearest,
    farthest,
    table_stride,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    FOLD: tl.constexpr,  # query heads of an entry, folded into the rows
    UNIT: tl.constexpr,
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
    """Program: some rows of one list, over its unit of keys."""
    program = tl.program_id(0).to(tl.int64)
    if program >= tl.load(ends + columns - 1):  # the grid has room for lists of any length
        return
    low = columns * 0
    high = columns
    for _ in range(steps):
        middle = (low + high) // 2
        behind = tl.load(ends + middle) <= program
        low = tl.where(behind, middle + 1, low)
        high = tl.where(behind, high, middle)
    BLOCK_ENTRIES: tl.constexpr = BLOCK_ROWS // FOLD
    end = tl.load(ends + low)
    size = tl.load(sizes + low)
    before = (program - (end - (size + BLOCK_ENTRIES - 1) // BLOCK_ENTRIES)) * BLOCK_ENTRIES
    rows = tl.arange(0, BLOCK_ROWS)
    place = rows // FOLD
    listed = (rows < BLOCK_ENTRIES * FOLD) & (before + place < size)
    entry = tl.load(lists + program * BLOCK_ENTRIES + place, mask=listed, other=0)
    local = (entry // (KINDS * WIDTH)).to(tl.int64)
    row_head = entry // WIDTH % KINDS * FOLD + rows % FOLD
    position = tl.load(positions + local, mask=listed, other=0)
    dim = tl.arange(0, BLOCK_DIM)
    valid = listed[:, None] & (dim < HEAD_DIM)[None, :]
    at = local * QUERY_STRIDE + row_head * QUERY_HEAD_STRIDE
    tile = tl.load(query + at[:, None] + dim[None, :], mask=valid, other=0.0)

    unit = low % units
    kv_head = (low // units % KV_HEADS).to(tl.int64)
    sequence = (low // (units * KV_HEADS)).to(tl.int64)
    context = tl.load(context_lens + sequence)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc, peak, total = attend(
        tile, position, acc, peak, total, unit * UNIT, tl.minimum((unit + 1) * UNIT, context), context,
        keys + kv_head * HEAD_STRIDE, values + kv_head * HEAD_STRIDE, block_tables + sequence * table_stride, None,
        scale, nearest, farthest, PAGE_STRIDE, ROW_STRIDE, SOFTCAP, 1, PAGE_SIZE,
        HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, True,
    )  # fmt: skip
    result, lse = finish(acc, peak, total, None)
    part = entry.to(tl.int64) * FOLD + rows % FOLD
    tl.store(parts + part[:, None] * HEAD_DIM + dim[None, :], result.to(parts.dtype.element_ty), mask=valid)
    tl.store(part_lse + part, lse, mask=listed)


@triton.jit
def gathered_merge_kernel(
    parts,
    part_lse,
    indices,  # at the slab's first query; out and lse too
    sinks,
    out,  # [n, H, D]
    lse,  # [n, H] float32
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Program (query, head): attention over the union of its units from attention over each."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = (token * KINDS + head // FOLD) * WIDTH
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for begin in range(0, WIDTH, BLOCK_PARTS):
        place = begin + tl.arange(0, BLOCK_PARTS)
        known = place < WIDTH
        known = known & (tl.load(indices + first + place, mask=known, other=-1) >= 0)
        part = (first + place) * FOLD + head % FOLD
        logits = tl.load(part_lse + part, mask=known, other=float("-inf")) * LOG2E
        higher = tl.maximum(peak, tl.max(logits, 0))
        # A query that has seen nothing yet has peak -inf, and -inf - -inf is NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift)
        decay = tl.exp2(peak - shift)
        rows = tl.load(
            parts + part[:, None] * HEAD_DIM + dim[None, :], mask=known[:, None] & in_dim[None, :], other=0.0
        )
        acc = acc * decay + tl.sum(weights[:, None] * rows.to(tl.float32), 0)
        total = total * decay + tl.sum(weights, 0)
        peak = higher
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head + tl.arange(0, 1))
    result, found = finish(acc[None, :], peak, total, sink)
    row = token * tl.num_programs(1) + head
    tl.store(out + row * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=in_dim[None, :])
    tl.store(lse + row + tl.arange(0, 1), found)


def launches(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection,
    spec: AttentionSpec,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiling: Tiling | None = None,
) -> Iterator[Launch]:
    """Every launch of one prefill; each must have run before the next is asked for."""
    (tokens, heads, dim), (_, kinds, width) = query.shape, selection.indices.shape
    fold, kv_heads = heads // kinds, view.num_kv_heads
    indices, tiles = selection.indices.contiguous(), selection.tiles
    units = -(-max(view.rows.host_context_lens) // selection.granularity)
    columns = view.rows.num_sequences * kv_heads * units
    tiling = tiling or prefill_tiling(unit_of(query.device), 64, dim, query.dtype)
    tiling = replace(tiling, keys=min(tiling.keys, max(16, selection.granularity)))
    block_rows = max(tiling.rows, power_of_two(fold))
    per_program = block_rows // fold
    step = max(1, _SLAB_BYTES // (heads * width * dim * query.element_size()))
    for begin in range(0, tokens, step):
        part = slice(begin, min(begin + step, tokens))
        chosen = indices[part]
        entries = chosen.numel()
        shape = {"KINDS": kinds, "WIDTH": width}
        listing = shape | {
            "indices": chosen,
            "sequences": tiles.sequence[part],
            "entries": entries,
            "units": units,
            "KV_HEADS": kv_heads,
            "BLOCK": _ENTRIES,
        }
        lister = Tiling(1, 1, num_warps=4, num_stages=1)
        grid = (-(-entries // _ENTRIES),)
        sizes = torch.zeros(columns, dtype=torch.int32, device=query.device)
        ranks = torch.empty(entries, dtype=torch.int32, device=query.device)
        yield Launch(list_count_kernel, grid, listing | {"sizes": sizes, "ranks": ranks}, lister)
        programs = (sizes + (per_program - 1)) // per_program
        ends = programs.cumsum(0)
        # No wait for the device: room for lists of any length.
        most = entries // per_program + min(columns, entries)
        lists = torch.empty(most * per_program, dtype=torch.int32, device=query.device)
        starts = (ends - programs) * per_program
        yield Launch(list_fill_kernel, grid, listing | {"starts": starts, "ranks": ranks, "lists": lists}, lister)
        parts = torch.empty(entries, fold, dim, dtype=query.dtype, device=query.device)
        part_lse = torch.empty(entries, fold, dtype=torch.float32, device=query.device)
        found = {"parts": parts, "part_lse": part_lse, "FOLD": fold}
        arguments = key_arguments(view, spec) | shape | found
        sinks = arguments.pop("sinks")
        arguments |= {
            "query": query[part],
            "positions": tiles.position[part],
            "lists": lists,
            "ends": ends,
            "sizes": sizes,
            "units": units,
            "columns": columns,
            "steps": columns.bit_length(),
            "KV_HEADS": kv_heads,
            "UNIT": selection.granularity,
            "QUERY_STRIDE": query.stride(0),
            "QUERY_HEAD_STRIDE": query.stride(1),
            "BLOCK_ROWS": block_rows,
            "BLOCK_KEYS": tiling.keys,
        }
        yield Launch(gathered_kernel, (most,), arguments, tiling)
        merged = {name: arguments[name] for name in ("HEAD_DIM", "BLOCK_DIM")} | shape | found
        merged |= {"indices": chosen, "sinks": sinks, "out": out[part], "lse": lse[part], "BLOCK_PARTS": _MERGED_PARTS}
        yield Launch(gathered_merge_kernel, (chosen.shape[0], heads), merged, Tiling(1, 1, num_warps=1, num_stages=1))


def prefill(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection,
    spec: AttentionSpec,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.prefill``; the selection has a row per query. Beside the result it holds 128 MiB of partial results."""
    query = last_dim_dense(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if query.numel():
        for launch in launches(query, view, selection, spec, out, lse, tiling):
            launch.run()
    return out, lse
