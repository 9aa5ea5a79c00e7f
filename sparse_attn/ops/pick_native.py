"""Choosing the best units, and the tokens of the best chunks, on a CPU by the compiled kernels of ``native/``."""

from __future__ import annotations

from typing import Any

import torch

from .attention_native import opened
from .native import PickCall, library

Picked = tuple[torch.Tensor, torch.Tensor]


def supports(scores: torch.Tensor) -> bool:
    """Were the kernels compiled, and do they take these scores? They take float32 on the CPU."""
    return scores.device.type == "cpu" and scores.dtype is torch.float32 and library() is not None


def top_units(
    scores: torch.Tensor,
    candidates: tuple[torch.Tensor, torch.Tensor],
    limits: torch.Tensor,
    width: int,
    higher_ties: bool,
) -> Picked:
    """See ``topk.top_units``; ``limits`` are ``[R]`` int64."""
    first, end = (part.to(torch.int32).contiguous() for part in candidates)
    call = PickCall(first=first.data_ptr(), end=end.data_ptr(), higher_ties=higher_ties)
    return _run(opened().pick_units, call, scores, limits, width)


def walk_chunks(
    scores: torch.Tensor, start: torch.Tensor, length: torch.Tensor, room: torch.Tensor, width: int
) -> Picked:
    """See ``walk.walk_chunks``."""
    start, length = start.long().contiguous(), length.long().contiguous()
    call = PickCall(start=start.data_ptr(), length=length.data_ptr())
    return _run(opened().pick_walk, call, scores, room, width)


def _run(function: Any, call: PickCall, scores: torch.Tensor, limits: torch.Tensor, width: int) -> Picked:
    rows, kinds, units = scores.shape
    scores, limits = scores.contiguous(), limits.long().contiguous()
    indices = torch.empty((rows, kinds, width), dtype=torch.int32)
    counts = torch.empty((rows, kinds), dtype=torch.int32)
    call.scores, call.limit = scores.data_ptr(), limits.data_ptr()
    call.indices, call.counts = indices.data_ptr(), counts.data_ptr()
    call.rows, call.kinds, call.units, call.width = rows, kinds, units, width
    call.num_threads = torch.get_num_threads()
    if function(call):
        raise MemoryError("no memory to choose by scores")
    return indices, counts
