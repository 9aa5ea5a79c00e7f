"""Page bounds on a CPU, in torch: two matrix products instead of a maximum per channel.

``max(q * low, q * high)`` is ``q * high`` where ``q > 0`` and ``q * low`` elsewhere, so the sum over
channels is ``max(q, 0) . high + min(q, 0) . low``.
"""

from __future__ import annotations

import torch

from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
from foveate.kv_cache.view import PagedView

from ..selection import Tiles

# Statistics gathered at once, where they are of more than one sequence.
_SLAB_BYTES = 64 * 2**20


def page_bounds(query: torch.Tensor, view: PagedView, tiles: Tiles) -> torch.Tensor:
    """See ``ops.page_bounds``.

    Beside the result it holds the statistics of one sequence, or of several up to 64 MiB, and the
    bounds of one tile's queries.
    """
    (_, heads, dim), kv_heads = query.shape, view.num_kv_heads
    group, pages = heads // kv_heads, view.rows.block_tables.shape[1]
    bounds = torch.empty(len(tiles), heads, pages, dtype=torch.float32)
    if tiles.size == 1:
        step = max(1, _SLAB_BYTES // (2 * pages * kv_heads * dim * 4))
        for first in range(0, len(tiles), step):
            rows = slice(first, first + step)
            low, high = _extremes(view, tiles.sequence[rows])
            asked = query[tiles.query_start[rows].long()].float()
            bounds[rows] = _product(asked.reshape(-1, group, dim), low, high).view(-1, heads, pages)
    else:
        held = None
        for row, (sequence, start, count, _) in enumerate(tiles.host):
            if held is None or held[0] != sequence:
                held = sequence, _extremes(view, tiles.sequence[row : row + 1])
            asked = query[start : start + count].float().view(count, kv_heads, group, dim).transpose(0, 1)
            found = _product(asked.reshape(kv_heads, count * group, dim), *held[1])
            bounds[row] = found.view(kv_heads, count, group, pages).amax(1).view(heads, pages)
    begins = torch.arange(pages, dtype=torch.int32) * view.page_size
    unused = begins >= view.rows.context_lens[tiles.sequence.long()][:, None]
    # A page without keys holds infinities, or what an earlier owner left.
    return bounds.masked_fill_(unused[:, None], float("-inf"))


def _extremes(view: PagedView, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(low, high)``, each ``[sequences * G, N, D]``."""
    pages = view.rows.block_tables[sequences.long()].long()
    places = pages[:, None] * view.num_kv_heads + torch.arange(view.num_kv_heads)[:, None]

    def gather(kept: torch.Tensor) -> torch.Tensor:
        return kept.flatten(0, 1)[places.flatten(0, 1)]

    return gather(view.pages.stats[KEY_MIN]), gather(view.pages.stats[KEY_MAX])


def _product(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Bounds ``[B, n, N]`` of queries ``[B, n, D]`` over pages ``[B, N, D]``."""
    above = torch.bmm(rows.clamp(min=0), high.transpose(1, 2))
    return torch.baddbmm(above, rows.clamp(max=0), low.transpose(1, 2))
