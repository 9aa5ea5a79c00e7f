"""Sums of runs of keys, and bounds of pages, on a CPU by the compiled kernels of ``native/``."""

from __future__ import annotations

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM_16
from foveate.kv_cache.view import PagedView

from .attention_native import opened
from .native import DTYPES, ISAS, ScanCall, library


def sums_keys(view: PagedView) -> bool:
    """Can the kernels sum these keys? They take float32, bfloat16 and int8, and head dims divisible by 16 up to 512."""
    keys = view.pages.keys
    stored = torch.int8 if view.pages.quantized else keys.dtype
    return (
        _fits(keys.device, view.head_dim)
        and keys.dtype == stored
        and keys.is_contiguous()
        and (view.pages.quantized or stored in DTYPES)
    )


def bounds_pages(query: torch.Tensor, view: PagedView) -> bool:
    """Can the kernels bound these pages? They take one query per sequence, in float32 or bfloat16."""
    one_each = query.shape[0] == view.rows.num_sequences == view.rows.num_queries
    on_cpu = query.device.type == "cpu" and query.dtype in DTYPES
    return one_each and on_cpu and _fits(view.pages.keys.device, view.head_dim)


def _fits(device: torch.device, head_dim: int) -> bool:
    return device.type == "cpu" and head_dim % 16 == 0 and head_dim <= 512 and library() is not None


def keeps_sums(geometry: CacheGeometry) -> bool:
    """Would ``chunk_sums`` read sums of 16 keys beside pages of this kind?"""
    known = geometry.quantized or geometry.dtype in DTYPES
    return known and _fits(geometry.device, geometry.head_dim)


def chunk_sums(
    view: PagedView, start: torch.Tensor, length: torch.Tensor, summed: bool = False, *, isa: str | None = None
) -> torch.Tensor:
    """See ``ops.sums.chunk_sums``; ``isa`` is for tests."""
    start, length = start.long().contiguous(), length.long().contiguous()
    pages = view.pages
    out = torch.empty((*start.shape, view.num_kv_heads, view.head_dim), dtype=torch.float32)
    call = _call(view, isa)
    call.keys, call.start, call.length = pages.keys.data_ptr(), start.data_ptr(), length.data_ptr()
    call.key_scales = None if pages.key_scales is None else pages.key_scales.data_ptr()
    if summed:
        call.sums = pages.stats[KEY_SUM_16].data_ptr()
    call.out, call.runs = out.data_ptr(), start.shape[1]
    call.dtype = DTYPES.get(pages.keys.dtype, 0)
    opened().scan_sums(call)
    return out


def page_bounds(query: torch.Tensor, view: PagedView, *, isa: str | None = None) -> torch.Tensor:
    """See ``ops.page_bounds``; one query per sequence. ``isa`` is for tests."""
    if query.stride(2) != 1:
        query = query.contiguous()
    heads, count = query.shape[1], view.rows.block_tables.shape[1]
    low, high = (view.pages.stats[stat].contiguous() for stat in (KEY_MIN, KEY_MAX))
    out = torch.empty((query.shape[0], heads, count), dtype=torch.float32)
    call = _call(view, isa)
    call.query, call.low, call.high, call.out = query.data_ptr(), low.data_ptr(), high.data_ptr(), out.data_ptr()
    call.query_token_stride, call.query_head_stride = query.stride(0), query.stride(1)
    call.num_heads, call.pages, call.dtype = heads, count, DTYPES[query.dtype]
    opened().scan_bounds(call)
    return out


def _call(view: PagedView, isa: str | None) -> ScanCall:
    rows = view.rows
    return ScanCall(
        block_tables=rows.block_tables.data_ptr(),
        context_lens=rows.context_lens.data_ptr(),
        table_stride=rows.block_tables.stride(0),
        num_sequences=rows.num_sequences,
        num_kv_heads=view.num_kv_heads,
        head_dim=view.head_dim,
        page_size=view.page_size,
        isa=ISAS.index(isa or opened().isa),
        num_threads=torch.get_num_threads(),
    )
