"""Float32 truth for the attention ops: plain masks, one sequence at a time."""

from __future__ import annotations

import torch

from foveate.kv_cache.stored import StoredRows
from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection


def gather_sequence(
    view: PagedView, sequence: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[G, context, D]`` of one sequence, in order of position; int8 is read as ``dtype``."""
    keys, values = view.pages.key_rows(dtype), view.pages.value_rows(dtype)
    return gather_pages(keys, view, sequence), gather_pages(values, view, sequence)


def gather_pages(pool: StoredRows, view: PagedView, sequence: int) -> torch.Tensor:
    """Rows ``[G, context, D]`` of one sequence from ``pool``, the keys or the values of ``view``."""
    context = view.rows.host_context_lens[sequence]
    used = -(-context // view.page_size)
    pages = view.rows.block_tables[sequence, :used].long()
    return pool[pages].transpose(0, 1).flatten(1, 2)[:, :context]


def visible_mask(view: PagedView, selection: Selection | None, spec: AttentionSpec, heads: int) -> list[torch.Tensor]:
    """Per sequence, bool ``[H, queries, context]``: which keys each query reads."""
    device = view.pages.keys.device
    masks = []
    for context, count in zip(view.rows.host_context_lens, view.rows.host_query_lens, strict=True):
        positions = torch.arange(context - count, context, device=device)
        distance = positions[:, None] - torch.arange(context, device=device)
        mask = distance >= spec.band.nearest
        if spec.band.farthest is not None:
            mask &= distance < spec.band.farthest
        masks.append(mask.expand(heads, -1, -1).clone())
    if selection is not None:
        chosen = selection.to_mask(view.rows)
        chosen = chosen.repeat_interleave(heads // chosen.shape[1], dim=1)
        first = 0
        for row, (sequence, start, count, _) in enumerate(selection.tiles.host):
            first = sum(view.rows.host_query_lens[:sequence])
            context = view.rows.host_context_lens[sequence]
            masks[sequence][:, start - first : start - first + count] &= chosen[row, :, None, :context]
    return masks


def attention(
    query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.prefill``; decode is the case of one query per sequence."""
    tokens, heads, dim = query.shape
    group = heads // view.num_kv_heads
    out = torch.zeros(tokens, heads, dim, dtype=torch.float32, device=query.device)
    lse = torch.zeros(tokens, heads, dtype=torch.float32, device=query.device)
    start = 0
    for sequence, mask in enumerate(visible_mask(view, selection, spec, heads)):
        stop = start + mask.shape[1]
        keys, values = (part.float().repeat_interleave(group, dim=0) for part in gather_sequence(view, sequence))
        logits = torch.einsum("qhd,hkd->hqk", query[start:stop].float(), keys) * spec.scale
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        logits = logits.masked_fill(~mask, float("-inf"))
        total = torch.logsumexp(logits, dim=-1)
        denominator = total if spec.sinks is None else torch.logaddexp(total, spec.sinks.float()[:, None])
        unseen = denominator.isneginf()[..., None]  # -inf less -inf would be NaN; NaN of a key stays
        weights = torch.exp(logits - denominator[..., None]).masked_fill(unseen, 0.0)
        out[start:stop] = torch.einsum("hqk,hkd->qhd", weights, values)
        lse[start:stop] = total.T
        start = stop
    return out.to(query.dtype), lse
