"""Page bounds: one program reads the extremes of a block of pages once, for all queries that ask."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
from foveate.kv_cache.view import PagedView

from ..selection import Tiles
from .launch import Launch, last_dim_dense
from .tiling import Tiling, power_of_two

# Statistics are float32, and rounding them to a shorter type would break the bound: no tensor core.
_PAGES, _ROWS = 32, 16


@triton.jit(do_not_specialize=["pages", "table_stride"])
def page_bounds_kernel(
    query,
    bounds,  # [R, H, N] float32
    low,  # [P, G, D] float32, as `high`
    high,
    block_tables,
    context_lens,
    tile_sequence,
    tile_start,
    tile_count,
    pages,
    table_stride,
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    FOLD: tl.constexpr,  # query heads of one program: GROUP if a tile is one query, else 1
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
):
    """Program (tile, block of pages, head): its rows are the heads of a group, or the queries of a tile."""
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(2)
    sequence = tl.load(tile_sequence + tile).to(tl.int64)
    start = tl.load(tile_start + tile).to(tl.int64)
    count = tl.load(tile_count + tile)
    context = tl.load(context_lens + sequence)
    dim = tl.arange(0, BLOCK_DIM)
    rows = tl.arange(0, BLOCK_ROWS)
    place = tl.program_id(1) * BLOCK_PAGES + tl.arange(0, BLOCK_PAGES)
    known = (place < pages) & (place * PAGE_SIZE < context)
    page = tl.load(block_tables + sequence * table_stride + place, mask=known, other=0).to(tl.int64)
    kv_head = head * FOLD // GROUP
    at = ((page * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + dim[None, :]
    readable = known[:, None] & (dim < HEAD_DIM)[None, :]
    least = tl.trans(tl.load(low + at, mask=readable, other=0.0))
    most = tl.trans(tl.load(high + at, mask=readable, other=0.0))
    if FOLD > 1:
        valid = rows < FOLD
        asked = start * QUERY_STRIDE + (head * FOLD + rows) * QUERY_HEAD_STRIDE
        found = _rows_bounds(query, asked, valid, dim, least, most, HEAD_DIM)
        found = tl.where(known[None, :], found, float("-inf"))
        out = (tile * tl.num_programs(2) * FOLD + head * FOLD + rows) * pages
        tl.store(bounds + out[:, None] + place[None, :], found, mask=valid[:, None] & (place < pages)[None, :])
    else:
        best = tl.full([BLOCK_PAGES], float("-inf"), tl.float32)
        for first in range(0, count, BLOCK_ROWS):
            valid = first + rows < count
            asked = (start + first + rows) * QUERY_STRIDE + head * QUERY_HEAD_STRIDE
            found = _rows_bounds(query, asked, valid, dim, least, most, HEAD_DIM)
            best = tl.maximum(best, tl.max(tl.where(valid[:, None], found, float("-inf")), 0))
        out = (tile * tl.num_programs(2) + head) * pages
        tl.store(bounds + out + place, tl.where(known, best, float("-inf")), mask=place < pages)


@triton.jit
def _rows_bounds(query, asked, valid, dim, least, most, HEAD_DIM: tl.constexpr):
    """``[BLOCK_ROWS, BLOCK_PAGES]``: ``max(q, 0) . most + min(q, 0) . least``."""
    inside = valid[:, None] & (dim < HEAD_DIM)[None, :]
    tile = tl.load(query + asked[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    above = tl.dot(tl.maximum(tile, 0.0), most, input_precision="ieee")
    return tl.dot(tl.minimum(tile, 0.0), least, above, input_precision="ieee")


def plan(query: torch.Tensor, view: PagedView, tiles: Tiles, bounds: torch.Tensor) -> Launch:
    """Grid, arguments and compile options.

    Raises:
        ValueError: a statistic is not contiguous.
    """
    low, high = view.pages.stats[KEY_MIN], view.pages.stats[KEY_MAX]
    if not (low.is_contiguous() and high.is_contiguous()):
        raise ValueError("page statistics must be contiguous")
    _, heads, dim = query.shape
    group, pages = heads // view.num_kv_heads, view.rows.block_tables.shape[1]
    fold = group if tiles.size == 1 else 1
    tiling = Tiling(max(_ROWS, power_of_two(fold)), _PAGES, num_warps=4, num_stages=1)
    arguments = {
        "query": query,
        "bounds": bounds,
        "low": low,
        "high": high,
        "block_tables": view.rows.block_tables,
        "context_lens": view.rows.context_lens,
        "tile_sequence": tiles.sequence,
        "tile_start": tiles.query_start,
        "tile_count": tiles.query_count,
        "pages": pages,
        "table_stride": view.rows.block_tables.stride(0),
        "QUERY_STRIDE": query.stride(0),
        "QUERY_HEAD_STRIDE": query.stride(1),
        "KV_HEADS": view.num_kv_heads,
        "GROUP": group,
        "FOLD": fold,
        "PAGE_SIZE": view.page_size,
        "HEAD_DIM": dim,
        "BLOCK_DIM": max(16, power_of_two(dim)),
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_PAGES": tiling.keys,
    }
    return Launch(page_bounds_kernel, (len(tiles), -(-pages // tiling.keys), heads // fold), arguments, tiling)


def page_bounds(query: torch.Tensor, view: PagedView, tiles: Tiles) -> torch.Tensor:
    """See ``ops.page_bounds``."""
    query = last_dim_dense(query)
    shape = (len(tiles), query.shape[1], view.rows.block_tables.shape[1])
    bounds = torch.empty(shape, dtype=torch.float32, device=query.device)
    if bounds.numel():
        plan(query, view, tiles, bounds).run()
    return bounds
