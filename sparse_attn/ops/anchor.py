"""Exact attention scores for choosing keys: ``anchor_scores``, and ``pooled_topk`` over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import CAUSAL, Selection, Tiles
from . import anchor_native, anchor_torch, reference_anchor
from .topk import top_units

Backend = Literal["reference", "torch", "native", "triton"]
Pool = Literal["group", "all"]

# Scores that `pooled_topk` holds at once, by device. Each takes 4 bytes here, and in torch about 28 while `top_units`
# ranks it: 64 MiB. A GPU needs many tiles at a time to fill its processors, and takes 64 MiB too.
SLAB_SCORES = {"cpu": 1 << 21, "cuda": 1 << 24}


def anchor_scores(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    spec: AttentionSpec,
    *,
    rows: range | None = None,
    pool: Pool = "group",
    backend: Backend | None = None,
) -> torch.Tensor:
    """Attention probability of each key, summed over a tile's queries and over heads.

    Each query head is normalised by itself, over every key that its query sees (the tile's own
    among them, and the learned sink), and the sum is taken after that: post-softmax pooling,
    Kascade (arXiv:2512.16391), section 3. Never holds queries x keys: on a CPU a block of
    about 2 MiB per thread, one tile's rows at least; on a GPU none.

    Args:
        query: ``[T, H, D]``, the queries of ``view.rows``.
        view: K of this step is written already.
        tiles: R tiles of those queries; of size 1 in decode.
        spec: Scale, soft cap and learned sinks. Its band must be causal.
        rows: Which tiles; all if ``None``.
        pool: ``group`` sums over the query heads of each KV head, ``all`` over all heads.
        backend: For tests.

    Returns:
        ``[len(rows), K, U]`` float32, K = G or 1, U the end of the last of these tiles; 0 for keys
        that a tile does not see. Without sinks the sum over U is (queries of the tile) * (heads pooled).
        Of a prompt's int8 pages on a CPU each query's share in a score is rounded, by up to a tenth: they are there
        to rank keys (``native/anchor.h``).

    Raises:
        ValueError: shapes do not fit, or the layer has a window of its own.
    """
    _check(query, view, spec)
    rows = range(len(tiles)) if rows is None else rows
    if not len(rows):
        return query.new_zeros(0, 1 if pool == "all" else view.num_kv_heads, 0, dtype=torch.float32)
    chosen = backend or _default_backend(query, view, spec)
    if chosen == "triton":
        from . import anchor_triton

        return anchor_triton.scores(query, view, tiles, spec, rows, pool == "all")
    if chosen == "native":
        return anchor_native.scores(query, view, tiles, spec, rows, pool == "all")
    if chosen == "torch":
        return anchor_torch.scores(query, view, tiles, spec, rows, pool == "all")
    return reference_anchor.scores(query, view, tiles, spec, rows, pool == "all")


def pooled_topk(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    spec: AttentionSpec,
    candidates: tuple[torch.Tensor, torch.Tensor],
    budgets: Sequence[int],
    *,
    pool: Pool = "group",
    backend: Backend | None = None,
) -> Selection:
    """The keys with the highest ``anchor_scores`` of each tile and KV head; of equal ones the earliest.

    Works through the tiles in slabs of a bounded number of scores (one tile at least); the
    native kernels choose at once and hold the scores of one tile per thread.

    Args:
        query: As the rest, as in ``anchor_scores``.
        view: Same.
        tiles: Same.
        spec: Same.
        candidates: ``(first, end)`` ``[R]`` int32, as ``budget.free_units`` makes them; what is not
            a candidate takes part in the softmax, but is not chosen.
        budgets: Keys to choose per tile, R numbers on the host. Tiles with fewer candidates take all.
        pool: With ``all``, every KV head gets the same keys.
        backend: For tests.

    Returns:
        Token-granular, one row per KV head.

    Raises:
        ValueError: shapes do not fit, or the layer has a window of its own.
    """
    _check(query, view, spec)
    if len(budgets) != len(tiles):
        raise ValueError(f"{len(budgets)} budgets for {len(tiles)} tiles")
    kinds = 1 if pool == "all" else view.num_kv_heads
    first, end = candidates
    ends = tiles.ends
    budgets = [min(pair) for pair in zip(budgets, ends, strict=True)]
    width = max(budgets, default=0)
    shape = (len(tiles), view.num_kv_heads)
    chosen_backend = backend or _default_backend(query, view, spec)
    if chosen_backend == "native" and len(tiles):
        indices, counts = anchor_native.topk(
            query, view, tiles, spec, candidates, budgets, max(width, 1), pool == "all"
        )
        if kinds != view.num_kv_heads:
            indices, counts = indices.expand(*shape, -1), counts.expand(*shape)
        return Selection(indices, counts, 1, tiles)
    indices = torch.full((len(tiles), kinds, max(width, 1)), -1, dtype=torch.int32, device=query.device)
    counts = torch.zeros(len(tiles), kinds, dtype=torch.int32, device=query.device)
    # The Triton kernels hold the scores of every KV head, also where they are pooled.
    held = view.num_kv_heads if chosen_backend == "triton" else kinds
    for rows in _slabs(ends, held, SLAB_SCORES.get(query.device.type, SLAB_SCORES["cpu"])):
        part = slice(rows.start, rows.stop)
        if all(budgets[row] >= ends[row] for row in rows):  # nothing can be left out, so nothing need be ranked
            scores = torch.zeros(len(rows), kinds, max(ends[part]), device=query.device)
        else:
            scores = anchor_scores(query, view, tiles, spec, rows=rows, pool=pool, backend=chosen_backend)
        wanted = torch.tensor(budgets[part], dtype=torch.int32).to(query.device, non_blocking=True)
        chosen, counts[part] = top_units(scores, (first[part], end[part]), wanted, most=max(budgets[part]))
        indices[part, :, : chosen.shape[2]] = chosen
    return Selection(indices.expand(*shape, -1), counts.expand(*shape), 1, tiles)


def _slabs(ends: Sequence[int], kinds: int, most: int) -> list[range]:
    """Runs of tiles, each of at most ``most`` scores or of one tile."""
    slabs, start, longest = [], 0, 0
    for row, end in enumerate(ends):
        longest = max(longest, end)
        if row > start and (row + 1 - start) * longest * kinds > most:
            slabs.append(range(start, row))
            start, longest = row, end
    return [*slabs, range(start, len(ends))] if ends else []


def _default_backend(query: torch.Tensor, view: PagedView, spec: AttentionSpec) -> Backend:
    if query.is_cuda:
        return "triton"
    return "native" if anchor_native.supports(query, view, spec) else "torch"


def _check(query: torch.Tensor, view: PagedView, spec: AttentionSpec) -> None:
    tokens, heads, dim = query.shape
    if tokens != view.rows.num_queries:
        raise ValueError(f"{tokens} queries given, the rows hold {view.rows.num_queries}")
    if dim != view.head_dim or heads % view.num_kv_heads:
        raise ValueError(f"query of {heads} heads x {dim} does not fit {view.num_kv_heads} KV heads x {view.head_dim}")
    if spec.band != CAUSAL:
        raise ValueError(f"anchor scores are for layers that see every earlier key, this one has {spec.band}")
