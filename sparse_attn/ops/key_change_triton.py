"""How much keys change at each gap, read through the block table."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from .launch import Launch
from .reference_key_change import EPSILON
from .tiling import Tiling, power_of_two


@triton.jit
def _window_sum(
    keys,
    table,
    first,  # [BLOCK_GAPS] first position of each window
    valid,  # [BLOCK_GAPS]
    dim,
    in_dim,
    WINDOW: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    held = tl.zeros([first.shape[0], dim.shape[0]], tl.float32)
    for offset in range(WINDOW):
        position = first + offset
        page = tl.load(table + position // PAGE_SIZE, mask=valid, other=0)
        row = page.to(tl.int64) * PAGE_STRIDE + (position % PAGE_SIZE) * ROW_STRIDE
        held += tl.load(keys + row[:, None] + dim[None, :], mask=valid[:, None] & in_dim[None, :], other=0.0).to(
            tl.float32
        )
    return held


@triton.jit(do_not_specialize=["segment", "length", "table_stride"])
def key_change_kernel(
    keys,
    block_tables,
    context_lens,
    scores,  # [S, length] float32
    segment,
    length,
    num_heads,
    table_stride,
    WINDOW: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_GAPS: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Program (run of gaps, sequence). The rows of neighbouring windows come from the cache."""
    sequence = tl.program_id(1)
    gap = tl.program_id(0) * BLOCK_GAPS + tl.arange(0, BLOCK_GAPS)
    context = tl.load(context_lens + sequence)
    inside = gap % segment
    valid = (inside >= WINDOW - 1) & (inside < segment - WINDOW) & (gap < length) & (gap + WINDOW < context)
    table = block_tables + sequence.to(tl.int64) * table_stride
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    across = tl.zeros([BLOCK_GAPS], tl.float32)
    before = tl.zeros([BLOCK_GAPS], tl.float32)
    behind = tl.zeros([BLOCK_GAPS], tl.float32)
    for head in range(num_heads):
        at_head = keys + head * HEAD_STRIDE
        left = (
            _window_sum(
                at_head, table, gap - WINDOW + 1, valid, dim, in_dim, WINDOW, PAGE_STRIDE, ROW_STRIDE, PAGE_SIZE
            )
            / WINDOW
        )
        right = (
            _window_sum(at_head, table, gap + 1, valid, dim, in_dim, WINDOW, PAGE_STRIDE, ROW_STRIDE, PAGE_SIZE)
            / WINDOW
        )
        across += tl.sum(left * right, 1)
        before += tl.sum(left * left, 1)
        behind += tl.sum(right * right, 1)
    norm = tl.maximum(tl.sqrt(before), EPSILON) * tl.maximum(tl.sqrt(behind), EPSILON)
    change = tl.where(valid, 1.0 - across / norm, float("-inf"))
    tl.store(scores + sequence.to(tl.int64) * length + gap, change, mask=gap < length)


def plan(view: PagedView, window: int, segment: int, scores: torch.Tensor) -> Launch:
    """Grid, arguments and compile options; ``scores`` is ``[S, positions]``.

    Raises:
        ValueError: channels or table entries are not next to each other.
    """
    keys, tables = view.pages.keys, view.rows.block_tables
    if keys.stride(3) != 1 or tables.stride(1) != 1:
        raise ValueError("key pages and block tables need stride 1 in their last dimension")
    # Few registers for the sums of both windows, since the loads of all their rows are in flight at once.
    gaps = max(16, 2048 // power_of_two(view.head_dim))
    arguments: dict[str, Any] = {
        "keys": keys,
        "block_tables": tables,
        "context_lens": view.rows.context_lens,
        "scores": scores,
        "segment": segment,
        "length": scores.shape[1],
        "num_heads": view.num_kv_heads,
        "table_stride": tables.stride(0),
        "WINDOW": window,
        "PAGE_STRIDE": keys.stride(0),
        "HEAD_STRIDE": keys.stride(1),
        "ROW_STRIDE": keys.stride(2),
        "PAGE_SIZE": view.page_size,
        "HEAD_DIM": view.head_dim,
        "BLOCK_DIM": power_of_two(view.head_dim),
        "BLOCK_GAPS": gaps,
        "EPSILON": EPSILON,
    }
    grid = (-(-scores.shape[1] // gaps), scores.shape[0])
    return Launch(key_change_kernel, grid, arguments, Tiling(rows=gaps, keys=0, num_warps=4, num_stages=1))


def key_change(view: PagedView, window: int, segment: int, segments: int) -> torch.Tensor:
    """See ``ops.key_change``."""
    sequences = view.rows.num_sequences
    scores = torch.empty(sequences, segments * segment, dtype=torch.float32, device=view.pages.keys.device)
    if 2 * window > segment:  # no window fits, be it of millions of keys
        return scores.fill_(-torch.inf).view(sequences, segments, segment)
    if scores.numel():
        plan(view, window, segment, scores).run()
    return scores.view(sequences, segments, segment)
