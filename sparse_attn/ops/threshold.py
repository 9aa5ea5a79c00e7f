"""Attention over the keys whose own score exceeds a threshold: ``thresholded``."""

from __future__ import annotations

from typing import Literal

import torch

from foveate.kv_cache.stats import VALUE_SUM
from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Band, ScoreThreshold
from . import reference_threshold, threshold_native, threshold_torch

Backend = Literal["reference", "torch", "native", "triton"]
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def thresholded(
    query: torch.Tensor,
    view: PagedView,
    plan: ScoreThreshold,
    spec: AttentionSpec,
    *,
    backend: Backend | None = None,
) -> Result:
    """Attention of packed queries, prompt chunks or one per sequence, over the keys above a threshold.

    With ``x`` the logits of a query, scaled and capped, ``m`` the largest over all its visible
    keys, ``I`` the keys read, ``V`` the mean of all visible values (Top-theta, arXiv:2502.08363)::

        E   = the sum over the keys not in I of exp(x - m), or what stands for it (``plan.dropped_sum``)
        w_j = exp(x_j - m) / (sum over I of exp(x - m) + dropped_scale * E + exp(learned sink - m))
        out = sum over I of w_j v_j  [+ (1 - sum of w - share of the sink) * V]

    A query that reads no key has ``out = 0``, or ``V`` where all its probability goes to the mean.

    Args:
        query: ``[T, H, D]``.
        view: K and V of this step are written already; the pages keep ``VALUE_SUM`` if
            ``plan.value_mean``.
        plan: Thresholds and compensation.
        spec: Scale, soft cap, band and learned sinks.
        backend: For tests.

    Returns:
        ``(out [T, H, D] in query's dtype, lse [T, H] float32, kept [T, H] int32)``: ``lse`` is the
        natural log-sum-exp of the logits of the keys read, ``kept`` their number.

    Raises:
        ValueError: shapes do not fit, or the plan asks for what cannot be had.
    """
    _check(query, view, plan, spec)
    chosen = backend or _default_backend(query, view, plan, spec)
    if chosen == "triton":
        from . import threshold_decode_triton, threshold_prefill_triton

        if all(count == 1 for count in view.rows.host_query_lens):
            return threshold_decode_triton.decode(query, view, plan, spec)
        return threshold_prefill_triton.prefill(query, view, plan, spec)
    if chosen == "native":
        return threshold_native.thresholded(query, view, plan, spec)
    if chosen == "torch":
        return threshold_torch.thresholded(query, view, plan, spec)
    return reference_threshold.thresholded(query, view, plan, spec)


def _default_backend(query: torch.Tensor, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec) -> Backend:
    if query.is_cuda:
        return "triton"
    return "native" if threshold_native.supports(query, view, plan, spec) else "torch"


def _check(query: torch.Tensor, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec) -> None:
    if plan.theta.shape != query.shape[:2] or query.shape[0] != view.rows.num_queries:
        raise ValueError(f"thresholds {tuple(plan.theta.shape)} do not fit queries {tuple(query.shape)}")
    if query.shape[2] != view.head_dim or query.shape[1] % view.num_kv_heads:
        raise ValueError(f"queries {tuple(query.shape)} do not fit {view.num_kv_heads} KV heads x {view.head_dim}")
    if (plan.dropped_sum == "given") != (plan.expected is not None):
        raise ValueError("`expected` goes with dropped_sum='given'")
    if plan.expected is not None and plan.expected.shape != plan.theta.shape:
        raise ValueError(f"expected sums {tuple(plan.expected.shape)} do not fit thresholds {tuple(plan.theta.shape)}")
    if plan.value_mean and spec.band != Band():
        raise ValueError("the mean of the visible values is kept for causal attention only")
    if plan.value_mean and VALUE_SUM not in view.pages.stats:
        raise ValueError("value_mean needs pages that keep VALUE_SUM")
