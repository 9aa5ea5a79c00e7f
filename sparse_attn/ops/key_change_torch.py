"""``key_change`` in torch, and the gathering of keys by position that other boundary scores share."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from .reference_key_change import EPSILON
from .sums_torch import SLAB_BYTES


def token_keys(view: PagedView, sequence: int, start: int, stop: int) -> torch.Tensor:
    """Keys ``[stop - start, G * D]`` float32 of the positions from ``start`` on, heads concatenated."""
    page = view.page_size
    first = start // page
    pages = view.rows.block_tables[sequence, first : -(-stop // page)].long()
    rows = view.pages.key_rows()[pages].transpose(1, 2).flatten(0, 1).flatten(1)
    return rows[start - first * page : stop - first * page].float()


def key_change(view: PagedView, window: int, segment: int, segments: int) -> torch.Tensor:
    """See ``ops.key_change``."""
    width = view.num_kv_heads * view.head_dim
    scores = torch.full((view.rows.num_sequences, segments * segment), float("-inf"), device=view.pages.keys.device)
    # A slab ends where a segment does, or, within a long segment, takes the window before and behind it along.
    step = max(SLAB_BYTES // (4 * width), 4 * window)
    for sequence, context in enumerate(view.rows.host_context_lens):
        for first in range(0, min(segments * segment, context), segment):
            stop = min(first + segment, context)
            for begin in range(first, stop - 2 * window + 1, step):
                end = min(begin + step + 2 * window - 1, stop)
                change = _change(token_keys(view, sequence, begin, end), window)
                scores[sequence, begin + window - 1 : end - window] = change
    return scores.view(-1, segments, segment)


def _change(keys: torch.Tensor, window: int) -> torch.Tensor:
    """``[n - 2 * window + 1]`` for ``n`` keys ``[n, C]`` in a row."""
    count = len(keys) - window + 1
    sums = keys[:count].clone()
    for offset in range(1, window):
        sums += keys[offset : offset + count]
    sums /= window
    left, right = sums[:-window], sums[window:]
    across: torch.Tensor = torch.linalg.vecdot(left, right, dim=1)
    norms = torch.linalg.vector_norm(sums, dim=1).clamp_(min=EPSILON)
    return across.div_(norms[:-window] * norms[window:]).neg_().add_(1)
