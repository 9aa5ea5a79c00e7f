"""Float32 truth for sums over runs of keys: one sequence and one run at a time."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from .reference import gather_sequence


def chunk_sums(view: PagedView, start: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """See ``ops.sums.chunk_sums``."""
    sums = torch.zeros(*start.shape, view.num_kv_heads, view.head_dim, device=start.device)
    for sequence in range(start.shape[0]):
        keys = gather_sequence(view, sequence)[0].float()
        for run, (first, count) in enumerate(zip(start[sequence].tolist(), length[sequence].tolist(), strict=True)):
            sums[sequence, run] = keys[:, first : first + count].sum(1)
    return sums


def cut_sums(view: PagedView, size: int, cuts: tuple[int, ...], ends: tuple[int, ...]) -> torch.Tensor:
    """See ``ops.sums.cut_sums``."""
    units = max(-(-max(cuts) // size), 1)
    sums = torch.zeros(len(cuts), units + 1, view.num_kv_heads, view.head_dim, device=view.pages.keys.device)
    for sequence, (cut, end) in enumerate(zip(cuts, ends, strict=True)):
        keys = gather_sequence(view, sequence)[0].float()
        for unit in range(-(-cut // size)):
            sums[sequence, unit] = keys[:, unit * size : min((unit + 1) * size, cut)].sum(1)
        sums[sequence, units] = keys[:, cut:end].sum(1)
    return sums


def unit_sums(view: PagedView, size: int) -> torch.Tensor:
    """See ``ops.sums.unit_sums``."""
    units = -(-view.rows.block_tables.shape[1] * view.page_size // size)
    start = torch.arange(units, device=view.pages.keys.device).expand(view.rows.num_sequences, -1) * size
    length = (view.rows.context_lens[:, None] - start).clamp(0, size)
    return chunk_sums(view, start, length)
