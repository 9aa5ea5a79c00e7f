"""Float32 truth for ``page_bounds``: the definition, one tile at a time."""

from __future__ import annotations

import torch

from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
from foveate.kv_cache.view import PagedView

from ..selection import Tiles


def page_bounds(query: torch.Tensor, view: PagedView, tiles: Tiles) -> torch.Tensor:
    """See ``ops.page_bounds``."""
    heads = query.shape[1]
    group = heads // view.num_kv_heads
    pages = view.rows.block_tables.shape[1]
    bounds = torch.full((len(tiles), heads, pages), float("-inf"), device=query.device)
    for row, (sequence, start, count, _) in enumerate(tiles.host):
        used = -(-view.rows.host_context_lens[sequence] // view.page_size)
        table = view.rows.block_tables[sequence, :used].long()
        low, high = (
            view.pages.stats[stat][table].repeat_interleave(group, dim=1).transpose(0, 1) for stat in (KEY_MIN, KEY_MAX)
        )
        rows = query[start : start + count].float()[:, :, None]
        bounds[row, :, :used] = torch.maximum(rows * low, rows * high).sum(-1).amax(0)
    return bounds
