"""Thresholded decode: keys are scored once, split over programs; values are loaded only where a head keeps a key."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.kv_cache.stats import VALUE_SUM
from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import ScoreThreshold
from .decode_triton import num_splits
from .launch import Launch, last_dim_dense
from .threshold_common_triton import compensated, read_above, shared_arguments, visible_keys
from .tiling import Tiling, decode_tiling, unit_of


@triton.jit(do_not_specialize=["splits", "nearest", "farthest", "sink_tokens", "recent_tokens", "table_stride"])
def thresholded_decode_kernel(
    query,
    theta,  # [S, H]
    parts,  # [S, H, splits, D] float32
    peaks,  # [S, H, splits], likewise totals, drops, counts
    totals,
    drops,
    counts,
    value_parts,  # [S, G, splits, D] sums of the values, or None
    value_sums,  # [P, G, D] float32
    keys,
    values,
    block_tables,
    context_lens,
    splits,
    scale,
    nearest,
    farthest,
    sink_tokens,
    recent_tokens,
    table_stride,
    GROUP: tl.constexpr,
    UNION: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SUMS_STRIDE: tl.constexpr,
    SUMS_HEAD_STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
):
    """Program (sequence, KV head, split)."""
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    start = 0
    if farthest is not None:
        start = tl.maximum(context - farthest, 0) // BLOCK_KEYS * BLOCK_KEYS
    stop = context - nearest
    # The splits share what this sequence has; their ends are those of pages too.
    UNIT: tl.constexpr = BLOCK_KEYS if BLOCK_KEYS > PAGE_SIZE else PAGE_SIZE
    span = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), UNIT), splits) * UNIT
    start += split * span
    stop = tl.minimum(stop, start + span)

    rows = tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + rows
    row_valid = rows < GROUP
    in_dim = dim < HEAD_DIM
    valid = row_valid[:, None] & in_dim[None, :]
    heads = tl.num_programs(1) * GROUP
    row = sequence.to(tl.int64) * heads + head
    query_at = sequence.to(tl.int64) * QUERY_STRIDE + (head * QUERY_HEAD_STRIDE)[:, None] + dim[None, :]
    values += kv_head.to(tl.int64) * HEAD_STRIDE
    table = block_tables + sequence.to(tl.int64) * table_stride
    acc, peak, total, dropped, count = read_above(
        tl.load(query + query_at, mask=valid, other=0.0),
        tl.load(theta + row, mask=row_valid, other=float("inf")),
        row_valid,
        tl.full([BLOCK_ROWS], 0, tl.int32) + (context - 1),
        start, stop, keys + kv_head.to(tl.int64) * HEAD_STRIDE, values, table,
        scale, nearest, farthest, sink_tokens, recent_tokens,
        PAGE_STRIDE, ROW_STRIDE, SOFTCAP, UNION, BLOCK_ROWS, PAGE_SIZE, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS,
    )  # fmt: skip
    part = row * splits + split
    tl.store(parts + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=valid)
    tl.store(peaks + part, peak, mask=row_valid)
    tl.store(totals + part, total, mask=row_valid)
    tl.store(drops + part, dropped, mask=row_valid)
    tl.store(counts + part, count, mask=row_valid)
    if value_parts is not None:
        # Whole pages by their sums; the page of the query, which may hold tokens behind it, value by value.
        summed = tl.zeros([BLOCK_DIM], tl.float32)
        last = tl.maximum(tl.minimum(stop // PAGE_SIZE, context // PAGE_SIZE), start // PAGE_SIZE)
        sums = value_sums + kv_head.to(tl.int64) * SUMS_HEAD_STRIDE
        for first in range(start // PAGE_SIZE, last, BLOCK_PAGES):
            place = first + tl.arange(0, BLOCK_PAGES)
            page = tl.load(table + place, mask=place < last, other=0).to(tl.int64)
            readable = (place < last)[:, None] & in_dim[None, :]
            summed += tl.sum(tl.load(sums + (page * SUMS_STRIDE)[:, None] + dim[None, :], mask=readable, other=0.0), 0)
        offset = tl.arange(0, PAGE_SIZE)
        loose = last * PAGE_SIZE + offset < stop
        page = tl.load(table + last + 0 * offset, mask=loose, other=0).to(tl.int64)
        where = values + (page * PAGE_STRIDE + offset * ROW_STRIDE)[:, None] + dim[None, :]
        summed += tl.sum(tl.load(where, mask=loose[:, None] & in_dim[None, :], other=0.0).to(tl.float32), 0)
        at = (sequence.to(tl.int64) * tl.num_programs(1) + kv_head) * splits + split
        tl.store(value_parts + at * HEAD_DIM + dim, summed, mask=in_dim)


@triton.jit(do_not_specialize=["nearest", "farthest"])
def thresholded_merge_kernel(
    parts,
    peaks,
    totals,
    drops,
    counts,
    value_parts,
    theta,
    expected,
    out,  # [S * H, D]
    lse,  # [S * H]
    kept,  # [S * H] int32
    context_lens,
    sinks,
    heads,
    nearest,
    farthest,
    dropped_scale,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Program (row): the parts brought to one peak, compensated."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    every = row * SPLITS + tl.arange(0, SPLITS)
    peak = tl.max(tl.load(peaks + every), 0)
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    weight = tl.exp2(tl.load(peaks + every) - shift)
    one = tl.arange(0, 1)
    total = tl.sum(tl.load(totals + every) * weight, 0) + tl.zeros([1], tl.float32)
    dropped = tl.sum(tl.load(drops + every) * weight, 0) + tl.zeros([1], tl.float32)
    count = tl.sum(tl.load(counts + every), 0) + tl.zeros([1], tl.int32)
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    summed = tl.zeros([BLOCK_DIM], tl.float32)
    for first in range(0, SPLITS, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        part = row * SPLITS + split
        portion = tl.exp2(tl.load(peaks + part) - shift)
        # A part without keys read holds zeros: nothing to load.
        wanted = (tl.load(counts + part) > 0)[:, None] & in_dim[None, :]
        piece = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=wanted, other=0.0)
        acc += tl.sum(piece * portion[:, None], 0)
        if value_parts is not None:
            at = row // GROUP * SPLITS + split
            summed += tl.sum(tl.load(value_parts + at[:, None] * HEAD_DIM + dim[None, :], mask=in_dim[None, :]), 0)
    context = tl.load(context_lens + row // heads)
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + row % heads + one)
    row_expected = None
    if expected is not None:
        row_expected = tl.load(expected + row + one)
    factor, lost, row_lse = compensated(
        peak + tl.zeros([1], tl.float32), total, dropped, count, tl.load(theta + row + one),
        visible_keys(context - 1, nearest, farthest), row_expected, dropped_scale, sink, MODE,
    )  # fmt: skip
    result = acc[None, :] * factor[:, None]
    if value_parts is not None:
        result += lost[:, None] * (summed / context)[None, :]
    tl.store(out + row * HEAD_DIM + dim[None, :] + one[:, None], result.to(out.dtype.element_ty), mask=in_dim[None, :])
    tl.store(lse + row + one, row_lse)
    tl.store(kept + row + one, count)


def plan(
    query: torch.Tensor,
    view: PagedView,
    threshold: ScoreThreshold,
    spec: AttentionSpec,
    out: torch.Tensor,
    lse: torch.Tensor,
    kept: torch.Tensor,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> tuple[Launch, Launch]:
    """The launch that scores and sums, and the one that merges and compensates."""
    sequences, heads, dim = query.shape
    kv_heads = view.num_kv_heads
    readable = max(view.rows.host_context_lens)
    if spec.band.farthest is not None:
        readable = min(readable, spec.band.farthest)
    splits = splits or num_splits(readable, sequences * kv_heads)
    tiling = tiling or decode_tiling(unit_of(query.device), heads // kv_heads, dim, query.dtype)

    def parts(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=query.device)

    stats: dict[str, torch.Tensor | None] = {
        name: parts(sequences, heads, splits) for name in ("peaks", "totals", "drops")
    }
    stats["counts"] = parts(sequences, heads, splits, dtype=torch.int32)
    stats["parts"] = parts(sequences, heads, splits, dim)
    stats["value_parts"] = parts(sequences, kv_heads, splits, dim) if threshold.value_mean else None
    sums = view.pages.stats[VALUE_SUM] if threshold.value_mean else None
    both = shared_arguments(query, view, threshold, spec)
    merging = {name: both.pop(name) for name in ("expected", "dropped_scale", "sinks", "MODE")} | stats
    scoring = both | stats | {
        "value_sums": sums,
        "splits": splits,
        "SUMS_STRIDE": 0 if sums is None else sums.stride(0),
        "SUMS_HEAD_STRIDE": 0 if sums is None else sums.stride(1),
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_KEYS": tiling.keys,
        "BLOCK_PAGES": 16,
    }  # fmt: skip
    names = ("theta", "context_lens", "nearest", "farthest", "GROUP", "HEAD_DIM", "BLOCK_DIM")
    merging |= {name: both[name] for name in names} | {
        "out": out,
        "lse": lse,
        "kept": kept,
        "heads": heads,
        "SPLITS": splits,
        "BLOCK_SPLITS": min(splits, 16),
    }
    return (
        Launch(thresholded_decode_kernel, (sequences, kv_heads, splits), scoring, tiling),
        Launch(thresholded_merge_kernel, (sequences * heads,), merging, Tiling(1, 0, 4, 1)),
    )


def decode(
    query: torch.Tensor,
    view: PagedView,
    threshold: ScoreThreshold,
    spec: AttentionSpec,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``ops.thresholded``; one query per sequence. The last two override what target and shapes would choose."""
    query = last_dim_dense(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    kept = torch.empty(query.shape[:2], dtype=torch.int32, device=query.device)
    if query.numel():
        for launch in plan(query, view, threshold, spec, out, lse, kept, tiling, splits):
            launch.run()
    return out, lse, kept
