"""Thresholded prefill: as dense, but values of key blocks that no row reads are not loaded."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import ScoreThreshold
from .launch import Launch, last_dim_dense
from .threshold_common_triton import compensated, read_above, shared_arguments, visible_keys
from .tiling import Tiling, power_of_two, thresholded_prefill_tiling, unit_of
from .value_mean import causal_value_mean


@triton.jit(do_not_specialize=["blocks", "nearest", "farthest", "sink_tokens", "recent_tokens", "table_stride"])
def thresholded_prefill_kernel(
    query,
    theta,  # [T, H]
    expected,  # [T, H], or None
    out,  # [T, H, D]
    lost,  # [T, H] probability left out, or None
    lse,  # [T, H]
    kept,  # [T, H] int32
    keys,
    values,
    block_tables,
    context_lens,
    query_offsets,
    sinks,
    blocks,
    scale,
    nearest,
    farthest,
    sink_tokens,
    recent_tokens,
    dropped_scale,
    table_stride,
    GROUP: tl.constexpr,
    FOLD: tl.constexpr,  # GROUP, rounded up to a power of two
    UNION: tl.constexpr,
    MODE: tl.constexpr,
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
    """Program (sequence x block, KV head): a block of queries, each with the heads of one group."""
    sequence = tl.program_id(0) // blocks
    # The last block of a causal chunk has the most keys: longest first leaves no long tail.
    block = blocks - 1 - tl.program_id(0) % blocks
    kv_head = tl.program_id(1)
    first_token = tl.load(query_offsets + sequence)
    chunk = tl.load(query_offsets + sequence + 1) - first_token
    first_position = tl.load(context_lens + sequence) - chunk
    BLOCK_QUERIES: tl.constexpr = BLOCK_ROWS // FOLD
    first_query = block * BLOCK_QUERIES
    if first_query >= chunk:
        return

    rows = tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    local = first_query + rows // FOLD
    head = kv_head * GROUP + rows % FOLD
    row_valid = (rows % FOLD < GROUP) & (local < chunk)
    valid = row_valid[:, None] & (dim < HEAD_DIM)[None, :]
    token = (first_token + local).to(tl.int64)
    position = first_position + local
    heads = tl.num_programs(1) * GROUP
    row = token * heads + head
    row_theta = tl.load(theta + row, mask=row_valid, other=float("inf"))
    query_at = (token * QUERY_STRIDE + head * QUERY_HEAD_STRIDE)[:, None] + dim[None, :]

    start = 0
    if farthest is not None:
        start = tl.maximum(first_position + first_query - farthest + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    stop = first_position + tl.minimum(first_query + BLOCK_QUERIES, chunk) - nearest
    acc, peak, total, dropped, count = read_above(
        tl.load(query + query_at, mask=valid, other=0.0), row_theta, row_valid, position, start, stop,
        keys + kv_head.to(tl.int64) * HEAD_STRIDE, values + kv_head.to(tl.int64) * HEAD_STRIDE,
        block_tables + sequence.to(tl.int64) * table_stride,
        scale, nearest, farthest, sink_tokens, recent_tokens,
        PAGE_STRIDE, ROW_STRIDE, SOFTCAP, UNION, FOLD, PAGE_SIZE, HEAD_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS,
    )  # fmt: skip
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + head, mask=row_valid, other=0.0)
    row_expected = None
    if expected is not None:
        row_expected = tl.load(expected + row, mask=row_valid, other=0.0)
    factor, row_lost, row_lse = compensated(
        peak, total, dropped, count, tl.where(row_valid, row_theta, 0.0),
        visible_keys(position, nearest, farthest), row_expected, dropped_scale, sink, MODE,
    )  # fmt: skip
    result = (acc * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * HEAD_DIM + dim[None, :], result, mask=valid)
    if lost is not None:
        tl.store(lost + row, row_lost, mask=row_valid)
    tl.store(lse + row, row_lse, mask=row_valid)
    tl.store(kept + row, count, mask=row_valid)


def plan(
    query: torch.Tensor,
    view: PagedView,
    threshold: ScoreThreshold,
    spec: AttentionSpec,
    out: torch.Tensor,
    lost: torch.Tensor | None,
    lse: torch.Tensor,
    kept: torch.Tensor,
    tiling: Tiling | None = None,
) -> Launch:
    """Grid, arguments and compile options of one prefill."""
    rows, group = view.rows, query.shape[1] // view.num_kv_heads
    fold = power_of_two(group)
    longest = max(rows.host_query_lens)
    tiling = tiling or thresholded_prefill_tiling(unit_of(query.device), longest * fold, view.head_dim, query.dtype)
    block_rows = max(tiling.rows, fold)
    blocks = -(-longest // (block_rows // fold))
    arguments = shared_arguments(query, view, threshold, spec) | {
        "out": out,
        "lost": lost,
        "lse": lse,
        "kept": kept,
        "query_offsets": rows.query_offsets,
        "blocks": blocks,
        "FOLD": fold,
        "BLOCK_ROWS": block_rows,
        "BLOCK_KEYS": tiling.keys,
    }
    return Launch(thresholded_prefill_kernel, (rows.num_sequences * blocks, view.num_kv_heads), arguments, tiling)


def prefill(
    query: torch.Tensor,
    view: PagedView,
    threshold: ScoreThreshold,
    spec: AttentionSpec,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``ops.thresholded``; ``tiling`` overrides the target's own block sizes."""
    query = last_dim_dense(query)
    rows = query.shape[:2]
    with_mean = threshold.value_mean
    # The mean is added afterwards: a tile of it would take as many registers as the accumulator.
    out = torch.empty(query.shape, dtype=torch.float32 if with_mean else query.dtype, device=query.device)
    lost = torch.empty(rows, dtype=torch.float32, device=query.device) if with_mean else None
    lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    kept = torch.empty(rows, dtype=torch.int32, device=query.device)
    if not query.numel():
        return out.to(query.dtype), lse, kept
    plan(query, view, threshold, spec, out, lost, lse, kept, tiling).run()
    if lost is not None:
        mean = causal_value_mean(view)[:, :, None]
        grouped = (len(query), view.num_kv_heads, -1)
        out.view(*grouped, query.shape[2]).addcmul_(lost.view(*grouped, 1), mean)
    return out.to(query.dtype), lse, kept
