"""Attention over pages: ``prefill``, ``decode`` and ``merge``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from . import attention_native, attention_torch, decode_torch, gathered_torch, reference

Backend = Literal["reference", "torch", "native", "triton", "flashinfer"]
Result = tuple[torch.Tensor, torch.Tensor]

# Tokens of a selected unit; below, sorting queries by unit costs more than their products.
MIN_GATHERED_UNIT = 16


def prefill(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    *,
    backend: Backend | None = None,
) -> Result:
    """Attention of packed prompt chunks over the pages of their sequences.

    Args:
        query: ``[T, H, D]``, the queries of ``view.rows`` one sequence after another.
        view: K and V of this step are written already.
        selection: Keys per tile; ``None`` reads every key in the band. Keys behind a query are
            masked either way, and so is all outside ``spec.band``.
        spec: Scale, soft cap, band and learned sinks.
        backend: For tests.

    Returns:
        ``(out [T, H, D] in query's dtype, lse [T, H] float32)``. ``lse`` is the natural
        log-sum-exp of the visible logits, without the learned sinks, so that parts can be merged;
        a query that sees no key has ``out = 0`` and ``lse = -inf``.

    Raises:
        ValueError: shapes do not fit.
    """
    _check(query, view, selection)
    chosen = backend or _default_backend(query, view, selection, spec)
    if chosen == "flashinfer":
        from . import attention_flashinfer

        return attention_flashinfer.prefill(query, view, selection, spec)
    if chosen == "triton":
        from . import gathered_triton, prefill_triton

        if selection is not None and _gathers_queries(view, selection):
            return gathered_triton.prefill(query, view, selection, spec)
        return prefill_triton.prefill(query, view, selection, spec)
    if chosen == "native":
        return attention_native.prefill(query, view, selection, spec)
    if chosen == "torch":
        if selection is not None and _gathers_queries(view, selection):
            return gathered_torch.prefill(query, view, selection, spec)
        return attention_torch.prefill(query, view, selection, spec)
    return reference.attention(query, view, selection, spec)


def decode(
    query: torch.Tensor,
    view: PagedView,
    selection: Selection | None,
    spec: AttentionSpec,
    *,
    backend: Backend | None = None,
) -> Result:
    """Attention of one query per sequence, ``[S, H, D]``; the rest as in ``prefill``."""
    _check(query, view, selection)
    if query.shape[0] != view.rows.num_sequences:
        raise ValueError(f"decode takes one query per sequence, got {query.shape[0]} for {view.rows.num_sequences}")
    chosen = backend or _default_backend(query, view, selection, spec)
    if chosen == "flashinfer":
        from . import attention_flashinfer

        return attention_flashinfer.decode(query, view, selection, spec)
    if chosen == "triton":
        from . import decode_triton

        return decode_triton.decode(query, view, selection, spec)
    if chosen == "native":
        return attention_native.decode(query, view, selection, spec)
    if chosen == "torch":
        return decode_torch.decode(query, view, selection, spec)
    return reference.attention(query, view, selection, spec)


def merge(parts: Sequence[Result], sinks: torch.Tensor | None = None) -> Result:
    """Attention over the union of disjoint key sets from attention over each.

    Args:
        parts: ``(out [T, H, D], lse [T, H])`` of each set, all without learned sinks.
        sinks: ``[H]`` learned sink logits, counted once, here.

    Returns:
        ``(out, lse)``, ``lse`` still without the sinks.
    """
    if len(parts) == 2 and parts[0][0].is_cuda:
        from . import attention_flashinfer

        if attention_flashinfer.can_merge(parts[0][0]):
            return attention_flashinfer.merge(parts[0], parts[1], sinks)
    lse = torch.stack([part_lse for _, part_lse in parts])
    total = torch.logsumexp(lse, dim=0)
    denominator = total if sinks is None else torch.logaddexp(total, sinks.float())
    # A query that sees nothing anywhere has total = -inf: exp(-inf - -inf) is NaN, its weight is 0.
    weights = torch.exp(lse - denominator).nan_to_num(0.0)
    out = sum(weight[..., None] * part.float() for weight, (part, _) in zip(weights, parts, strict=True))
    return torch.as_tensor(out).to(parts[0][0].dtype), total


def _default_backend(query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec) -> Backend:
    if not query.is_cuda:
        return "native" if attention_native.supports(query, view, spec) else "torch"
    from . import attention_flashinfer

    supported = attention_flashinfer.supports(query, view, selection, spec)
    return "flashinfer" if supported and attention_flashinfer.available(query.device) else "triton"


def _gathers_queries(view: PagedView, selection: Selection) -> bool:
    """Has each query keys of its own, in units that fill a product? Then queries are gathered per unit of keys."""
    several = view.rows.num_queries > view.rows.num_sequences
    return several and selection.tiles.size == 1 and selection.granularity >= MIN_GATHERED_UNIT


def _check(query: torch.Tensor, view: PagedView, selection: Selection | None) -> None:
    tokens, heads, dim = query.shape
    if tokens != view.rows.num_queries:
        raise ValueError(f"{tokens} queries given, the rows hold {view.rows.num_queries}")
    if dim != view.head_dim or heads % view.num_kv_heads:
        raise ValueError(f"query of {heads} heads x {dim} does not fit {view.num_kv_heads} KV heads x {view.head_dim}")
    if selection is not None:
        if selection.indices.shape[1] not in (heads, view.num_kv_heads):
            raise ValueError("a selection has one row per KV head or per query head")
        unit, page = selection.granularity, view.page_size
        if page % unit and unit % page:
            raise ValueError(f"neither of granularity {unit} and page size {page} divides the other")
