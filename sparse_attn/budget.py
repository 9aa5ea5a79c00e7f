"""What is read beside a scheme's own choice: sinks, the local window, the query's own tile, the prompt's tail.

All of it comes on top of the scheme's budget: measured, a budget that had to pay for sinks and
window first found 0 of 6 planted facts where the same free budget found 5.
"""

from __future__ import annotations

import torch

from .ops import keep_native
from .ops.keep_native import Runs
from .protocol import Phase, Scheme, SchemeOptions
from .selection import Plan, Selection, Tiles


def keep(plan: Plan, scheme: Scheme, phase: Phase) -> Plan:
    """Adds the units that a scheme's options keep to its plan.

    The window of a tile begins ``window_tokens`` before the tile's start, so each of its queries
    reads at least that many keys before itself. The tile's own tokens are added unless the
    scheme reads them in another segment.
    """
    options = scheme.options
    if not isinstance(plan, Selection):
        own = bool(options.window_tokens) or _keeps_own(scheme, phase)
        return plan.keeping(options.sink_tokens, options.window_tokens + own)
    selection = plan
    size = selection.granularity
    tiles = selection.tiles
    own = _keeps_own(scheme, phase)
    if not (own or options.window_tokens or options.sink_tokens):
        return selection
    if keep_native.supports(selection.indices):
        return keep_native.keep(selection, *_runs(tiles, size, options, own))
    heads = selection.indices.shape[1]
    parts = [selection.indices]
    # No wider than the longest context, or a large number would cost its width on short prompts.
    sinks = min(-(-options.sink_tokens // size), _longest(tiles) // size + 1)
    if sinks:
        first = torch.arange(sinks, device=selection.indices.device, dtype=torch.int32).expand(len(tiles), -1)
        last = (tiles.position + tiles.query_count - 1) // size
        kept = torch.where(first <= last[:, None], first, -1)
        parts.insert(0, kept[:, None, :].expand(-1, heads, -1))
    if own or options.window_tokens:
        kept = _own_units(tiles, size, options.window_tokens)
        if not own:  # then a decode query's window still begins right before it
            kept = torch.where(kept * size < _tile_start(tiles)[:, None], kept, -1)
        parts.append(kept[:, None, :].expand(-1, heads, -1))
    return _distinct(torch.cat(parts, dim=2), selection)


def kept_runs(tiles: Tiles, scheme: Scheme, size: int, phase: Phase) -> Runs | None:
    """What ``keep`` adds to a selection, as ``keep_native.keep`` takes it; ``None`` for nothing."""
    options, own = scheme.options, _keeps_own(scheme, phase)
    if not (own or options.window_tokens or options.sink_tokens):
        return None
    return _runs(tiles, size, options, own)


def _runs(tiles: Tiles, size: int, options: SchemeOptions, own: bool) -> Runs:
    """What ``keep`` adds to each row; worked out once per step."""
    key = ("kept", size, options.sink_tokens, options.window_tokens, own)
    if key not in tiles.plans:
        runs = []
        for *_, count, position in tiles.host:
            start, last = position // tiles.size * tiles.size, (position + count - 1) // size
            sinks = min(-(-options.sink_tokens // size), last + 1)
            first = max(start - options.window_tokens, 0) // size if own or options.window_tokens else last + 1
            runs.append((sinks, first, last if own else min(last, (start - 1) // size)))
        most = max((sinks + max(last - first + 1, 0) for sinks, first, last in runs), default=0)
        columns = torch.tensor(runs, dtype=torch.int32).reshape(-1, 3).unbind(1)
        tiles.plans[key] = *(column.contiguous() for column in columns), most
    found: Runs = tiles.plans[key]
    return found


def free_units(tiles: Tiles, scheme: Scheme, size: int, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
    """The units that are read only if the scheme chooses them: what its budget is for.

    Args:
        tiles: R tiles.
        scheme: Its options say what is kept anyway.
        size: Tokens per unit.
        phase: As given to the scheme.

    Returns:
        ``(first, end)`` ``[R]`` int32, candidates are the units ``first`` to ``end - 1``; none where
        ``end <= first``. No candidate lies behind the tile's first query.
    """
    options = scheme.options
    key = ("free", size, phase, options.sink_tokens, options.window_tokens, _keeps_own(scheme, phase))
    if key in tiles.plans:
        found: tuple[torch.Tensor, torch.Tensor] = tiles.plans[key]
        return found
    start = _tile_start(tiles)
    if options.window_tokens or _keeps_own(scheme, phase):
        end = (start - options.window_tokens).clamp(min=0) // size
    else:
        end = (start + size) // size if phase is Phase.DECODE else start // size
    first = torch.full_like(end, -(-options.sink_tokens // size))
    tiles.plans[key] = first, end
    return first, end


def _keeps_own(scheme: Scheme, phase: Phase) -> bool:
    return scheme.keeps_own_tile if phase is Phase.PREFILL else scheme.keeps_own_token


def _tile_start(tiles: Tiles) -> torch.Tensor:
    """``[R]`` where each tile begins, also where this chunk holds only its later part."""
    return tiles.position // tiles.size * tiles.size


def _longest(tiles: Tiles) -> int:
    """End of the tile that ends last, from host numbers."""
    return max((position + count for *_, count, position in tiles.host), default=0)


def _own_units(tiles: Tiles, size: int, window_tokens: int) -> torch.Tensor:
    """``[R, M]`` int32 units from the start of the window to the tile's last query, padded by -1."""
    first = (_tile_start(tiles) - window_tokens).clamp(min=0) // size
    last = (tiles.position + tiles.query_count - 1) // size
    # Longest possible span, from host numbers: no wait for the device.
    width = min((tiles.size + window_tokens - 2 + size) // size, _longest(tiles) // size) + 1
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
