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
    group = heads // view.num_kv_heads
    out = torch.zeros(tokens, heads, dim, dtype=torch.float32, device=query.device)
    lse = torch.zeros(tokens, heads, dtype=torch.float32, device=query.device)
    kept = torch.zeros(tokens, heads, dtype=torch.int32, device=query.device)
    start = 0
    for sequence, visible in enumerate(visible_mask(view, None, spec, heads)):
        part = slice(start, start + visible.shape[1])
        start = part.stop
        keys, values = (x.float().repeat_interleave(group, dim=0) for x in gather_sequence(view, sequence))
        logits = torch.einsum("qhd,hkd->hqk", query[part].float(), keys) * spec.scale
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        theta = plan.theta[part].T.float()[..., None]
        # What is not a number is read too, and tells on the output.
        read = _read(~(logits <= theta), visible, plan, group)
        peak = logits.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True)
        # A query that sees nothing has peak -inf, and -inf - -inf is NaN.
        shift = peak.masked_fill(peak == float("-inf"), 0.0)
        weights = torch.exp(logits - shift).masked_fill(~visible, 0.0)
        total = (weights * read).sum(-1, keepdim=True)
        dropped = _dropped_sum(weights, visible & ~read, theta - shift, plan, part) * plan.dropped_scale
        denominator = total + dropped
        if spec.sinks is not None:
            # The sink may lie far above every logit: both sides of the fraction are scaled down by it.
            sink = spec.sinks.float()[:, None, None] - shift
            down = torch.exp(-sink.clamp(min=0.0))
            weights, dropped = weights * down, dropped * down
            denominator = denominator * down + torch.exp(sink.clamp(max=0.0))
        # Nothing read and nothing that stands for the rest: zero.
        denominator = denominator.masked_fill(denominator == 0, 1.0)
        weights = weights * read / denominator
        out[part] = torch.einsum("hqk,hkd->qhd", weights, values)
        if plan.value_mean:
            mean = torch.einsum("hqk,hkd->qhd", visible / visible.sum(-1, keepdim=True).clamp(min=1), values)
            out[part] += (dropped / denominator).transpose(0, 1) * mean
        lse[part] = (shift + total.log())[..., 0].T
        kept[part] = read.sum(-1, dtype=torch.int32).T
    return out.to(query.dtype), lse, kept


def _read(above: torch.Tensor, visible: torch.Tensor, plan: ScoreThreshold, group: int) -> torch.Tensor:
    """Bool ``[H, queries, context]``: the keys read, from those above the threshold."""
    heads, count, context = above.shape
    if plan.union:
        above = above.view(heads // group, group, count, context).any(1).repeat_interleave(group, dim=0)
    positions = torch.arange(context - count, context, device=above.device)[:, None]
    columns = torch.arange(context, device=above.device)
    always = (columns < plan.sink_tokens) | (positions - columns < plan.recent_tokens)
    return (above | always) & visible


def _dropped_sum(
    weights: torch.Tensor, dropped: torch.Tensor, theta: torch.Tensor, plan: ScoreThreshold, part: slice
) -> torch.Tensor:
    """``[H, queries, 1]``: what stands for the ``dropped`` keys, in units of the largest visible weight."""
    if plan.dropped_sum == "exact":
        return (weights * dropped).sum(-1, keepdim=True)
    count = dropped.sum(-1, keepdim=True)
    if plan.dropped_sum == "bound":
        each = torch.exp(theta) * count
    elif plan.expected is not None:
        each = plan.expected[part].T.float()[..., None]
    else:
        each = torch.zeros_like(theta)
    # Where nothing is left out there is nothing to make up for, whatever was expected.
    return torch.where(count > 0, each, 0.0)
