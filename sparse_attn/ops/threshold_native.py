"""Thresholded attention over pages on a CPU, by the compiled kernels of ``native/``."""

from __future__ import annotations

import ctypes

import torch

from foveate.kv_cache.stats import VALUE_SUM
from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import ScoreThreshold
from . import attention_native
from .native import DROPPED_SUMS, ThresholdCall
from .value_mean import causal_value_mean

Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def supports(query: torch.Tensor, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec) -> bool:
    """Can the kernels compute this call? Those of prompts do not let the heads of a group read together."""
    return attention_native.supports(query, view, spec) and (not plan.union or _decodes(view))


def thresholded(
    query: torch.Tensor, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec, *, isa: str | None = None
) -> Result:
    """See ``ops.thresholded``; ``isa`` is for tests."""
    decodes = _decodes(view)
    kept = torch.empty(query.shape[:2], dtype=torch.int32)
    # Named, so that they live until the call is over: it holds their addresses only.
    theta = plan.theta.float().contiguous()
    expected = None if plan.expected is None else plan.expected.float().contiguous()
    mean = causal_value_mean(view) if plan.value_mean and not decodes else None
    sums = view.pages.stats[VALUE_SUM] if plan.value_mean and decodes else None
    threshold = ThresholdCall(
        theta=theta.data_ptr(),
        expected=None if expected is None else expected.data_ptr(),
        value_mean=None if mean is None else mean.data_ptr(),
        value_sums=None if sums is None else sums.data_ptr(),
        kept=kept.data_ptr(),
        dropped_sum=DROPPED_SUMS[plan.dropped_sum],
        dropped_scale=plan.dropped_scale,
        read_together=plan.union,
        sink_tokens=plan.sink_tokens,
        recent_tokens=plan.recent_tokens,
    )
    kernels = attention_native.opened()
    function = kernels.decode if decodes else kernels.prefill
    out, lse = attention_native.run(function, query, view, None, spec, isa, ctypes.addressof(threshold))
    return out, lse, kept


def _decodes(view: PagedView) -> bool:
    return all(count == 1 for count in view.rows.host_query_lens)
