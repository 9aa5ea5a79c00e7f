"""Tiles in slabs, so that what is made for each tile takes a bounded amount of memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from .protocol import Phase
from .selection import Tiles


def by_sequence(tiles: Tiles, most: int, phase: Phase) -> Iterator[tuple[slice, int | slice, str]]:
    """Slabs of at most ``most`` tiles whose units are those of one sequence, or, in decode, of one sequence each.

    Yields:
        ``(rows, owner, product)``: the slab's tiles; what selects their units from a tensor
        ``[S, units, heads, D]``; and the ``einsum`` of queries ``[rows, heads, n, D]`` with these,
        whose result is ``[rows, heads, n, units]``.
    """
    if phase is Phase.DECODE:  # one tile per sequence
        for begin in range(0, len(tiles), most):
            part = slice(begin, begin + most)
            yield part, part, "rkhd,rckd->rkhc"
        return
    stop = 0
    for sequence, run in groupby(tiles.host, lambda tile: tile[0]):
        begin, stop = stop, stop + len(list(run))
        for first in range(begin, stop, most):
            yield slice(first, min(first + most, stop)), sequence, "rkhd,ckd->rkhc"
