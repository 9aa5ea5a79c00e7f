"""The last layer, of which only that is wanted from which logits will be made.

Of the tokens in the middle of a prompt nobody asks what comes next: the last layer has to write their keys and values,
and that is all. No other layer can be spared so, since the next one makes keys of what it leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from foveate.sparse_attn.protocol import StepGroup, StepState

from .decoder_layer import FusedLayer


def last(layer: FusedLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: StepState) -> torch.Tensor:
    """As ``layer.compute``; rows of groups that are not ``wanted`` stay as they are, and no read of theirs is booked.

    Args:
        layer: Behind which no layer comes.
        x: ``[T, E]``, left as it is.
        cos: ``[B, L, R]`` of T rows.
        sin: Likewise.
        step: Its groups say what is wanted. A sequence's last tokens are, if any of it.

    Returns:
        ``[T, E]``.
    """
    wanted = [group for group in step.groups if group.wanted]
    if len(wanted) == len(step.groups):
        return layer.compute(x, cos, sin, step)
    cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
    rest = _rows_of([group for group in step.groups if not group.wanted])
    # First these: a sequence's last tokens read them, and statistics of a page are added up in the order of its tokens.
    layer.write(x[rest], cos[rest], sin[rest], step, step.slots[rest])
    if not wanted:
        return x
    rows = _rows_of(wanted)
    part = replace(step, slots=step.slots[rows], positions=step.positions[rows], groups=_side_by_side(wanted))
    out = x.clone()
    out[rows] = layer.compute(x[rows], cos[None, rows], sin[None, rows], part)
    return out


def _rows_of(groups: Sequence[StepGroup]) -> torch.Tensor | slice:
    """Where their queries are in the packed row; a slice, which copies nothing, where that is one piece."""
    pieces = [range(group.start, group.start + group.rows.num_queries) for group in groups]
    if all(before.stop == after.start for before, after in pairwise(pieces)):
        return slice(pieces[0].start, pieces[-1].stop)
    return torch.tensor([row for piece in pieces for row in piece])


def _side_by_side(groups: Sequence[StepGroup]) -> tuple[StepGroup, ...]:
    """The same, as if there were no others; what anchors chose stays theirs."""
    placed: list[StepGroup] = []
    start = 0
    for group in groups:
        placed.append(replace(group, start=start))
        start += group.rows.num_queries
    return tuple(placed)
