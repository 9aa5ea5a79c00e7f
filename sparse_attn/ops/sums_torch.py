"""Sums over runs of queries and keys in torch."""

from __future__ import annotations

import itertools

import torch

from foveate.kv_cache.stats import KEY_SUM
from foveate.kv_cache.view import PagedView

from ..selection import Tiles

# Bytes of float32 keys that are gathered at a time.
SLAB_BYTES = 64 << 20
# A run of pages saves copies, but costs a call of its own.
MIN_PAGES_PER_RUN = 4


def tile_sums(query: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """See ``ops.sums.tile_sums``."""
    rows = len(tiles)
    if all(count == tiles.size for _, _, count, _ in tiles.host):
        return torch.unflatten(query, 0, (rows, tiles.size)).sum(1, dtype=torch.float32)
    lengths = tiles.query_count.long()
    if query.is_cuda:  # index_add would add in any order there
        flat = query.float().flatten(1)
        return torch.segment_reduce(flat, "sum", lengths=lengths, axis=0, unsafe=True).view(rows, *query.shape[1:])
    owner = torch.repeat_interleave(torch.arange(rows), lengths)
    sums = torch.zeros(rows, *query.shape[1:], dtype=torch.float32)
    return sums.index_add_(0, owner, query.float())


def whole_page_sums(view: PagedView, size: int) -> torch.Tensor:
    """See ``ops.sums.unit_sums``; ``size`` is a multiple of the page size."""
    return _grouped(view.pages.stats[KEY_SUM][_table(view, size)], size // view.page_size)


def part_page_sums(view: PagedView, size: int) -> torch.Tensor:
    """See ``ops.sums.unit_sums``; ``size`` divides the page size. Pages that lie side by side are not copied."""
    keys, heads, page, dim = view.pages.key_rows(), view.num_kv_heads, view.page_size, view.head_dim
    pages = view.rows.block_tables.shape[1]
    sums = torch.empty(view.rows.num_sequences, pages, heads, page // size, dim, device=view.pages.keys.device)
    for sequence, place, first, count in _runs(view, max(1, SLAB_BYTES // (heads * page * dim * 4))):
        if first is None:
            part = keys[view.rows.block_tables[sequence, place : place + count].long()]
        else:
            part = keys[first : first + count]
        split = part.view(count, heads, page // size, size, dim)
        torch.sum(split, 3, dtype=torch.float32, out=sums[sequence, place : place + count])
    return sums.transpose(2, 3).flatten(1, 2)


def _runs(view: PagedView, most: int) -> list[tuple[int, int, int | None, int]]:
    """``(sequence, logical page, physical page, pages)`` of what is read at a time; ``None`` where pages are scattered.

    At most ``most`` scattered pages come together, since they are copied.
    """
    key = ("runs", most)
    if key not in view.rows.plans:
        found: list[tuple[int, int, int | None, int]] = []
        for sequence, pages in enumerate(view.rows.host_block_tables):
            breaks = [place for place in range(1, len(pages)) if pages[place] != pages[place - 1] + 1]
            if (len(breaks) + 1) * MIN_PAGES_PER_RUN <= len(pages):
                edges = [0, *breaks, len(pages)]
                found += [(sequence, a, pages[a], b - a) for a, b in itertools.pairwise(edges)]
            else:
                found += [(sequence, a, None, min(most, len(pages) - a)) for a in range(0, len(pages), most)]
        view.rows.plans[key] = found
    runs: list[tuple[int, int, int | None, int]] = view.rows.plans[key]
    return runs


def cut_part_sums(view: PagedView, size: int, cuts: tuple[int, ...], ends: tuple[int, ...]) -> torch.Tensor:
    """See ``ops.sums.cut_sums``; ``size`` divides the page size."""
    whole = part_page_sums(view, size)[:, : _units(cuts, size)]
    cut, end = torch.tensor([cuts, ends])[..., None]
    unit = torch.arange(whole.shape[1])
    # What lies behind the cut may never have been written.
    sums = torch.where((unit < cut // size)[..., None, None], whole, 0.0)
    first = cut // size * size
    edges = chunk_sums(view, torch.cat([first, cut], 1), torch.cat([cut - first, end - cut], 1))
    place = (cut // size).clamp(max=whole.shape[1] - 1)[..., None, None]
    sums.scatter_add_(1, place.expand(-1, -1, *sums.shape[2:]), edges[:, :1])
    return torch.cat([sums, edges[:, 1:]], 1)


def chunk_sums(view: PagedView, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """See ``ops.sums.chunk_sums``; on a CPU, since the number of keys is asked for."""
    keys, heads, page, dim = view.pages.key_rows(), view.num_kv_heads, view.page_size, view.head_dim
    sums = torch.zeros(*start.shape, heads, dim)
    flat_sums, lengths, starts = sums.view(-1, heads * dim), length.flatten().long(), start.flatten().long()
    sequence = torch.arange(start.shape[0]).repeat_interleave(start.shape[1])
    ends = torch.cumsum(lengths, 0)
    total, step = int(ends[-1]) if len(ends) else 0, max(1, SLAB_BYTES // (heads * dim * 4))
    for first in range(0, total, step):
        place = torch.arange(first, min(first + step, total))
        run = torch.searchsorted(ends, place, right=True)
        position = starts[run] + place - (ends - lengths)[run]
        row = view.rows.block_tables[sequence[run], position // page].long() * heads * page + position % page
        found = keys.flat((row[:, None] + torch.arange(heads) * page).flatten())
        flat_sums.index_add_(0, run, found.view(len(place), heads * dim).float())
    return sums


def regular_ranges(view: PagedView, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(start, length)`` ``[S, U]`` int32 of the units of a view, cut off at each context."""
    key = ("regular_ranges", size)
    if key not in view.rows.plans:
        device = view.rows.block_tables.device
        units = view.rows.block_tables.shape[1] * view.page_size // size
        start = torch.arange(units, device=device, dtype=torch.int32).expand(view.rows.num_sequences, -1) * size
        view.rows.plans[key] = start, (view.rows.context_lens[:, None] - start).clamp(0, size)
    found: tuple[torch.Tensor, torch.Tensor] = view.rows.plans[key]
    return found


def cut_ranges(
    view: PagedView, size: int, cuts: tuple[int, ...], ends: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(start, length)`` ``[S, U + 1]`` int32 of the units before each cut, and of what lies behind it."""
    key = ("cut_ranges", size, cuts, ends)
    if key not in view.rows.plans:
        device = view.rows.block_tables.device
        cut, end = torch.tensor([cuts, ends], dtype=torch.int32).to(device, non_blocking=True)[..., None]
        start = torch.arange(_units(cuts, size), device=device, dtype=torch.int32) * size
        length = (cut - start).clamp(0, size)
        view.rows.plans[key] = (
            torch.cat([start.expand(len(cuts), -1), cut], 1),
            torch.cat([length, end - cut], 1),
        )
    found: tuple[torch.Tensor, torch.Tensor] = view.rows.plans[key]
    return found


def cut_page_sums(view: PagedView, size: int, cuts: tuple[int, ...], ends: tuple[int, ...]) -> torch.Tensor:
    """See ``ops.sums.cut_sums``; ``size`` is a multiple of the page size."""
    key = ("cut_page_sums", size, cuts, ends)
    if key not in view.rows.plans:
        view.rows.plans[key] = _cut_plan(view, size, cuts, ends)
    pages, before, behind, edges, in_unit, in_rest, unit = view.rows.plans[key]
    statistic = view.pages.stats[KEY_SUM][pages]
    sums = _grouped(torch.where(before, statistic, 0.0), size // view.page_size)[:, : _units(cuts, size)]
    keys = view.pages.key_rows()[edges].float()  # [S, 2, G, page, D]
    # Unwritten slots may hold NaN, so they are not multiplied by 0.
    sums.scatter_add_(1, unit.expand(-1, -1, *sums.shape[2:]), torch.where(in_unit, keys, 0.0).sum((1, 3))[:, None])
    rest = torch.where(in_rest, keys, 0.0).sum((1, 3))
    if behind is not None:
        rest = rest + torch.where(behind, statistic, 0.0).sum(1)
    return torch.cat([sums, rest[:, None]], 1)


def _cut_plan(view: PagedView, size: int, cuts: tuple[int, ...], ends: tuple[int, ...]) -> tuple[object, ...]:
    """What ``cut_page_sums`` reads, the same in every layer of a step.

    ``pages`` ``[S, N]``; which of them lie whole before the cut, and whole behind it (``None`` if
    none does) ``[S, N, 1, 1]``; the two pages ``[S, 2]`` in which the cut and the end lie; which of
    their keys belong to the cut unit and to the rest ``[S, 2, 1, page, 1]``; the cut unit's place.
    """
    page, device = view.page_size, view.rows.block_tables.device
    pages = _table(view, size)
    pages = pages[:, : max(-(-max(ends) // size), 1) * size // page]
    cut, end = torch.tensor([cuts, ends]).to(device, non_blocking=True)
    first, last = cut // page, end // page
    logical = torch.arange(pages.shape[1], device=device)
    before = logical < first[:, None]
    behind = (logical > first[:, None]) & (logical < last[:, None])
    edge = torch.stack([first, last], 1)
    position = edge[..., None] * page + torch.arange(page, device=device)
    position[:, 1].masked_fill_((edge[:, 0] == edge[:, 1])[:, None], -1)  # one page, read once
    # At the end of the last page there is no next one: no key of the page read instead has such a position.
    edge = edge.clamp(max=pages.shape[1] - 1)
    in_unit = (position >= 0) & (position < cut[:, None, None])
    in_unit[:, 1] = False
    in_rest = (position >= cut[:, None, None]) & (position < end[:, None, None])
    several = any(end // page > cut // page + 1 for cut, end in zip(cuts, ends, strict=True))
    return (
        pages,
        before[..., None, None],
        behind[..., None, None] if several else None,
        pages.gather(1, edge),
        in_unit[:, :, None, :, None],
        in_rest[:, :, None, :, None],
        (edge[:, :1] * page // size).clamp(max=_units(cuts, size) - 1)[..., None, None],
    )


def _units(cuts: tuple[int, ...], size: int) -> int:
    return max(-(-max(cuts) // size), 1)


def _table(view: PagedView, size: int) -> torch.Tensor:
    """``[S, N]`` int64 block tables, padded to whole units by page 0."""
    table = view.rows.block_tables.long()
    return torch.nn.functional.pad(table, (0, -table.shape[1] % (size // view.page_size)))


def _grouped(statistic: torch.Tensor, pages: int) -> torch.Tensor:
    """Sums of ``pages`` neighbours of ``[S, N, G, D]``."""
    return statistic if pages == 1 else torch.unflatten(statistic, 1, (-1, pages)).sum(2)
