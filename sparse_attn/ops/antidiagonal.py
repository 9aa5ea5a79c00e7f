"""Attention from a tile of queries to each key block, estimated on antidiagonals: ``antidiagonal_scores``."""

from __future__ import annotations

from typing import Literal

import torch

from foveate.kv_cache.view import PagedView

from ..selection import Tiles
from . import antidiagonal_torch, reference_antidiagonal

Backend = Literal["reference", "torch", "triton"]


def antidiagonal_scores(
    query: torch.Tensor,
    view: PagedView,
    tiles: Tiles,
    stride: int,
    scale: float,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Estimated attention of each tile of queries to each block of as many keys (XAttention, arXiv:2503.16428).

    Positions are cut into runs of S = ``stride``. For the run ``r`` of queries and the run ``c <= r`` of keys::

        e[r, c] = sum for t < S of q[r S + S-1 - t] . k[c S + t]
        a[r, c] = softmax over c of e[r, c] * scale / S

    and the score of a block is the sum of ``a`` over the runs of the tile and of the block, so that the scores of
    a tile add up to the number of its runs. A query of a run that is not there (the prompt ends, or the chunk
    begins, inside it) adds nothing to ``e``. A tile's scores depend on no other tile and on no key behind it, so
    chunks cut between tiles give the same scores as the whole prompt.

    Args:
        query: ``[T, H, D]``.
        view: K of this step are written already.
        tiles: R tiles of the queries, of a size that ``stride`` divides; key blocks have the same size.
        stride: S, a power of two up to the page size.
        scale: Factor on the logits.
        backend: For tests.

    Returns:
        ``[R, H, U]`` float32, ``U = ceil(longest context / tile size)``; 0 for blocks behind a tile.

    Raises:
        ValueError: shapes or sizes do not fit.
    """
    tokens, heads, dim = query.shape
    if tokens != view.rows.num_queries or dim != view.head_dim or heads % view.num_kv_heads:
        raise ValueError(
            f"queries {tuple(query.shape)} do not fit {view.rows.num_queries} tokens "
            f"and {view.num_kv_heads} KV heads of {view.head_dim}"
        )
    if tiles.size % stride or view.page_size % stride:
        raise ValueError(f"stride {stride} does not divide tiles of {tiles.size} and pages of {view.page_size}")
    chosen = backend or ("triton" if query.is_cuda else "torch")
    if chosen == "triton":
        from . import antidiagonal_triton

        return antidiagonal_triton.antidiagonal_scores(query, view, tiles, stride, scale)
    if chosen == "torch":
        return antidiagonal_torch.antidiagonal_scores(query, view, tiles, stride, scale)
    return reference_antidiagonal.antidiagonal_scores(query, view, tiles, stride, scale)
