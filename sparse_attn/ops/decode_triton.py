"""Decode: one query per sequence, its keys split over programs and merged by log-sum-exp."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from .common_triton import LOG2E, attend, finish, places
from .launch import PER_STEP, Launch, key_arguments, last_dim_dense, selection_arguments
from .tiling import Tiling, decode_tiling, power_of_two, unit_of

# A few programs for each of the 108..304 multiprocessors of the targets hide each other's latency;
# a split below 256 keys costs more to merge than it gains.
_PROGRAMS, _KEYS_PER_SPLIT, _MOST_SPLITS = 512, 256, 128


@triton.jit(do_not_specialize=["splits", *PER_STEP])
def decode_kernel(
    query,
    out,  # [S, H, splits, D]
    lse,  # [S, H, splits]
    keys,
    values,
    block_tables,
    context_lens,
    indices,  # None: every key in the band
    counts,
    sinks,
    splits,
    scale,
    nearest,
    farthest,
    table_stride,
    indices_stride,
    indices_head_stride,
    counts_stride,
    FOLD: tl.constexpr,
    GROUP: tl.constexpr,
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
    """Program (sequence, head, split)."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_lens + sequence)
    if indices is None:
        start = 0
        if farthest is not None:
            start = tl.maximum(context - farthest, 0) // BLOCK_KEYS * BLOCK_KEYS
        stop = context - nearest
        chosen = None
    else:
        start = 0
        chosen = indices + sequence.to(tl.int64) * indices_stride + head * indices_head_stride
        count = tl.load(counts + sequence * counts_stride + head)
        stop = places(chosen, count, context - nearest, UNIT, BLOCK_KEYS)
    # The splits share what this sequence has, not what the longest has: their number is fixed by
    # shapes, their length by data. Those left without keys store weight zero.
    blocks = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_KEYS)
    span = tl.cdiv(blocks, splits) * BLOCK_KEYS
    start += split * span
    stop = tl.minimum(stop, start + span)

    rows = tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    row_head = head * FOLD + rows
    row_valid = rows < FOLD
    valid = row_valid[:, None] & (dim < HEAD_DIM)[None, :]
    query_at = sequence.to(tl.int64) * QUERY_STRIDE + (row_head * QUERY_HEAD_STRIDE)[:, None] + dim[None, :]
    tile = tl.load(query + query_at, mask=valid, other=0.0)
    kv_head = ((head * FOLD) // GROUP).to(tl.int64)
    acc, peak, total = attend(
        tile,
        tl.full([BLOCK_ROWS], 0, tl.int32) + (context - 1),
        tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32),
        tl.full([BLOCK_ROWS], float("-inf"), tl.float32),
        tl.zeros([BLOCK_ROWS], tl.float32),
        start, stop, context,
        keys + kv_head * HEAD_STRIDE,
        values + kv_head * HEAD_STRIDE,
        block_tables + sequence.to(tl.int64) * table_stride,
        chosen, scale, nearest, farthest,
        PAGE_STRIDE, ROW_STRIDE, SOFTCAP, UNIT, PAGE_SIZE, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS, True,
    )  # fmt: skip
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + row_head, mask=row_valid, other=0.0)
    result, row_lse = finish(acc, peak, total, sink)
    heads = tl.num_programs(1) * FOLD
    part = (sequence.to(tl.int64) * heads + row_head) * splits + split
    tl.store(out + part[:, None] * HEAD_DIM + dim[None, :], result.to(out.dtype.element_ty), mask=valid)
    tl.store(lse + part, row_lse, mask=row_valid)


@triton.jit
def merge_kernel(
    parts,  # [S * H, SPLITS, D] float32
    part_lse,  # [S * H, SPLITS]
    out,  # [S * H, D]
    lse,  # [S * H]
    sinks,
    heads,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Program (row): the weighted mean of its parts, the learned sink counted here and once."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    peak = tl.max(tl.load(part_lse + row * SPLITS + tl.arange(0, SPLITS)), 0) * LOG2E
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    acc = tl.zeros([BLOCK_DIM], tl.float32)
    total = 0.0
    for first in range(0, SPLITS, BLOCK_SPLITS):
        part = row * SPLITS + first + tl.arange(0, BLOCK_SPLITS)
        weight = tl.exp2(tl.load(part_lse + part) * LOG2E - shift)
        # Weight 0 stands for a part without keys: nothing to read.
        wanted = (weight > 0)[:, None] & (dim < HEAD_DIM)[None, :]
        piece = tl.load(parts + part[:, None] * HEAD_DIM + dim[None, :], mask=wanted, other=0.0)
        acc += tl.sum(piece * weight[:, None], 0)
        total += tl.sum(weight, 0)
    one = tl.arange(0, 1)
    sink = None
    if sinks is not None:
        sink = tl.load(sinks + row % heads + one)
    result, row_lse = finish(acc[None, :], peak + tl.zeros([1], tl.float32), total + tl.zeros([1], tl.float32), sink)
    at = row * HEAD_DIM + dim[None, :] + one[:, None]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(dim < HEAD_DIM)[None, :])
    tl.store(lse + row + one, row_lse)


def num_splits(keys: int, programs: int) -> int:
    """Programs that share one row's keys: a power of two, from shapes alone.

    Args:
        keys: Most keys that a row can read; only its power of two counts, so that a graph captured
            for one step serves all steps of its bucket.
        programs: Programs without splitting.
    """
    wanted = power_of_two(-(-_PROGRAMS // programs))
    return max(1, min(wanted, power_of_two(keys) // _KEYS_PER_SPLIT, _MOST_SPLITS))


def plan(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiling: Tiling | None = None,
) -> tuple[Launch, ...]:
    """The launch that attends, and where keys are split the one that merges."""
    sequences, heads, dim = query.shape
    programs = view.num_kv_heads if selection is None else selection.indices.shape[1]
    fold = heads // programs
    readable = max(view.rows.host_context_lens)
    if selection is not None:
        if len(selection.tiles) != sequences:
            raise ValueError(f"decode takes one selection row per sequence, got {len(selection.tiles)}")
        readable = selection.indices.shape[2] * selection.granularity
    elif spec.band.farthest is not None:
        readable = min(readable, spec.band.farthest)
    splits = num_splits(readable, sequences * programs)
    tiling = tiling or decode_tiling(unit_of(query.device), fold, dim, query.dtype, selection is not None)
    arguments = (
        key_arguments(view, spec)
        | selection_arguments(selection)
        | {
            "query": query,
            "out": out,
            "lse": lse,
            "splits": splits,
            "FOLD": fold,
            "GROUP": heads // view.num_kv_heads,
            "QUERY_STRIDE": query.stride(0),
            "QUERY_HEAD_STRIDE": query.stride(1),
            "BLOCK_ROWS": max(tiling.rows, power_of_two(fold)),
            "BLOCK_KEYS": tiling.keys,
        }
    )
    if splits == 1:
        return (Launch(decode_kernel, (sequences, programs, 1), arguments, tiling),)
    parts = torch.empty(sequences, heads, splits, dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(sequences, heads, splits, dtype=torch.float32, device=query.device)
    attending = arguments | {"out": parts, "lse": part_lse, "sinks": None}
    merging = {
        "parts": parts,
        "part_lse": part_lse,
        "out": out,
        "lse": lse,
        "sinks": spec.sinks,
        "heads": heads,
        "SPLITS": splits,
        "HEAD_DIM": dim,
        "BLOCK_DIM": arguments["BLOCK_DIM"],
        "BLOCK_SPLITS": min(splits, 16),
    }
    return (
        Launch(decode_kernel, (sequences, programs, splits), attending, tiling),
        Launch(merge_kernel, (sequences * heads,), merging, Tiling(rows=1, keys=0, num_warps=4, num_stages=1)),
    )


def decode(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.decode``; ``tiling`` overrides the target's own block sizes."""
    query = last_dim_dense(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if query.numel():
        for launch in plan(query, view, selection, spec, out, lse, tiling):
            launch.run()
    return out, lse
