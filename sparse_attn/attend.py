"""One layer's attention: from a scheme's choice to the kernels. Knows no scheme by name."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate.kv_cache.view import PagedView, Rows

from . import budget, ops
from .protocol import LayerCall, LayerRole, Phase, Role, Scheme, StepGroup, StepState
from .selection import Band, Segment, Selection


def attend(query: torch.Tensor, layer: LayerCall, step: StepState) -> torch.Tensor:
    """Attention of a packed step over pages that already hold this step's keys.

    Args:
        query: ``[T, H, D]``, rotated by the model.
        layer: Which attention layer, and its facts.
        step: Groups, pool and what anchor layers have carried; ``keys_read`` is added to.

    Returns:
        ``[T, H, D]``.
    """
    if len(step.groups) == 1:
        return _attend_group(query, layer, step, step.groups[0])
    out = torch.empty_like(query)
    for group in step.groups:
        part = slice(group.start, group.start + group.rows.num_queries)
        out[part] = _attend_group(query[part], layer, step, group)
    return out


def _attend_group(query: torch.Tensor, layer: LayerCall, step: StepState, group: StepGroup) -> torch.Tensor:
    view = PagedView(step.pool.layer(layer.index), group.rows)
    segments = _segments(query, view, layer, step, group)
    _count_keys(segments, layer, step, group, query.shape[1])
    kernel = ops.prefill if group.phase is Phase.PREFILL else ops.decode
    if len(segments) == 1 and segments[0].position_cap is None:
        out, _ = kernel(query, view, segments[0].keys, replace(layer.spec, band=segments[0].band))
        return out
    # The learned sinks belong to the whole, so the parts go without and the merge adds them once.
    parts = []
    for segment in segments:
        moved = query
        if segment.position_cap is not None:
            if step.rotary is None:
                raise RuntimeError("this scheme moves positions, but the model's rotary embedding is unknown")
            positions = step.positions[group.start : group.start + group.rows.num_queries]
            moved = step.rotary.cap(query, positions, segment.position_cap, layer.index)
        parts.append(kernel(moved, view, segment.keys, replace(layer.spec, band=segment.band, sinks=None)))
    out, _ = ops.merge(parts, layer.spec.sinks)
    return out


def _segments(
    query: torch.Tensor, view: PagedView, layer: LayerCall, step: StepState, group: StepGroup
) -> tuple[Segment, ...]:
    everything = (Segment(None, layer.spec.band),)
    scheme = group.scheme
    if scheme is None:
        return everything
    role = _role(scheme, layer, step)
    # A layer with the model's own sliding window reads little already: it is read whole.
    whole = role.role in (Role.DENSE, Role.DENSE_ANCHOR) or layer.spec.band.farthest is not None
    if role.role is Role.DENSE:
        return everything
    if role.anchor is not None:
        if whole:
            return everything
        selection = scheme.remap(group.carried[role.anchor], layer)
    else:
        selection = _select(query, view, layer, group, scheme)
        group.carried[layer.index] = selection
    return everything if whole else scheme.segments(selection, layer.spec.band)


def _role(scheme: Scheme, layer: LayerCall, step: StepState) -> LayerRole:
    if id(scheme) not in step.roles:
        step.roles[id(scheme)] = scheme.roles(step.num_layers)
    return step.roles[id(scheme)][layer.index]


def _select(query: torch.Tensor, view: PagedView, layer: LayerCall, group: StepGroup, scheme: Scheme) -> Selection:
    if group.phase is Phase.PREFILL:
        tiles = group.tiles_of(scheme.tile)
        selection = scheme.select_prefill(query, view, tiles, layer)
    else:
        tiles = group.tiles_of(1)
        selection = scheme.select_decode(query, view, tiles, layer)
    return budget.keep(selection, scheme)


def _count_keys(segments: tuple[Segment, ...], layer: LayerCall, step: StepState, group: StepGroup, heads: int) -> None:
    plan = ("keys_read", layer.spec.band, *((id(part.keys), part.band) for part in segments))
    counted = group.rows.plans.get(plan)
    if counted is None:
        device = step.keys_read.device
        dense = _band_pairs(group.rows, layer.spec.band, heads, device)
        read = torch.zeros_like(dense)
        for part in segments:
            if part.keys is None:
                read += _band_pairs(group.rows, part.band, heads, device)
            else:
                read += budget.selected_pairs(part.keys, group.rows, part.band, heads)
        owners = torch.tensor(group.owners, device=device)
        # The segments are kept so that no later selection of this step can get the same id.
        counted = group.rows.plans[plan] = (owners, torch.stack([read, dense], dim=1), segments)
    step.keys_read.index_add_(0, counted[0], counted[1])


def _band_pairs(rows: Rows, band: Band, heads: int, device: torch.device) -> torch.Tensor:
    """``[S]`` float64: visible (query, key) pairs of each sequence, times ``heads``."""
    pairs = [
        sum(band.visible(position) for position in range(context - count, context))
        for context, count in zip(rows.host_context_lens, rows.host_query_lens, strict=True)
    ]
    return torch.tensor(pairs, dtype=torch.float64).to(device) * heads
