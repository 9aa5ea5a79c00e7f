"""What is read beside a scheme's own choice: sinks, the local window, the query's own tile, the prompt's tail.

All of it comes on top of the scheme's budget: measured, a budget that had to pay for sinks and
window first found 0 of 6 planted facts where the same free budget found 5.
"""

from __future__ import annotations

import torch

from foveate.kv_cache.view import Rows

from .protocol import Scheme, SchemeOptions
from .selection import Band, Selection, Tiles


def keep(selection: Selection, scheme: Scheme) -> Selection:
    """Adds the units that a scheme's options keep to its selection.

    The window of a tile begins ``window_tokens`` before its first query, so each of its queries
    reads at least that many keys before itself. The tile's own tokens are added unless the
    scheme reads them in another segment.
    """
    options = scheme.options
    size = selection.granularity
    tiles = selection.tiles
    kept = [_own_units(tiles, size, options.window_tokens)] if scheme.keeps_own_tile else []
    sinks = -(-options.sink_tokens // size)
    if sinks:
        first = torch.arange(sinks, device=selection.indices.device, dtype=torch.int32).expand(len(tiles), -1)
        last = (tiles.position + tiles.query_count - 1) // size
        kept.append(torch.where(first <= last[:, None], first, -1))
    heads = selection.indices.shape[1]
    if not kept:
        return selection
    added = torch.cat(kept, dim=1)[:, None, :].expand(-1, heads, -1)
    return _distinct(torch.cat([selection.indices, added], dim=2), selection)


def _own_units(tiles: Tiles, size: int, window_tokens: int) -> torch.Tensor:
    """``[R, M]`` int32 units from the start of the window to the tile's last query, padded by -1."""
    first = (tiles.position - window_tokens).clamp(min=0) // size
    last = (tiles.position + tiles.query_count - 1) // size
    # Longest possible span, from host numbers: no wait for the device.
    width = (tiles.size + window_tokens - 2 + size) // size + 1
    units = first[:, None] + torch.arange(width, device=first.device, dtype=torch.int32)
    return torch.where(units <= last[:, None], units, -1)


def _distinct(indices: torch.Tensor, selection: Selection) -> Selection:
    """Sorts each row, drops repeats, pads by -1 at the end."""
    big = torch.iinfo(torch.int32).max
    ordered = torch.where(indices < 0, big, indices).sort(dim=2).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = ordered.masked_fill(repeated, big).sort(dim=2).values
    counts = (ordered < big).sum(dim=2, dtype=torch.int32)
    return Selection(torch.where(ordered == big, -1, ordered), counts, selection.granularity, selection.tiles)


def spans(start: int, stop: int, prompt_tokens: int, options: SchemeOptions) -> list[tuple[int, int, bool]]:
    """Cuts the positions ``start`` to ``stop - 1`` of a sequence where its prompt's dense tail begins and ends.

    Args:
        start: First position of a chunk.
        stop: End of the chunk; behind the prompt when a preempted sequence is computed again.
        prompt_tokens: Tokens of the prompt, whose ``options.dense_tail_tokens`` last read every key.
        options: The scheme's.

    Returns:
        ``(start, stop, dense)`` of each part that is not empty, in order.
    """
    tail = max(prompt_tokens - options.dense_tail_tokens, 0)
    cuts = [min(max(cut, start), stop) for cut in (0, tail, prompt_tokens)] + [stop]
    parts = zip(cuts, cuts[1:], (False, True, False), strict=False)
    return [(first, last, dense) for first, last, dense in parts if first < last]


def selected_pairs(selection: Selection, rows: Rows, band: Band, heads: int) -> torch.Tensor:
    """``[S]`` float64: (query, key) pairs that a selection reads within a band, over ``heads`` query heads."""
    tiles = selection.tiles
    size = selection.granularity
    offsets = torch.arange(size, device=selection.indices.device)
    keys = (selection.indices[..., None] * size + offsets).flatten(2).long()
    valid = (selection.indices >= 0).repeat_interleave(size, dim=2)
    first = tiles.position[:, None, None].long()
    last = first + tiles.query_count[:, None, None]
    begin = torch.maximum(first, keys + band.nearest)
    end = last if band.farthest is None else torch.minimum(last, keys + band.farthest)
    pairs = ((end - begin).clamp(min=0) * valid).sum(dim=(1, 2)).double() * (heads / selection.indices.shape[1])
    total = torch.zeros(rows.num_sequences, dtype=torch.float64, device=pairs.device)
    return total.index_add_(0, tiles.sequence.long(), pairs)
