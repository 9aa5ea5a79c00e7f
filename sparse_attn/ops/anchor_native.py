"""``anchor_scores`` and ``pooled_topk`` on a CPU, by the compiled kernels of ``native/``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Tiles
from .attention_native import opened, supports
from .native import DTYPES, ISAS, NO_END, AnchorCall, Call

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
    longest = max(tiles.ends[rows.start : rows.stop])
    pooled = torch.zeros(len(rows), 1 if pool_all else view.num_kv_heads, longest)
    call = _call(query, view, tiles, rows, isa)
    call.scores, call.score_width, call.pool_all = pooled.data_ptr(), longest, pool_all
    _run(call, query, view, spec)
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
    indices = torch.empty((len(tiles), kinds, width), dtype=torch.int32)
    counts = torch.empty((len(tiles), kinds), dtype=torch.int32)
    # Most of a call is the same in all layers of a step; in decode it took longer to fill in than to run.
    name = "anchor_native", *map(id, candidates), *budgets, width, pool_all, query.shape[1], isa
    if name not in tiles.plans:
        call = _call(query, view, tiles, range(len(tiles)), isa)
        first, end = (bound.to(torch.int32).contiguous() for bound in candidates)
        wanted = torch.tensor(budgets, dtype=torch.int32)
        call.first, call.end, call.budgets = first.data_ptr(), end.data_ptr(), wanted.data_ptr()
        call.index_width, call.pool_all = width, pool_all
        # The candidates stay alive with the call, so that their names stay theirs.
        tiles.plans[name] = call, (candidates, first, end, wanted, view.rows)
    call = tiles.plans[name][0]
    call.indices, call.counts = indices.data_ptr(), counts.data_ptr()
    _run(call, query, view, spec)
    return indices, counts


def _call(query: torch.Tensor, view: PagedView, tiles: Tiles, tile_rows: range, isa: str | None) -> AnchorCall:
    """What is the same in all layers of a step; the rows and the tiles must outlive it."""
    rows, first = view.rows, tile_rows.start
    call = AnchorCall(query_step=tiles.step)
    call.attention = Call(
        block_tables=rows.block_tables.data_ptr(),
        context_lens=rows.context_lens.data_ptr(),
        query_offsets=rows.query_offsets.data_ptr(),
        table_stride=rows.block_tables.stride(0),
        num_sequences=rows.num_sequences,
        num_heads=query.shape[1],
        num_kv_heads=view.num_kv_heads,
        head_dim=view.head_dim,
        page_size=view.page_size,
        num_tiles=len(tile_rows),
        tile_sequence=tiles.sequence[first:].data_ptr(),
        tile_start=tiles.query_start[first:].data_ptr(),
        tile_count=tiles.query_count[first:].data_ptr(),
        tile_position=tiles.position[first:].data_ptr(),
        farthest=NO_END,
        dtype=DTYPES[query.dtype],
        isa=ISAS.index(isa or opened().isa),
        num_threads=torch.get_num_threads(),
    )
    return call


def _run(call: AnchorCall, query: torch.Tensor, view: PagedView, spec: AttentionSpec) -> None:
    if query.stride(2) != 1:
        query = query.contiguous()
    pages, attention = view.pages, call.attention
    sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
    attention.query, attention.keys = query.data_ptr(), pages.keys.data_ptr()
    attention.values = attention.keys  # never read
    if pages.key_scales is not None:
        attention.key_scales = attention.value_scales = pages.key_scales.data_ptr()
    attention.sinks = None if sinks is None else sinks.data_ptr()
    attention.query_token_stride, attention.query_head_stride = query.stride(0), query.stride(1)
    attention.scale, attention.softcap = spec.scale, spec.softcap
    if opened().anchor(call):
        raise MemoryError("no memory for the scratch space of the anchor kernels")
