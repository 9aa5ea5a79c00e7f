"""Float32 truth for ``gate_blocks``: means from the keys themselves, every score at once."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from .reference import gather_pages


def gate_blocks(
    query: torch.Tensor,
    view: PagedView,
    block_tokens: int,
    top_k: int,
    candidates: tuple[torch.Tensor, torch.Tensor],
    pooled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.gate_blocks``."""
    kv_heads = view.num_kv_heads
    group = query.shape[1] // kv_heads
    rows = view.rows
    kinds = kv_heads if pooled else query.shape[1]
    indices = torch.full((query.shape[0], kinds, top_k), -1, dtype=torch.int32, device=query.device)
    start = 0
    for sequence, (context, count) in enumerate(zip(rows.host_context_lens, rows.host_query_lens, strict=True)):
        part = slice(start, start + count)
        start += count
        blocks = -(-context // block_tokens)
        own = torch.arange(context - count, context, device=query.device) // block_tokens
        block = torch.arange(blocks, device=query.device)
        first, end = (edge[part, None] for edge in candidates)
        keys = gather_pages(view.pages.key_rows(), view, sequence).float()
        edges = range(0, context, block_tokens)
        means = torch.stack([keys[:, edge : edge + block_tokens].mean(1) for edge in edges], dim=1)
        gates = torch.einsum("qhd,hud->qhu", query[part].float(), means.repeat_interleave(group, dim=0))
        if pooled:
            gates = gates.view(count, kv_heads, group, blocks).sum(2)
        gates = gates.masked_fill(~((block >= first) & (block < end))[:, None], float("-inf"))
        # From the last block to the first, so that a stable sort puts the later of equals ahead.
        best = blocks - 1 - gates.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., : top_k - 1]
        chosen = torch.zeros_like(gates, dtype=torch.bool).scatter_(2, best, True) & (gates > float("-inf"))
        chosen |= (block == own[:, None])[:, None]
        places = torch.where(chosen, block, blocks).sort(dim=-1).values[..., :top_k]
        indices[part, :, : places.shape[-1]] = torch.where(places < blocks, places, -1).int()
    return indices, (indices >= 0).sum(-1, dtype=torch.int32)
