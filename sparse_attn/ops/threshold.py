"""Attention over the keys whose own score exceeds a threshold: ``thresholded``."""

from __future__ import annotations

from typing import Literal

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import ScoreThreshold
from . import reference_threshold

Backend = Literal["reference"]


def thresholded(
    query: torch.Tensor,
    view: PagedView,
    plan: ScoreThreshold,
    spec: AttentionSpec,
    *,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of packed queries, prompt chunks or one per sequence, over the keys above a threshold.

    With ``x`` the logits of a query, scaled and capped, ``I`` the keys read, ``E`` the term of
    ``plan.dropped_sum`` and ``V`` the mean of all visible values (Top-theta, arXiv:2502.08363)::

        w_j = exp(x_j) / (sum over I of exp(x) + dropped_scale * E + exp(learned sink))
        out = sum over I of w_j v_j  [+ (1 - sum of w - share of the sink) * V]

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
        ValueError: shapes do not fit.
    """
    if plan.theta.shape != query.shape[:2] or query.shape[0] != view.rows.num_queries:
        raise ValueError(f"thresholds {tuple(plan.theta.shape)} do not fit queries {tuple(query.shape)}")
    if (plan.dropped_sum == "given") != (plan.expected is not None):
        raise ValueError("`expected` goes with dropped_sum='given'")
    return reference_threshold.thresholded(query, view, plan, spec)
