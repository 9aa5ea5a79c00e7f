"""How large a logit can be in each page at most: ``page_bounds``, from the smallest and largest key channels."""

from __future__ import annotations

from typing import Literal

import torch

from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
from foveate.kv_cache.view import PagedView

from ..selection import Tiles
from . import page_bounds_torch, reference_page_bounds, scan_native

Backend = Literal["reference", "torch", "native", "triton"]


def page_bounds(query: torch.Tensor, view: PagedView, tiles: Tiles, *, backend: Backend | None = None) -> torch.Tensor:
    """Upper bound of ``q . k`` over the keys of each page and the queries of each tile (Quest, arXiv:2406.10774).

    For one query and page: ``sum over channels of max(q_c * min_c, q_c * max_c)``, with ``min_c``
    and ``max_c`` over the page's keys; a tile has the maximum over its queries. Not scaled.

    Args:
        query: ``[T, H, D]``.
        view: Its pages keep ``KEY_MIN`` and ``KEY_MAX``.
        tiles: R tiles of the queries; of size 1 in decode.
        backend: For tests.

    Returns:
        ``[R, H, N]`` float32, N logical pages as in ``view.rows.block_tables``; ``-inf`` for a page
        without keys of the sequence.

    Raises:
        ValueError: shapes do not fit, or a statistic is missing.
    """
    tokens, heads, dim = query.shape
    if tokens != view.rows.num_queries or dim != view.head_dim or heads % view.num_kv_heads:
        raise ValueError(
            f"queries {tuple(query.shape)} do not fit {view.rows.num_queries} tokens "
            f"and {view.num_kv_heads} KV heads of {view.head_dim}"
        )
    missing = [stat.name for stat in (KEY_MIN, KEY_MAX) if stat not in view.pages.stats]
    if missing:
        raise ValueError(f"the pages do not keep {', '.join(missing)}")
    chosen = backend or _default_backend(query, view, tiles)
    if chosen == "triton":
        from . import page_bounds_triton

        return page_bounds_triton.page_bounds(query, view, tiles)
    if chosen == "native":
        return scan_native.page_bounds(query, view)
    if chosen == "torch":
        return page_bounds_torch.page_bounds(query, view, tiles)
    return reference_page_bounds.page_bounds(query, view, tiles)


def _default_backend(query: torch.Tensor, view: PagedView, tiles: Tiles) -> Backend:
    if query.is_cuda:
        return "triton"
    # Tiles of many queries are products of matrices, which torch does better.
    return "native" if tiles.size == 1 and scan_native.bounds_pages(query, view) else "torch"
