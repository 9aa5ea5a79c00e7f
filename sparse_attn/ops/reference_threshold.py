"""Float32 truth for ``thresholded``."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import ScoreThreshold
from .reference import gather_sequence, visible_mask


def thresholded(
    query: torch.Tensor, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``ops.thresholded``."""
    tokens, heads, dim = query.shape
    kv_heads = view.num_kv_heads
    group = heads // kv_heads
    out = torch.zeros(tokens, heads, dim, dtype=torch.float32, device=query.device)
    lse = torch.zeros(tokens, heads, dtype=torch.float32, device=query.device)
    kept = torch.zeros(tokens, heads, dtype=torch.int32, device=query.device)
    start = 0
    for sequence, visible in enumerate(visible_mask(view, None, spec, heads)):
        count, context = visible.shape[1:]
        part = slice(start, start + count)
        start += count
        keys, values = (x.float().repeat_interleave(group, dim=0) for x in gather_sequence(view, sequence))
        logits = torch.einsum("qhd,hkd->hqk", query[part].float(), keys) * spec.scale
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        theta = plan.theta[part].T.float()[..., None]
        read = logits > theta
        if plan.union:
            read = read.view(kv_heads, group, count, context).any(1).repeat_interleave(group, dim=0)
        positions = torch.arange(context - count, context, device=query.device)[:, None]
        columns = torch.arange(context, device=query.device)
        always = (columns < plan.sink_tokens) | (positions - columns <= plan.window_tokens)
        read = (read | always) & visible
        logits = logits.masked_fill(~visible, float("-inf"))
        total = torch.logsumexp(logits.masked_fill(~read, float("-inf")), dim=-1, keepdim=True)
        if plan.dropped_sum == "exact":
            dropped = torch.logsumexp(logits.masked_fill(read, float("-inf")), dim=-1, keepdim=True)
        elif plan.dropped_sum == "bound":
            dropped = (visible & ~read).sum(-1, keepdim=True).float().log() + theta
        elif plan.expected is not None:
            dropped = plan.expected[part].T.float()[..., None]
        else:
            dropped = torch.full_like(total, float("-inf"))
        # Where nothing is left out there is nothing to make up for, whatever was expected.
        nothing = (visible & ~read).sum(-1, keepdim=True) == 0
        dropped = torch.where(nothing, float("-inf"), dropped + torch.tensor(plan.dropped_scale).log())
        denominator = torch.logaddexp(total, dropped)
        if spec.sinks is not None:
            denominator = torch.logaddexp(denominator, spec.sinks.float()[:, None, None].expand_as(total))
        weights = torch.exp(logits - denominator).masked_fill(~read, 0.0).nan_to_num(0.0)
        out[part] = torch.einsum("hqk,hkd->qhd", weights, values)
        if plan.value_mean:
            mean = torch.einsum("hqk,hkd->qhd", visible / visible.sum(-1, keepdim=True).clamp(min=1), values)
            lost = torch.exp(dropped - denominator).nan_to_num(0.0)
            out[part] += lost.transpose(0, 1) * mean
        lse[part] = total[..., 0].T
        kept[part] = read.sum(-1, dtype=torch.int32).T
    return out.to(query.dtype), lse, kept
