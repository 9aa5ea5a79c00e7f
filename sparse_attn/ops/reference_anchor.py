"""Float32 truth for ``anchor_scores``: the whole attention matrix, one sequence at a time."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Tiles
from .reference import gather_sequence, visible_mask


def scores(
    query: torch.Tensor, view: PagedView, tiles: Tiles, spec: AttentionSpec, rows: range, pool_all: bool
) -> torch.Tensor:
    """See ``ops.anchor_scores``."""
    heads, kv_heads = query.shape[1], view.num_kv_heads
    probabilities = []  # per sequence [G or 1, heads pooled, queries, context]
    start = 0
    for sequence, mask in enumerate(visible_mask(view, None, spec, heads)):
        stop = start + mask.shape[1]
        keys = gather_sequence(view, sequence)[0].float().repeat_interleave(heads // kv_heads, dim=0)
        logits = torch.einsum("qhd,hkd->hqk", query[start:stop].float(), keys) * spec.scale
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        logits = logits.masked_fill(~mask, float("-inf"))
        total = torch.logsumexp(logits, dim=-1, keepdim=True)
        if spec.sinks is not None:
            total = torch.logaddexp(total, spec.sinks.float()[:, None, None].expand_as(total))
        weights = torch.exp(logits - total)
        probabilities.append(weights.view(1 if pool_all else kv_heads, -1, *weights.shape[1:]))
        start = stop
    ends = tiles.ends
    longest = max(ends[rows.start : rows.stop])
    pooled = torch.zeros(len(rows), 1 if pool_all else kv_heads, longest, device=query.device)
    for place, row in enumerate(rows):
        sequence, start, count, _ = tiles.host[row]
        first = start - sum(view.rows.host_query_lens[:sequence])
        asked = slice(first, first + (count - 1) * tiles.step + 1, tiles.step)
        own = probabilities[sequence][:, :, asked, : ends[row]]
        pooled[place, :, : ends[row]] = own.sum(dim=(1, 2))
    return pooled
