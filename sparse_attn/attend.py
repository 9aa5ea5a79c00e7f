"""One layer's attention: from a scheme's choice to the kernels. Knows no scheme by name."""

from __future__ import annotations

from dataclasses import replace

import torch

from foveate.kv_cache.view import PagedView

from . import budget, counts, ops
from .ops.keep_native import Runs
from .protocol import AttentionSpec, LayerCall, LayerRole, Phase, Role, Scheme, StepGroup, StepState
from .selection import Plan, Ranking, ScoreThreshold, Segment, Selection, Tiles


def attend(query: torch.Tensor, layer: LayerCall, step: StepState) -> torch.Tensor:
    """Attention of a packed step over pages that already hold this step's keys.

    Args:
        query: ``[T, H, D]``, rotated by the model.
        layer: Which attention layer, and its facts.
        step: Groups, pool and what anchor layers have carried; ``keys_read`` is added to.

    Returns:
        ``[T, H, D]``, in the last layer zeros where it is not wanted.
    """
    is_last = layer.index == step.num_layers - 1
    groups = [group for group in step.groups if group.wanted or not is_last]
    if len(groups) == len(step.groups) == 1:
        return _attend_group(query, layer, step, groups[0])
    out = torch.empty_like(query) if len(groups) == len(step.groups) else torch.zeros_like(query)
    for group in groups:
        part = slice(group.start, group.start + group.rows.num_queries)
        out[part] = _attend_group(query[part], layer, step, group)
    return out


def _attend_group(query: torch.Tensor, layer: LayerCall, step: StepState, group: StepGroup) -> torch.Tensor:
    view = PagedView(step.pool.layer(layer.index), group.rows)
    return read(query, view, segments_of(query, view, layer, step, group), layer, step, group)


def read(
    query: torch.Tensor,
    view: PagedView,
    segments: tuple[Segment, ...],
    layer: LayerCall,
    step: StepState,
    group: StepGroup,
) -> torch.Tensor:
    """Attention of one group's queries ``[T, H, D]`` over what ``segments_of`` chose; books the reads."""
    if len(segments) == 1:
        parts = [_read(query, view, segments[0], layer, layer.spec, step, group)]
        out, lse, _ = parts[0]
    else:
        # The learned sinks belong to the whole, so the parts go without and the merge adds them once.
        without = replace(layer.spec, sinks=None)
        parts = [_read(query, view, segment, layer, without, step, group) for segment in segments]
        out, lse = ops.merge([(part, part_lse) for part, part_lse, _ in parts], layer.spec.sinks)
    counts.book(segments, [kept for _, _, kept in parts], layer, step, group, query.shape[1])
    if step.observer is not None:
        step.observer.see(query, view, layer, group, segments, lse)
    return out


def _read(
    query: torch.Tensor,
    view: PagedView,
    segment: Segment,
    layer: LayerCall,
    spec: AttentionSpec,
    step: StepState,
    group: StepGroup,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``(out, lse, kept)`` of one segment; ``kept`` is the number of keys per query and head behind a threshold."""
    if segment.position_cap is not None:
        if step.rotary is None:
            raise RuntimeError("this scheme moves positions, but the model's rotary embedding is unknown")
        positions = step.positions[group.start : group.start + group.rows.num_queries]
        query = step.rotary.cap(query, positions, segment.position_cap, layer.index)
    if segment.band != spec.band:
        spec = replace(spec, band=segment.band)
    if isinstance(segment.keys, ScoreThreshold):
        return ops.thresholded(query, view, segment.keys, spec)
    kernel = ops.prefill if group.phase is Phase.PREFILL else ops.decode
    return *kernel(query, view, segment.keys, spec), None


def segments_of(
    query: torch.Tensor, view: PagedView, layer: LayerCall, step: StepState, group: StepGroup
) -> tuple[Segment, ...]:
    """What one group reads in a layer: the scheme chooses, or an earlier layer has chosen for it.

    Args:
        query: ``[T, H, D]`` of the group, rotated.
        view: Its pages, which hold this step's keys.
        layer: Which layer.
        step: Its state.
        group: Keeps what later layers will read.
    """
    known = known_segments(layer, step, group)
    if known is not None:
        return known
    scheme = group.scheme
    assert scheme is not None  # then everything is read
    plan = _select(query, view, layer, group, scheme)
    if _is_anchor(scheme, layer, step):  # other plans are let go with their layer
        group.carried[layer.index] = plan
    whole = _is_whole(_role(scheme, layer, step), layer)
    return _everything(layer) if whole else scheme.segments(plan, layer.spec.band)


def known_segments(layer: LayerCall, step: StepState, group: StepGroup) -> tuple[Segment, ...] | None:
    """The same where it is known before the layer has queries; ``None`` where they decide."""
    scheme = group.scheme
    if scheme is None or reads_everything(layer, step, group):
        return _everything(layer)
    role = _role(scheme, layer, step)
    if role.anchor is None:
        return None
    if _is_whole(role, layer):
        return _everything(layer)
    plan = group.carried[role.anchor]
    heads = scheme.head_map(layer, step.slots.device)
    if isinstance(plan, Selection) and heads is not None:
        plan = replace(plan, indices=plan.indices.index_select(1, heads), counts=plan.counts.index_select(1, heads))
    return scheme.segments(plan, layer.spec.band)


def carried(
    layer: LayerCall, step: StepState, group: StepGroup
) -> tuple[tuple[Segment, ...], torch.Tensor | None] | None:
    """What a layer reads that an earlier one has chosen, and the row of it for each KV head; ``None`` for others.

    It may not be filled yet: see ``promise``.
    """
    scheme = group.scheme
    role = None if scheme is None else _role(scheme, layer, step)
    if scheme is None or role is None or role.anchor is None or _is_whole(role, layer):
        return None
    segments = scheme.segments(group.carried[role.anchor], layer.spec.band)
    return segments, scheme.head_map(layer, step.slots.device)


def ranking(
    layer: LayerCall, step: StepState, group: StepGroup
) -> tuple[Ranking, Tiles, Runs | None, bool, bool] | None:
    """How the queries of a decode layer will choose, where exact scores alone decide; ``None`` elsewhere.

    Returns:
        The choice, the tiles that choose, what is read beside it, whether the layer itself reads every key all the
        same, and whether later layers read what it chooses.
    """
    scheme = group.scheme
    role = None if scheme is None else _role(scheme, layer, step)
    if scheme is None or role is None or role.role not in (Role.SELECT, Role.DENSE_ANCHOR):
        return None
    tiles = group.tiles_of(1)
    found = scheme.ranking(tiles, group.phase)
    if found is None:
        return None
    kept = budget.kept_runs(tiles, scheme, 1, group.phase)
    return found, tiles, kept, _is_whole(role, layer), _is_anchor(scheme, layer, step)


def promise(plan: Plan, layer: LayerCall, step: StepState, group: StepGroup) -> tuple[Segment, ...]:
    """What a layer reads of a plan that it will fill when it runs; layers behind it get the plan as it is."""
    scheme = group.scheme
    assert scheme is not None
    if _is_anchor(scheme, layer, step):
        group.carried[layer.index] = plan
    return scheme.segments(plan, layer.spec.band)


def _everything(layer: LayerCall) -> tuple[Segment, ...]:
    return (Segment(None, layer.spec.band),)


def reads_everything(layer: LayerCall, step: StepState, group: StepGroup) -> bool:
    """Whether a layer reads every key of its band and chooses none for others."""
    if group.scheme is None:
        return True
    role = _role(group.scheme, layer, step)
    return role.role is Role.DENSE or (_is_whole(role, layer) and not _is_anchor(group.scheme, layer, step))


def _is_whole(role: LayerRole, layer: LayerCall) -> bool:
    """Whether a layer reads all itself; one with the model's own sliding window does, since it reads little already."""
    return role.role in (Role.DENSE, Role.DENSE_ANCHOR) or layer.spec.band.farthest is not None


def _role(scheme: Scheme, layer: LayerCall, step: StepState) -> LayerRole:
    return _roles(scheme, step)[0][layer.index]


def _roles(scheme: Scheme, step: StepState) -> tuple[tuple[LayerRole, ...], frozenset[int | None]]:
    found = step.roles.get(scheme)
    if found is None:
        roles = scheme.roles(step.num_layers)
        found = step.roles[scheme] = roles, frozenset(role.anchor for role in roles)
    return found


def _is_anchor(scheme: Scheme, layer: LayerCall, step: StepState) -> bool:
    """Whether a later layer reads what this one chooses."""
    return layer.index in _roles(scheme, step)[1]


def _select(query: torch.Tensor, view: PagedView, layer: LayerCall, group: StepGroup, scheme: Scheme) -> Plan:
    if group.phase is Phase.PREFILL:
        plan = scheme.select_prefill(query, view, group.tiles_of(scheme.tile), layer)
    else:
        plan = scheme.select_decode(query, view, group.tiles_of(1), layer)
    return budget.keep(plan, scheme, group.phase)
