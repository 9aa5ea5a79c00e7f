"""Sums over runs of queries and keys, which pooling schemes score: ``tile_sums``, ``unit_sums``, ``chunk_sums``."""

from __future__ import annotations

from typing import Literal

import torch

from foveate.kv_cache.stats import KEY_SUM
from foveate.kv_cache.view import PagedView

from ..selection import Tiles
from . import reference_sums, scan_native, sums_torch

Backend = Literal["reference", "torch", "native", "triton"]


def tile_sums(query: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Sum of the queries of each tile.

    Args:
        query: ``[T, H, D]``.
        tiles: R tiles that cover the T queries in order.

    Returns:
        ``[R, H, D]`` float32, the same on every run (no atomics).
    """
    return sums_torch.tile_sums(query, tiles)


def unit_sums(view: PagedView, size: int, summed: bool = False, *, backend: Backend | None = None) -> torch.Tensor:
    """Sum of the keys of each run of ``size`` positions.

    Units of whole pages add up page statistics, so no key is read; smaller units read every key, or sums of 16.

    Args:
        view: Its pages keep ``KEY_SUM`` if a unit holds whole pages.
        size: Positions per unit: a multiple of the page size, or a divisor of it.
        summed: See ``chunk_sums``.
        backend: For tests.

    Returns:
        ``[S, U, G, D]`` float32 with U units in the longest block table. Exact for units that lie
        whole within a sequence's context; what other units hold is not defined.

    Raises:
        ValueError: ``size`` does not fit the pages, or ``KEY_SUM`` is missing.
    """
    _check_units(view, size)
    if backend == "reference":
        return reference_sums.unit_sums(view, size)
    if size % view.page_size == 0:
        return sums_torch.whole_page_sums(view, size)
    chosen = backend or _default_backend(view)
    if chosen in ("triton", "native"):
        start, length = sums_torch.regular_ranges(view, size)
        return chunk_sums(view, start, length, summed, backend=chosen)
    return sums_torch.part_page_sums(view, size)


def chunk_sums(
    view: PagedView, start: torch.Tensor, length: torch.Tensor, summed: bool = False, *, backend: Backend | None = None
) -> torch.Tensor:
    """Sum of the keys of arbitrary runs of positions, read through the block table.

    Args:
        view: Keys of this step are written already.
        start: ``[S, C]`` int32 first position of each run.
        length: ``[S, C]`` int32 keys in it, all within the sequence's context; 0 sums to zero.
        summed: The caller's scheme has kept ``KEY_SUM_16`` since the first of these pages was written. Then native
            kernels read it in place of whole 16s of keys. That the pool has it says nothing: another scheme may have
            asked for it later.
        backend: For tests.

    Returns:
        ``[S, C, G, D]`` float32. On a CPU at most 64 MiB of keys are gathered at a time.

    Raises:
        ValueError: shapes do not fit.
    """
    if start.shape != length.shape or start.dim() != 2 or start.shape[0] != view.rows.num_sequences:
        raise ValueError(
            f"runs {tuple(start.shape)} and {tuple(length.shape)} do not fit {view.rows.num_sequences} rows"
        )
    chosen = backend or _default_backend(view)
    if chosen == "triton":
        from . import sums_triton

        return sums_triton.chunk_sums(view, start, length)
    if chosen == "native":
        return scan_native.chunk_sums(view, start, length, summed)
    if chosen == "torch":
        return sums_torch.chunk_sums(view, start, length)
    return reference_sums.chunk_sums(view, start, length)


def cut_sums(
    view: PagedView,
    size: int,
    cuts: tuple[int, ...],
    ends: tuple[int, ...],
    summed: bool = False,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Sums of the units before a cut, the last of them cut short, and of all keys behind it.

    This is what a decode step needs whose prompt ends at the cut: with units of whole pages it
    reads page statistics and the keys of two pages per sequence.

    Args:
        view: As for ``unit_sums``.
        size: Positions per unit.
        cuts: Per sequence, the position where units end.
        ends: Per sequence, where the keys behind the cut end; at least ``cuts``.
        summed: See ``chunk_sums``.

    Returns:
        ``[S, U + 1, G, D]`` float32, U units up to the largest cut, at least one; the last row is the sum over
        ``cut <= position < end``. Units behind a cut sum to zero.

    Raises:
        ValueError: as ``unit_sums``.
    """
    _check_units(view, size)
    if backend == "reference":
        return reference_sums.cut_sums(view, size, cuts, ends)
    if size % view.page_size == 0:
        return sums_torch.cut_page_sums(view, size, cuts, ends)
    chosen = backend or _default_backend(view)
    if chosen == "torch":
        return sums_torch.cut_part_sums(view, size, cuts, ends)
    start, length = sums_torch.cut_ranges(view, size, cuts, ends)
    return chunk_sums(view, start, length, summed, backend=chosen)


def _default_backend(view: PagedView) -> Backend:
    if view.pages.keys.is_cuda:
        return "triton"
    return "native" if scan_native.sums_keys(view) else "torch"


def _check_units(view: PagedView, size: int) -> None:
    if size < 1 or (size % view.page_size and view.page_size % size):
        raise ValueError(f"units of {size} do not fit pages of {view.page_size}")
    if size % view.page_size == 0 and KEY_SUM not in view.pages.stats:
        raise ValueError("units of whole pages need the page statistic key_sum")
