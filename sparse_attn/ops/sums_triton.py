"""Sums over runs of keys, read through the block table."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from .launch import Launch
from .tiling import Tiling, power_of_two


@triton.jit(do_not_specialize=["num_runs", "table_stride"])
def chunk_sums_kernel(
    keys,
    block_tables,
    start,  # [S, C] int32; likewise length
    length,
    sums,  # [S, C, G, D] float32
    num_runs,
    num_heads,
    table_stride,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Program (run of a sequence, KV head)."""
    run = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(start + run)
    count = tl.load(length + run)
    table = block_tables + (run // num_runs) * table_stride
    keys += head * HEAD_STRIDE
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    held = tl.zeros([BLOCK_DIM], tl.float32)
    for done in range(0, count, BLOCK_TOKENS):
        place = done + tl.arange(0, BLOCK_TOKENS)
        known = place < count
        position = first + place
        page = tl.load(table + position // PAGE_SIZE, mask=known, other=0)
        row = page.to(tl.int64) * PAGE_STRIDE + (position % PAGE_SIZE) * ROW_STRIDE
        tile = tl.load(keys + row[:, None] + dim[None, :], mask=known[:, None] & in_dim[None, :], other=0.0)
        held += tl.sum(tile.to(tl.float32), 0)
    tl.store(sums + (run * num_heads + head) * HEAD_DIM + dim, held, mask=in_dim)


def plan(view: PagedView, start: torch.Tensor, length: torch.Tensor, sums: torch.Tensor) -> Launch:
    """Grid, arguments and compile options.

    Raises:
        ValueError: channels or table entries are not next to each other.
    """
    keys, tables = view.pages.keys, view.rows.block_tables
    if keys.stride(3) != 1 or tables.stride(1) != 1:
        raise ValueError("key pages and block tables need stride 1 in their last dimension")
    heads = view.num_kv_heads
    arguments: dict[str, Any] = {
        "keys": keys,
        "block_tables": tables,
        "start": start.int().contiguous(),
        "length": length.int().contiguous(),
        "sums": sums,
        "num_runs": start.shape[1],
        "num_heads": heads,
        "table_stride": tables.stride(0),
        "PAGE_STRIDE": keys.stride(0),
        "HEAD_STRIDE": keys.stride(1),
        "ROW_STRIDE": keys.stride(2),
        "PAGE_SIZE": view.page_size,
        "HEAD_DIM": view.head_dim,
        "BLOCK_DIM": power_of_two(view.head_dim),
        "BLOCK_TOKENS": 16,
    }
    return Launch(
        chunk_sums_kernel, (start.numel(), heads), arguments, Tiling(rows=1, keys=16, num_warps=1, num_stages=1)
    )


def chunk_sums(view: PagedView, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """See ``ops.sums.chunk_sums``."""
    sums = torch.empty(
        *start.shape, view.num_kv_heads, view.head_dim, dtype=torch.float32, device=view.pages.keys.device
    )
    if sums.numel():
        plan(view, start, length, sums).run()
    return sums
