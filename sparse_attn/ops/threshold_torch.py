"""Thresholded attention over pages on a CPU, in torch.

Decode is bound by bytes: all keys are read once, and of the values only those that some head of a
KV group keeps. A prompt is bound by arithmetic, where leaving out single keys saves nothing: it is
computed block by block with a mask over torch's flash attention, which is slower than dense.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from foveate.kv_cache.stored import StoredRows
from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Band, ScoreThreshold
from . import attention, attention_torch
from .reference import gather_sequence
from .value_mean import causal_value_mean

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Bytes of logits of one block of queries over all its keys; masks and weights take about three times as much again.
BLOCK_BYTES = 16 << 20
LOWEST = float("-inf")


@dataclass(slots=True, eq=False)
class _Parts:
    """Attention over the keys read, not yet compensated; ``[T, H]`` float32 but for ``out`` and ``kept``.

    Attributes:
        visible: ``[T, 1]`` keys that each query sees.
        out: ``[T, H, D]`` float32, normalised over the keys read.
        lse: Log-sum-exp of the logits read.
        rest: The same of the logits left out, for ``exact``.
        peak: Largest visible logit, for ``given``.
        kept: Keys read, int32.
    """

    visible: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    rest: torch.Tensor
    peak: torch.Tensor
    kept: torch.Tensor


def thresholded(query: torch.Tensor, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec) -> Result:
    """See ``ops.thresholded``."""
    visible = _visible_counts(view, spec.band)
    rows = query.shape[:2]
    decoding = all(count == 1 for count in view.rows.host_query_lens)
    untouched = bool((plan.theta == LOWEST).all())
    if untouched or (plan.dropped_sum == "exact" and not decoding):
        # Every key is read, or all are summed up: that is dense attention. Blocks below overwrite their part of it.
        dense = attention.decode if decoding else attention.prefill
        out, lse = dense(query, view, None, replace(spec, sinks=None))
        parts = _Parts(
            visible,
            out.float(),
            lse.clone(),
            torch.full_like(lse, LOWEST),
            lse,
            visible.to(torch.int32).repeat(1, rows[1]),
        )
    else:
        nothing = torch.full(rows, LOWEST)
        zeros = torch.zeros(rows, dtype=torch.int32)
        parts = _Parts(visible, torch.zeros(query.shape), nothing, nothing.clone(), nothing.clone(), zeros)
    if not untouched:
        start = 0
        for sequence, count in enumerate(view.rows.host_query_lens):
            if decoding:
                _decode(query[sequence], view, sequence, plan, spec, parts)
            else:
                _prefill(query, view, sequence, slice(start, start + count), plan, spec, parts)
            start += count
        if plan.dropped_sum == "exact" and not decoding:
            # Rounding can make a part larger than the whole.
            share = _share(parts.lse, lse).clamp(max=1.0)
            parts.rest = lse + torch.log1p(-share)
    out = _compensated(parts, view, plan, spec)
    return out.to(query.dtype), parts.lse, parts.kept


def _compensated(parts: _Parts, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec) -> torch.Tensor:
    """``[T, H, D]`` float32: the final output from the parts."""
    if plan.dropped_sum == "exact":
        dropped = parts.rest
    elif plan.dropped_sum == "bound":
        dropped = (parts.visible - parts.kept).float().log() + plan.theta
    elif plan.expected is not None:
        dropped = parts.peak + plan.expected.log()
    else:
        dropped = torch.full_like(parts.lse, LOWEST)
    dropped = dropped + torch.tensor(plan.dropped_scale).log()
    dropped = dropped.masked_fill(parts.kept == parts.visible, LOWEST)
    denominator = torch.logaddexp(parts.lse, dropped)
    if spec.sinks is not None:
        denominator = torch.logaddexp(denominator, spec.sinks.float())
    out = parts.out * _share(parts.lse, denominator)[..., None]
    if plan.value_mean:
        lost = _share(dropped, denominator)
        tokens, heads, dim = out.shape
        mean = causal_value_mean(view)
        grouped = out.view(tokens, mean.shape[1], -1, dim)
        grouped.addcmul_(lost.view(tokens, mean.shape[1], heads // mean.shape[1], 1), mean[:, :, None])
    return out


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """``exp(part - whole)``; 0 of nothing, where both are -inf."""
    return torch.exp(part - whole.masked_fill(whole == LOWEST, 0.0))


def _visible_counts(view: PagedView, band: Band) -> torch.Tensor:
    """``[T, 1]`` keys that each query sees."""
    rows = view.rows
    key = ("visible_counts", band)
    if key not in rows.plans:
        rows.plans[key] = torch.tensor(
            [
                band.visible(position)
                for context, count in zip(rows.host_context_lens, rows.host_query_lens, strict=True)
                for position in range(context - count, context)
            ]
        )[:, None]
    counts: torch.Tensor = rows.plans[key]
    return counts


def _decode(
    query: torch.Tensor, view: PagedView, sequence: int, plan: ScoreThreshold, spec: AttentionSpec, parts: _Parts
) -> None:
    """One query ``[H, D]`` over the keys in its band, into row ``sequence`` of ``parts``."""
    context = view.rows.host_context_lens[sequence]
    end = context - spec.band.nearest
    begin = 0 if spec.band.farthest is None else max(0, context - spec.band.farthest)
    if end <= begin:
        return
    heads, dim = query.shape
    kv_heads, size = view.num_kv_heads, view.page_size
    rows = query.view(kv_heads, -1, dim)
    first = begin // size
    pages = view.rows.block_tables[sequence, first : -(-end // size)].long()
    own = slice(begin - first * size, end - first * size)
    logits = _scores(rows, view.pages.key_rows(rows.dtype), pages)[..., own].float() * spec.scale
    logits = _soft_capped(logits, spec)
    theta = plan.theta[sequence].view(kv_heads, -1, 1)
    read = ~(logits <= theta)  # what is not a number is read too, and tells on the output
    if plan.union:
        read = read.any(1, keepdim=True).expand_as(read).contiguous()
    read[..., : max(0, plan.sink_tokens - begin)] = True
    read[..., max(0, context - plan.recent_tokens - begin) :] = True
    peak = logits.amax(-1, keepdim=True)
    weights = torch.exp(logits - peak)
    if plan.dropped_sum == "exact":
        parts.rest[sequence] = (peak + weights.masked_fill(read, 0.0).sum(-1, keepdim=True).log()).flatten()
    parts.peak[sequence] = peak.flatten()
    parts.kept[sequence] = read.sum(-1, dtype=torch.int32).flatten()

    # Places of the survivors, one list per KV head, padded by its first survivor at weight 0.
    survivor = read.any(1)
    counts = survivor.sum(1, keepdim=True)
    width = int(counts.max())
    if width == 0:
        return
    listed = survivor.to(torch.int8).argmax(1, keepdim=True).repeat(1, width)
    valid = torch.arange(width) < counts
    listed[valid] = survivor.nonzero(as_tuple=True)[1]
    at = listed + own.start
    flat = (pages[at // size] * kv_heads + torch.arange(kv_heads)[:, None]) * size + at % size
    kept = torch.gather(read, 2, listed[:, None].expand(-1, rows.shape[1], -1))
    kept &= valid[:, None]
    if rows.dtype == torch.float32:
        chosen = torch.gather(weights, 2, listed[:, None].expand(-1, rows.shape[1], -1)) * kept
    else:
        # Logits in 16 bits are good enough to choose and to sum what is dropped, not to weigh what is kept.
        keys = _rows(view.pages.key_rows(), flat).float()
        exact = _soft_capped(torch.matmul(rows.float(), keys.transpose(1, 2)) * spec.scale, spec)
        chosen = torch.exp(exact - peak) * kept
    total = chosen.sum(-1, keepdim=True)
    values = _rows(view.pages.value_rows(rows.dtype), flat)
    out = torch.matmul(chosen.to(values.dtype), values).float()
    parts.out[sequence] = (out / total.clamp(min=torch.finfo(torch.float32).tiny)).view(heads, dim)
    parts.lse[sequence] = (peak + total.log()).flatten()


def _scores(rows: torch.Tensor, pool: StoredRows, pages: torch.Tensor) -> torch.Tensor:
    """``[G, r, n]``: queries ``rows [G, r, D]`` times all keys of ``pages``, not scaled."""
    first, count = int(pages[0]), pages.shape[0]
    side_by_side = bool((pages == torch.arange(first, first + count)).all())
    # Pages that lie side by side are read where they lie.
    keys = pool[first : first + count] if side_by_side else pool.pages(pages)
    return torch.matmul(rows, keys.transpose(2, 3)).permute(1, 2, 0, 3).flatten(2)


def _rows(pool: StoredRows, flat: torch.Tensor) -> torch.Tensor:
    """``[G, m, D]``: the rows at ``flat [G, m]`` of a pool ``[P, G, page, D]``."""
    return pool.flat(flat.flatten()).view(*flat.shape, -1)


def _soft_capped(logits: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    return logits.div_(spec.softcap).tanh_().mul_(spec.softcap) if spec.softcap else logits


def _prefill(
    query: torch.Tensor,
    view: PagedView,
    sequence: int,
    part: slice,
    plan: ScoreThreshold,
    spec: AttentionSpec,
    parts: _Parts,
) -> None:
    """The queries ``part`` of the packed row, block by block."""
    count = part.stop - part.start
    first = view.rows.host_context_lens[sequence] - count
    keys, values = gather_sequence(view, sequence, query.dtype)
    reach = keys.shape[1] if spec.band.farthest is None else min(keys.shape[1], spec.band.farthest + count)
    block = max(1, min(count, BLOCK_BYTES // (query.shape[1] * reach * keys.element_size())))
    for start in range(0, count, block):
        position, stop = first + start, first + min(start + block, count)
        begin = 0 if spec.band.farthest is None else max(0, position - spec.band.farthest + 1)
        end = stop - spec.band.nearest
        if end <= begin:
            continue
        own = slice(part.start + start, part.start + stop - first)
        if plan.dropped_sum == "exact" and bool((plan.theta[own] == LOWEST).all()):
            continue
        _block(query, keys[:, begin:end], values[:, begin:end], begin, position, own, plan, spec, parts)


def _block(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begin: int,
    position: int,
    own: slice,
    plan: ScoreThreshold,
    spec: AttentionSpec,
    parts: _Parts,
) -> None:
    """Queries ``own``, the first at ``position``, over keys ``[G, m, D]``, the first at ``begin``."""
    kv_heads, length, dim = keys.shape
    count, heads = own.stop - own.start, query.shape[1]
    shape = (kv_heads, heads // kv_heads, count)

    def folded(rows: torch.Tensor) -> torch.Tensor:
        """``[count, H, x]`` -> ``[G, r, count, x]``."""
        return rows.view(count, kv_heads, shape[1], -1).permute(1, 2, 0, 3)

    def unfolded(rows: torch.Tensor) -> torch.Tensor:
        """``[G, r * count, ...]`` -> ``[count, H, ...]``."""
        return rows.view(*shape, *rows.shape[2:]).movedim(2, 0).flatten(1, 2)

    rows = folded(query[own]).reshape(kv_heads, -1, dim)
    if spec.softcap:
        logits = torch.bmm(rows.float(), keys.float().transpose(1, 2))
    else:
        logits = torch.bmm(rows, keys.transpose(1, 2))
    logits = _soft_capped(logits.mul_(spec.scale), spec).view(*shape, length)
    read = ~(logits <= folded(plan.theta[own][..., None]).to(logits.dtype))
    if plan.union:
        read = read.any(1, keepdim=True).expand_as(read).contiguous()
    read[..., : max(0, plan.sink_tokens - begin)] = True
    # Distances matter only where recent keys and the edges of the band are.
    edge = begin
    if spec.band.farthest is None:
        edge = max(begin, position - max(plan.recent_tokens, spec.band.nearest))
    distance = torch.arange(position, position + count)[:, None] - torch.arange(edge, begin + length)
    visible = distance >= spec.band.nearest
    if spec.band.farthest is not None:
        visible &= distance < spec.band.farthest
    near = read[..., edge - begin :]
    near |= distance < plan.recent_tokens
    near &= visible
    if plan.dropped_sum == "given":
        logits[..., edge - begin :].masked_fill_(~visible, LOWEST)
        parts.peak[own] = unfolded(logits.amax(-1).float().flatten(1))
    read = read.view(kv_heads, -1, length)
    kept = read.sum(-1, dtype=torch.int32)
    if spec.softcap:
        logits = logits.view(read.shape).masked_fill_(~read, LOWEST)
        lse = torch.logsumexp(logits, -1)
        out = torch.bmm(torch.softmax(logits, -1), values.float())
    else:
        bias = torch.full(read.shape, LOWEST, dtype=rows.dtype).masked_fill_(read, 0.0)
        flashed = attention_torch.flash(rows[None], keys[None], values[None], spec.scale, mask=bias[None])
        out, lse = flashed[0][0], flashed[1][0]
    nothing = kept == 0
    parts.out[own] = unfolded(out.float().masked_fill(nothing[..., None], 0.0))
    parts.lse[own] = unfolded(lse.masked_fill(nothing, LOWEST))
    parts.kept[own] = unfolded(kept)
