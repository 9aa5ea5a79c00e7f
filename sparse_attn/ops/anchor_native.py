"""``anchor_scores`` and ``pooled_topk`` on a CPU, by the compiled kernels of ``native/``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Tiles
from .attention_native import supports
from .native import DTYPES, ISAS, NO_END, AnchorCall, Call, library

__all__ = ["scores", "supports", "topk"]


def scores(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    spec: AttentionSpec,
    rows: range,
    pool_all: bool,
    *,
    isa: str | None = None,
) -> torch.Tensor:
    """See ``ops.anchor_scores``; ``isa`` is for tests."""
    longest = max(tiles.host[row][3] + tiles.host[row][2] for row in rows)
    pooled = torch.zeros(len(rows), 1 if pool_all else view.num_kv_heads, longest)
    call = AnchorCall(scores=pooled.data_ptr(), score_width=longest, pool_all=pool_all)
    _run(call, query, view, tiles, spec, rows, isa)
    return pooled


def topk(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    spec: AttentionSpec,
    candidates: tuple[torch.Tensor, torch.Tensor],
    budgets: Sequence[int],
    width: int,
    pool_all: bool,
    *,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices ``[R, K, width]`` and counts ``[R, K]`` of ``ops.pooled_topk``; holds no scores but a tile's.

    ``isa`` is for tests.
    """
    kinds = 1 if pool_all else view.num_kv_heads
    indices = torch.empty(len(tiles), kinds, width, dtype=torch.int32)
    counts = torch.empty(len(tiles), kinds, dtype=torch.int32)
    first, end = (bound.to(torch.int32).contiguous() for bound in candidates)
    wanted = torch.tensor(budgets, dtype=torch.int32)
    call = AnchorCall(
        first=first.data_ptr(),
        end=end.data_ptr(),
        budgets=wanted.data_ptr(),
        indices=indices.data_ptr(),
        counts=counts.data_ptr(),
        index_width=width,
        pool_all=pool_all,
    )
    _run(call, query, view, tiles, spec, range(len(tiles)), isa)
    return indices, counts


def _run(
    call: AnchorCall,
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    spec: AttentionSpec,
    tile_rows: range,
    isa: str | None,
) -> None:
    kernels = library()
    if kernels is None:
        raise RuntimeError("the native CPU kernels were not built")
    if query.stride(2) != 1:
        query = query.contiguous()
    rows, pages, part = view.rows, view.pages, slice(tile_rows.start, tile_rows.stop)
    sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
    of_tiles = [column[part] for column in (tiles.sequence, tiles.query_start, tiles.query_count, tiles.position)]
    call.attention = Call(
        query=query.data_ptr(),
        keys=pages.keys.data_ptr(),
        values=pages.keys.data_ptr(),  # never read
        key_scales=None if pages.key_scales is None else pages.key_scales.data_ptr(),
        value_scales=None if pages.key_scales is None else pages.key_scales.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        block_tables=rows.block_tables.data_ptr(),
        context_lens=rows.context_lens.data_ptr(),
        query_offsets=rows.query_offsets.data_ptr(),
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        table_stride=rows.block_tables.stride(0),
        num_sequences=rows.num_sequences,
        num_heads=query.shape[1],
        num_kv_heads=view.num_kv_heads,
        head_dim=view.head_dim,
        page_size=view.page_size,
        num_tiles=len(tile_rows),
        tile_sequence=of_tiles[0].data_ptr(),
        tile_start=of_tiles[1].data_ptr(),
        tile_count=of_tiles[2].data_ptr(),
        tile_position=of_tiles[3].data_ptr(),
        farthest=NO_END,
        scale=spec.scale,
        softcap=spec.softcap,
        dtype=DTYPES[query.dtype],
        isa=ISAS.index(isa or kernels.isa),
        num_threads=torch.get_num_threads(),
    )
    if kernels.anchor(ctypes.byref(call)):
        raise MemoryError("no memory for the scratch space of the anchor kernels")
