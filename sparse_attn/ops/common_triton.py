"""What the attention kernels share: finding keys through the block table, and the online softmax."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def soft_cap(logits, CAP: tl.constexpr):
    """``CAP * tanh(logits / CAP)``; by ``exp2``, which is one instruction, and never overflows here."""
    decay = tl.exp2(tl.abs(logits) * (-2.0 * LOG2E / CAP))
    capped = CAP * (1.0 - decay) / (1.0 + decay)
    return tl.where(logits < 0, -capped, capped)


@triton.jit
def places(
    indices,  # selection row
    count,
    end,
    UNIT: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Places that ``count`` units take: all of theirs, but of the last one none from position ``end`` on.

    Where a unit is not longer than a block of keys, the end of the last one saves no block, and is left on.
    """
    stop = count * UNIT
    if UNIT > BLOCK_KEYS:
        last = tl.load(indices + count - 1, mask=count > 0, other=0)
        stop = tl.maximum(stop - tl.minimum(tl.maximum((last + 1) * UNIT - end, 0), UNIT), 0)
    return stop


@triton.jit
def attend(
    query,  # [BLOCK_ROWS, BLOCK_DIM]
    position,  # [BLOCK_ROWS] position of each row's query
    acc,  # [BLOCK_ROWS, BLOCK_DIM] float32, not yet divided by total
    peak,  # [BLOCK_ROWS] largest logit so far, in units of log 2
    total,  # [BLOCK_ROWS] sum of exp2(logit - peak)
    start,
    stop,
    context,
    keys,  # at this KV head; likewise values
    values,
    table,  # block table of this sequence
    indices,  # selection row, or None: every position from start to stop
    scale,
    nearest,
    farthest,
    PAGE_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,  # tokens per index
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees every key from start to stop, a multiple of BLOCK_KEYS
):
    """One online-softmax pass over the key places ``start..stop``.

    A place is a position, or, under a selection, a token of the list of selected units.
    """
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    for first in range(start, stop, BLOCK_KEYS):
        place = first + tl.arange(0, BLOCK_KEYS)
        if indices is None:
            key_position = place
            known = place < stop
        else:
            unit = tl.load(indices + place // UNIT, mask=place < stop, other=-1)
            key_position = unit * UNIT + place % UNIT
            # The last unit may reach beyond the context, into slots that were never written.
            known = (unit >= 0) & (key_position < context)
        page = tl.load(table + key_position // PAGE_SIZE, mask=known, other=0)
        row = page.to(tl.int64) * PAGE_STRIDE + (key_position % PAGE_SIZE) * ROW_STRIDE
        where = row[:, None] + dim[None, :]
        # Zeros for what is not known: unwritten memory may hold NaN, and 0 * NaN is NaN.
        readable = known[:, None] & in_dim[None, :]
        key = tl.load(keys + where, mask=readable, other=0.0).to(query.dtype)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP > 0:
            logits = soft_cap(logits, SOFTCAP)
        logits = logits * LOG2E
        if MASKED:
            distance = position[:, None] - key_position[None, :]
            visible = known[None, :] & (distance >= nearest)
            if farthest is not None:
                visible = visible & (distance < farthest)
            logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        # A row that has seen nothing yet has peak -inf, and -inf - -inf is NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        value = tl.load(values + where, mask=readable, other=0.0).to(query.dtype)
        acc = tl.dot(weights.to(query.dtype), value, acc * decay[:, None], input_precision="ieee")
        peak = higher
    return acc, peak, total


@triton.jit
def finish(acc, peak, total, sink):
    """``(out, lse)`` of each row; ``sink`` is a logit per row, or None, and stays out of ``lse``."""
    seen = total != 0  # NaN is seen, and shows in what parts are joined to
    lse = tl.where(seen, (peak + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    if sink is not None:
        sink = sink.to(tl.float32) * LOG2E
        # The sink may be far above every logit, so it takes part in the shift.
        top = tl.maximum(peak, sink)
        shift = tl.where(top == float("-inf"), 0.0, top)
        decay = tl.exp2(peak - shift)
        acc = acc * decay[:, None]
        total = total * decay + tl.exp2(sink - shift)
    return acc / tl.where(total > 0, total, 1.0)[:, None], lse
