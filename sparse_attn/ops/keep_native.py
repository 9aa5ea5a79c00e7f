"""What is read beside a selection, added to it, and its reads counted, on a CPU by the kernels of ``native/``."""

from __future__ import annotations

import torch

from ..selection import Band, Selection
from .attention_native import opened
from .native import NO_END, SelectionCall, library


def supports(indices: torch.Tensor) -> bool:
    """Were the kernels compiled, and is the selection on the CPU?"""
    return indices.device.type == "cpu" and library() is not None


# The units ``0`` to ``sinks - 1`` and ``first`` to ``last`` of each row (``[R]`` int32), and the most that they are; an
# empty run has ``last < first``.
Runs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]


def keep(selection: Selection, sinks: torch.Tensor, first: torch.Tensor, last: torch.Tensor, most: int) -> Selection:
    """The units of such ``Runs`` beside those selected."""
    indices = selection.indices.contiguous()
    rows, kinds, width = indices.shape
    kept = torch.empty((rows, kinds, width + most), dtype=torch.int32)
    counts = torch.empty((rows, kinds), dtype=torch.int32)
    opened().keep(prepared(indices, (sinks, first, last, most), kept, counts))
    return Selection(kept, counts, selection.granularity, selection.tiles)


def prepared(indices: torch.Tensor, runs: Runs, kept: torch.Tensor, counts: torch.Tensor) -> SelectionCall:
    """The call of ``keep`` for dense ``indices [R, K, M]``: into ``kept [R, K, M + most]`` and ``counts [R, K]``."""
    sinks, first, last, _ = runs
    rows, kinds, width = indices.shape
    return SelectionCall(
        indices=indices.data_ptr(),
        sinks=sinks.data_ptr(),
        first=first.data_ptr(),
        last=last.data_ptr(),
        kept=kept.data_ptr(),
        counts=counts.data_ptr(),
        rows=rows,
        kinds=kinds,
        width=width,
        kept_width=kept.shape[2],
    )


def pairs(selection: Selection, sequences: int, band: Band) -> torch.Tensor:
    """``[S]`` float64: (query, key) pairs that a selection reads within a band, summed over its rows of heads."""
    indices, tiles = selection.indices.contiguous(), selection.tiles
    rows, kinds, width = indices.shape
    total = torch.zeros(sequences, dtype=torch.float64)
    call = SelectionCall(
        indices=indices.data_ptr(),
        tile_sequence=tiles.sequence.data_ptr(),
        tile_count=tiles.query_count.data_ptr(),
        tile_position=tiles.position.data_ptr(),
        pairs=total.data_ptr(),
        rows=rows,
        kinds=kinds,
        width=width,
        granularity=selection.granularity,
        nearest=band.nearest,
        farthest=NO_END if band.farthest is None else band.farthest,
    )
    opened().pairs(call)
    return total
