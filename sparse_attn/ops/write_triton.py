"""Scatter of new keys and values into pages, with the statistics of those pages."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from foveate.kv_cache.stats import Fold, PageStat
from foveate.kv_cache.view import LayerPages

from .launch import Launch, last_dim_dense
from .tiling import Tiling, power_of_two

_STATS = tuple(PageStat(source, fold) for source in ("key", "value") for fold in Fold)


@triton.jit
def _fold_run(
    rows,  # key or value at its first token and this head
    kept,  # the statistic of this page and head
    length,
    offset,
    ROW_STRIDE: tl.constexpr,
    stored_type: tl.constexpr,
    FOLD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Folds ``length`` rows into ``kept``; a run that starts at offset 0 forgets what it held."""
    if FOLD == "sum":
        empty = 0.0
    elif FOLD == "min":
        empty = float("inf")
    else:
        empty = float("-inf")
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    held = tl.where(offset > 0, tl.load(kept + dim, mask=in_dim, other=empty), empty)
    for first in range(0, length, BLOCK_TOKENS):
        place = first + tl.arange(0, BLOCK_TOKENS)
        valid = (place < length)[:, None] & in_dim[None, :]
        tile = tl.load(rows + (place.to(tl.int64) * ROW_STRIDE)[:, None] + dim[None, :], mask=valid, other=0.0)
        # Through the pool's type: the statistic is that of the rows as stored.
        tile = tl.where(valid, tile.to(stored_type).to(tl.float32), empty)
        if FOLD == "sum":
            held += tl.sum(tile, 0)
        elif FOLD == "min":
            held = tl.minimum(held, tl.min(tile, 0))
        else:
            held = tl.maximum(held, tl.max(tile, 0))
    tl.store(kept + dim, held, mask=in_dim)


@triton.jit(do_not_specialize=["num_tokens"])
def write_kernel(
    key,
    value,
    slots,
    keys,
    values,
    key_sum,  # [P, G, D] float32 each, or None where not declared
    key_min,
    key_max,
    value_sum,
    value_min,
    value_max,
    num_tokens,
    num_heads,
    KEY_STRIDE: tl.constexpr,
    KEY_HEAD_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    VALUE_HEAD_STRIDE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Program (token, KV head). That of the first token of a page's run also folds the whole run."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    page = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    key += token * KEY_STRIDE + head * KEY_HEAD_STRIDE
    value += token * VALUE_STRIDE + head * VALUE_HEAD_STRIDE
    stored_type: tl.constexpr = keys.dtype.element_ty
    at = page * PAGE_STRIDE + head * HEAD_STRIDE + offset * ROW_STRIDE + dim
    tl.store(keys + at, tl.load(key + dim, mask=in_dim).to(stored_type), mask=in_dim)
    tl.store(values + at, tl.load(value + dim, mask=in_dim).to(stored_type), mask=in_dim)
    if HAS_STATS:
        before = tl.load(slots + token - 1, mask=token > 0, other=-1)
        # Division truncates: -1 // PAGE_SIZE would be page 0.
        if (before >= 0) & (before // PAGE_SIZE == page):
            return
        # The tokens of a page stand together, so counting those that follow measures the run.
        ahead = tl.arange(0, PAGE_SIZE)
        following = tl.load(slots + token + ahead, mask=token + ahead < num_tokens, other=-1)
        length = tl.sum(((following >= 0) & (following // PAGE_SIZE == page)).to(tl.int32), 0)
        stat = (page * num_heads + head) * HEAD_DIM
        if key_sum is not None:
            _fold_run(
                key, key_sum + stat, length, offset, KEY_STRIDE, stored_type,
                "sum", HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS,
            )  # fmt: skip
        if key_min is not None:
            _fold_run(
                key, key_min + stat, length, offset, KEY_STRIDE, stored_type,
                "min", HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS,
            )  # fmt: skip
        if key_max is not None:
            _fold_run(
                key, key_max + stat, length, offset, KEY_STRIDE, stored_type,
                "max", HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS,
            )  # fmt: skip
        if value_sum is not None:
            _fold_run(
                value, value_sum + stat, length, offset, VALUE_STRIDE, stored_type,
                "sum", HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS,
            )  # fmt: skip
        if value_min is not None:
            _fold_run(
                value, value_min + stat, length, offset, VALUE_STRIDE, stored_type,
                "min", HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS,
            )  # fmt: skip
        if value_max is not None:
            _fold_run(
                value, value_max + stat, length, offset, VALUE_STRIDE, stored_type,
                "max", HEAD_DIM, BLOCK_DIM, BLOCK_TOKENS,
            )  # fmt: skip


def plan(key: torch.Tensor, value: torch.Tensor, pages: LayerPages, slots: torch.Tensor) -> Launch:
    """Grid, arguments and compile options of one write.

    Raises:
        ValueError: K and V are laid out differently, or a statistic is not contiguous, or is one of runs.
    """
    tokens, heads, dim = key.shape
    if pages.quantized:
        raise ValueError("the Triton kernels do not write int8 pages")
    if pages.keys.stride() != pages.values.stride() or pages.keys.stride(3) != 1:
        raise ValueError("K and V pages need equal strides, and 1 between channels")
    if not all(kept.is_contiguous() for kept in pages.stats.values()):
        raise ValueError("page statistics must be contiguous")
    if not pages.stats.keys() <= set(_STATS):
        raise ValueError("the Triton kernels keep statistics of whole pages only")
    arguments: dict[str, Any] = {stat.name: pages.stats.get(stat) for stat in _STATS} | {
        "key": key,
        "value": value,
        "slots": slots,
        "keys": pages.keys,
        "values": pages.values,
        "num_tokens": tokens,
        "num_heads": heads,
        "KEY_STRIDE": key.stride(0),
        "KEY_HEAD_STRIDE": key.stride(1),
        "VALUE_STRIDE": value.stride(0),
        "VALUE_HEAD_STRIDE": value.stride(1),
        "PAGE_STRIDE": pages.keys.stride(0),
        "HEAD_STRIDE": pages.keys.stride(1),
        "ROW_STRIDE": pages.keys.stride(2),
        "HAS_STATS": bool(pages.stats),
        "PAGE_SIZE": pages.page_size,
        "HEAD_DIM": dim,
        "BLOCK_DIM": power_of_two(dim),
        "BLOCK_TOKENS": 8,
    }
    return Launch(write_kernel, (tokens, heads), arguments, Tiling(rows=1, keys=0, num_warps=1, num_stages=1))


def write_kv(key: torch.Tensor, value: torch.Tensor, pages: LayerPages, slots: torch.Tensor) -> None:
    """See ``ops.write_kv``."""
    if key.numel():
        plan(last_dim_dense(key), last_dim_dense(value), pages, slots.contiguous()).run()
