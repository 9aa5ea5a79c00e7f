"""What the thresholded kernels share: one pass over keys that loads only the values read, and the compensation."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import ScoreThreshold
from .common_triton import LN2, LOG2E, soft_cap
from .launch import key_arguments

# What stands for the keys left out, as the kernels know it.
MODES = {"none": 0, "exact": 1, "bound": 2, "given": 3}
_EXACT, _BOUND, _GIVEN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def visible_keys(position, nearest, farthest):
    """Number of keys in the band of a query at ``position``."""
    first = 0
    if farthest is not None:
        first = tl.maximum(position - farthest + 1, 0)
    return tl.maximum(position - nearest + 1 - first, 0)


@triton.jit
def read_above(
    query,  # [BLOCK_ROWS, BLOCK_DIM]
    theta,  # [BLOCK_ROWS], +inf for rows that are none
    row_valid,
    position,  # [BLOCK_ROWS] position of each row's query
    start,
    stop,
    keys,  # at this KV head; likewise values
    values,
    table,  # block table of this sequence
    scale,
    nearest,
    farthest,
    sink_tokens,
    recent_tokens,
    PAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNION: tl.constexpr,
    FOLD: tl.constexpr,  # rows of one query, a power of two
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The keys at ``start`` to ``stop - 1``: weighted sum of the values read, and per row the peak over all visible
    keys (in units of log 2), the sums of ``exp2(logit - peak)`` of the keys read and left out, and the number read."""
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    dropped = tl.zeros([BLOCK_ROWS], tl.float32)
    count = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(start, stop, BLOCK_KEYS):
        place = first + tl.arange(0, BLOCK_KEYS)
        known = place < stop
        page = tl.load(table + place // PAGE_SIZE, mask=known, other=0)
        where = (page.to(tl.int64) * PAGE_STRIDE + (place % PAGE_SIZE) * ROW_STRIDE)[:, None] + dim[None, :]
        # Zeros for what is not known: unwritten memory may hold NaN, and 0 * NaN is NaN.
        key = tl.load(keys + where, mask=known[:, None] & in_dim[None, :], other=0.0).to(query.dtype)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP > 0:
            logits = soft_cap(logits, SOFTCAP)
        distance = position[:, None] - place[None, :]
        visible = known[None, :] & (distance >= nearest)
        if farthest is not None:
            visible = visible & (distance < farthest)
        above = (logits <= theta[:, None]) == 0  # what is not a number is read too, and tells on the output
        if UNION:
            of_query = tl.reshape(above.to(tl.int32), [BLOCK_ROWS // FOLD, FOLD, BLOCK_KEYS])
            by_any = tl.max(of_query, 1)[:, None, :].broadcast_to(BLOCK_ROWS // FOLD, FOLD, BLOCK_KEYS)
            above = tl.reshape(by_any, [BLOCK_ROWS, BLOCK_KEYS]) > 0
        always = (place < sink_tokens)[None, :] | (distance < recent_tokens)
        read = (above | always) & visible & row_valid[:, None]
        logits = tl.where(visible, logits * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # A row that has seen nothing yet has peak -inf, and -inf - -inf is NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(peak - shift)
        kept = tl.where(read, weights, 0.0)
        total = total * decay + tl.sum(kept, 1)
        dropped = dropped * decay + tl.sum(weights - kept, 1)
        count += tl.sum(read.to(tl.int32), 1)
        acc = acc * decay[:, None]
        peak = higher
        # Only those values are loaded that some row of this program reads.
        wanted = tl.max(read.to(tl.int32), 0)
        if tl.max(wanted, 0) > 0:
            value = tl.load(values + where, mask=(wanted > 0)[:, None] & in_dim[None, :], other=0.0).to(query.dtype)
            acc = tl.dot(kept.to(query.dtype), value, acc, input_precision="ieee")
    return acc, peak, total, dropped, count


@triton.jit
def compensated(
    peak,  # [ROWS], likewise total, dropped, count, theta, visible
    total,
    dropped,
    count,
    theta,
    visible,
    expected,  # [ROWS], or None
    scale,
    sink,  # a logit per row, or None; stays out of lse
    MODE: tl.constexpr,
):
    """Per row what the sum over the values read is multiplied by, the probability left out, and lse."""
    if MODE == _EXACT:
        rest = dropped
    elif MODE == _BOUND:
        rest = (visible - count).to(tl.float32) * tl.exp2(theta * LOG2E - peak)
    elif MODE == _GIVEN:
        rest = expected
    else:
        rest = tl.zeros_like(total)
    # Where nothing is left out there is nothing to make up for, whatever was expected.
    rest = tl.where(count < visible, rest * scale, 0.0)
    unseen = total <= 0
    lse = tl.where(unseen, float("-inf"), (peak + tl.log2(tl.where(unseen, 1.0, total))) * LN2)
    factor = tl.full(total.shape, 1.0, tl.float32)
    whole = total + rest
    if sink is not None:
        sink = sink.to(tl.float32) * LOG2E
        # The sink may be far above every logit, so it takes part in the shift.
        top = tl.maximum(peak, sink)
        shift = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.exp2(peak - shift)
        whole = whole * factor + tl.exp2(sink - shift)
    factor = factor / tl.where(whole <= 0, 1.0, whole)
    return factor, rest * factor, lse


def shared_arguments(query: torch.Tensor, view: PagedView, plan: ScoreThreshold, spec: AttentionSpec) -> dict[str, Any]:
    """Arguments that prefill and decode share."""
    return key_arguments(view, spec) | {
        "query": query,
        "theta": plan.theta.float().contiguous(),
        "expected": None if plan.expected is None else plan.expected.float().contiguous(),
        "dropped_scale": float(plan.dropped_scale),
        "MODE": MODES[plan.dropped_sum],
        "sink_tokens": plan.sink_tokens,
        "recent_tokens": plan.recent_tokens,
        "GROUP": query.shape[1] // view.num_kv_heads,
        "UNION": plan.union,
        "QUERY_STRIDE": query.stride(0),
        "QUERY_HEAD_STRIDE": query.stride(1),
    }
