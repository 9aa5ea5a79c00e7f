"""How many keys a step read, beside what dense attention would have read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foveate.kv_cache.view import Rows

from .ops import keep_native
from .protocol import LayerCall, StepGroup, StepState
from .selection import Band, Segment, Selection


def book(
    segments: Sequence[Segment],
    kept: Sequence[torch.Tensor | None],
    layer: LayerCall,
    step: StepState,
    group: StepGroup,
    heads: int,
) -> None:
    """Adds one group's reads in one layer to ``step.keys_read``.

    A read is one (query, key) pair of one head. Behind a threshold every key is scored and only
    ``kept`` values are read, so a key counts half and its value the other half.

    Args:
        segments: What was read.
        kept: Per segment ``[T, H]``, the keys above a threshold, or ``None`` for another plan.
        layer: Which layer.
        step: Its ``keys_read`` is added to.
        group: Which sequences.
        heads: Query heads.
    """
    owners = group.owner_index(step.keys_read.device)
    step.keys_read.index_add_(0, owners, _fixed_pairs(segments, layer.spec.band, group.rows, heads, owners.device))
    read = step.keys_read[:, 0]
    for part, count in zip(segments, kept, strict=True):
        if count is not None:
            read.index_add_(0, owners, _by_sequence(count, group.rows), alpha=0.5)
        elif isinstance(part.keys, Selection):
            read.index_add_(0, owners, _pairs_of(part.keys, group, part.band, heads))


def _fixed_pairs(segments: Sequence[Segment], band: Band, rows: Rows, heads: int, device: torch.device) -> torch.Tensor:
    """``[S, 2]``: what is read whatever was chosen, and what dense attention reads; worked out once per step."""
    whole = tuple((part.band, part.keys is None) for part in segments if not isinstance(part.keys, Selection))
    key = ("fixed_pairs", band, whole, heads)
    if key not in rows.plans:
        dense = _band_pairs(rows, band, heads, device)
        read = torch.zeros_like(dense)
        for within, every in whole:
            read += _band_pairs(rows, within, heads, device) * (1.0 if every else 0.5)
        rows.plans[key] = torch.stack([read, dense], dim=1)
    found: torch.Tensor = rows.plans[key]
    return found


def _pairs_of(selection: Selection, group: StepGroup, band: Band, heads: int) -> torch.Tensor:
    """``selected_pairs``, kept where several layers read it; then its id stays its own as long as the group lives."""
    key = ("selected_pairs", id(selection), band)
    found: torch.Tensor | None = group.rows.plans.get(key)
    if found is None:
        found = selected_pairs(selection, group.rows, band, heads)
        if any(selection is carried for carried in group.carried.values()):
            group.rows.plans[key] = found
    return found


def selected_pairs(selection: Selection, rows: Rows, band: Band, heads: int) -> torch.Tensor:
    """``[S]`` float64: (query, key) pairs that a selection reads within a band, over ``heads`` query heads."""
    if keep_native.supports(selection.indices):
        return keep_native.pairs(selection, rows.num_sequences, band) * (heads / selection.indices.shape[1])
    seen = _pairs_behind(selection, band.nearest)
    if band.farthest is not None:
        seen -= _pairs_behind(selection, max(band.farthest, band.nearest))
    seen.masked_fill_(selection.indices < 0, 0)
    pairs = seen.sum(dim=(1, 2)).double() * (heads / selection.indices.shape[1])
    total = torch.zeros(rows.num_sequences, dtype=torch.float64, device=pairs.device)
    return total.index_add_(0, selection.tiles.sequence.long(), pairs)


def _pairs_behind(selection: Selection, distance: int) -> torch.Tensor:
    """Per entry of a selection, the pairs of a query of its tile and a key of its unit, ``distance`` or more apart.

    The key at place ``k`` has ``min(count, end - k)`` such queries, with ``end`` the tile's end less the
    distance; over a unit that is the difference of two sums of ``min(count, x)`` from 1 to x.
    """
    tiles, size = selection.tiles, selection.granularity
    first, count = tiles.position[:, None, None], tiles.query_count[:, None, None]
    if tiles.size == 1:  # many rows: in 32 bits, and without the sums
        return (first + 1 - distance - selection.indices * size).clamp_(0, size)
    if size == 1:
        return torch.minimum((first + count - distance - selection.indices).clamp_(min=0), count)
    end = (first + count - distance).long() - selection.indices.long() * size

    def up_to(x: torch.Tensor) -> torch.Tensor:
        x = x.clamp(min=0)
        ramp = torch.minimum(x, count)
        return ramp * (ramp + 1) // 2 + (x - ramp) * count

    return up_to(end) - up_to(end - size)


def _by_sequence(counts: torch.Tensor, rows: Rows) -> torch.Tensor:
    """``[S]`` float64 sums of ``counts`` ``[T, H]``."""
    of_query = counts.sum(1, dtype=torch.float64)
    if rows.num_queries == rows.num_sequences and 0 not in rows.host_query_lens:  # decode: one each
        return of_query
    ends = torch.cumsum(of_query, 0)
    before = torch.cat([ends.new_zeros(1), ends])
    offsets = rows.query_offsets.long()
    return before[offsets[1:]] - before[offsets[:-1]]


def _band_pairs(rows: Rows, band: Band, heads: int, device: torch.device) -> torch.Tensor:
    """``[S]`` float64: visible (query, key) pairs of each sequence, times ``heads``."""
    known = rows.plans.get(("band_pairs", band, heads))
    if known is None:
        pairs = [
            heads * sum(band.visible(position) for position in range(context - count, context))
            for context, count in zip(rows.host_context_lens, rows.host_query_lens, strict=True)
        ]
        known = rows.plans["band_pairs", band, heads] = torch.tensor(pairs, dtype=torch.float64).to(
            device, non_blocking=True
        )
    pairs_of: torch.Tensor = known
    return pairs_of
