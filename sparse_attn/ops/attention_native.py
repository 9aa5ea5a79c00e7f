"""Attention over pages on a CPU, by the compiled kernels of ``native/``."""

from __future__ import annotations

import ctypes

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from .native import DTYPES, ISAS, NO_END, Call, Library, library

Result = tuple[torch.Tensor, torch.Tensor]


def supports(query: torch.Tensor, view: PagedView, spec: AttentionSpec) -> bool:
    """Can the kernels compute this call?

    They take queries in float32 and bfloat16, pages of the same type or of int8, and head dims divisible by 16 up to
    512.
    """
    pools = view.pages.keys, view.pages.values
    stored = torch.int8 if view.pages.quantized else query.dtype
    return (
        query.device.type == "cpu"
        and query.dtype in DTYPES
        and view.head_dim % 16 == 0
        and view.head_dim <= 512
        and spec.scale > 0
        and all(pool.dtype == stored and pool.is_contiguous() for pool in pools)
        and library() is not None
    )


def prefill(
    query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec, *, isa: str | None = None
) -> Result:
    """See ``ops.prefill``; ``isa`` is for tests."""
    return run(opened().prefill, query, view, selection, spec, isa)


def decode(
    query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec, *, isa: str | None = None
) -> Result:
    """See ``ops.decode``; ``isa`` is for tests."""
    return run(opened().decode, query, view, selection, spec, isa)


def opened() -> Library:
    """The library, for those who know that it is there."""
    kernels = library()
    if kernels is None:
        raise RuntimeError("the native CPU kernels were not built")
    return kernels


def run(
    function: ctypes._NamedFuncPointer,
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    isa: str | None,
    threshold: int | None = None,
) -> Result:
    """One call of ``function``; ``threshold`` is the address of a ``ThresholdCall``."""
    tokens, heads, dim = query.shape
    if query.stride(2) != 1:
        query = query.contiguous()
    out = torch.empty((tokens, heads, dim), dtype=query.dtype)
    lse = torch.empty((tokens, heads), dtype=torch.float32)
    if not tokens:
        return out, lse
    rows, pages = view.rows, view.pages
    sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
    call = Call(
        query=query.data_ptr(),
        keys=pages.keys.data_ptr(),
        values=pages.values.data_ptr(),
        key_scales=None if pages.key_scales is None else pages.key_scales.data_ptr(),
        value_scales=None if pages.value_scales is None else pages.value_scales.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        block_tables=rows.block_tables.data_ptr(),
        context_lens=rows.context_lens.data_ptr(),
        query_offsets=rows.query_offsets.data_ptr(),
        threshold=threshold,
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        table_stride=rows.block_tables.stride(0),
        num_sequences=rows.num_sequences,
        num_heads=heads,
        num_kv_heads=view.num_kv_heads,
        head_dim=dim,
        page_size=view.page_size,
        nearest=spec.band.nearest,
        farthest=NO_END if spec.band.farthest is None else min(spec.band.farthest, NO_END),
        scale=spec.scale,
        softcap=spec.softcap,
        dtype=DTYPES[query.dtype],
        isa=ISAS.index(isa or opened().isa),
        num_threads=torch.get_num_threads(),
    )
    if selection is not None:
        indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
        tiles = selection.tiles
        call.indices, call.counts = indices.data_ptr(), counts.data_ptr()
        call.tile_sequence, call.tile_start = tiles.sequence.data_ptr(), tiles.query_start.data_ptr()
        call.tile_count, call.tile_position = tiles.query_count.data_ptr(), tiles.position.data_ptr()
        call.num_tiles = len(tiles)
        call.selected_heads, call.selected_width = indices.shape[1:]
        call.granularity = selection.granularity
    if function(call):
        raise MemoryError("no memory for the scratch space of the attention kernels")
    return out, lse
