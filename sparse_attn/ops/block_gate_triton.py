"""MoBA's gate on a GPU: block means once, then the best blocks of each query without the matrix of all gates.

As in FlashMoBA (arXiv:2511.11571, section 4): a program holds the best blocks of its queries in registers, sorted, and
merges one tile of gates after the other into them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.kv_cache.stats import KEY_SUM
from foveate.kv_cache.view import PagedView

from .launch import Launch, last_dim_dense
from .tiling import Tiling, power_of_two

# Best blocks that a program can hold without spills: two lists of them, in 64 bits, for 16 queries.
MAX_TOP_K = 64
# Channels per step of a gate's product.
_CHANNELS = 32
_LEAST = tl.constexpr(-(2**63))
_NONE = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["blocks", "table_stride"])
def block_mean_kernel(
    means,  # [S, G, U, D] float32
    rows,  # page sums [P, G, D] float32, or keys [P, G, page_size, D]
    block_tables,
    context_lens,
    blocks,
    table_stride,
    PAGE_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PER_PAGE: tl.constexpr,  # rows that a page has of a head: 1 sum, or its keys
    BLOCK_TOKENS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Program (block, KV head, sequence): the mean of a full block; zeros where there is none."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, BLOCK_DIM)
    in_dim = dim < HEAD_DIM
    total = tl.zeros([BLOCK_DIM], tl.float32)
    if (block + 1) * BLOCK_TOKENS <= tl.load(context_lens + sequence):
        PER_ROW: tl.constexpr = PAGE_SIZE // PER_PAGE
        COUNT: tl.constexpr = BLOCK_TOKENS // PER_ROW
        for first in range(0, COUNT, BLOCK_ROWS):
            place = first + tl.arange(0, BLOCK_ROWS)
            token = block * BLOCK_TOKENS + place * PER_ROW
            valid = place < COUNT
            page = tl.load(block_tables + sequence * table_stride + token // PAGE_SIZE, mask=valid, other=0)
            at = page.to(tl.int64) * PAGE_STRIDE + head * HEAD_STRIDE + token % PAGE_SIZE // PER_ROW * ROW_STRIDE
            part = tl.load(rows + at[:, None] + dim[None, :], mask=valid[:, None] & in_dim[None, :], other=0.0)
            total += tl.sum(part.to(tl.float32), 0)
    target = ((sequence * tl.num_programs(1) + head) * blocks + block) * HEAD_DIM
    tl.store(means + target + dim, total / BLOCK_TOKENS, mask=in_dim)


@triton.jit
def _gates(query, mean, gates, EXACT: tl.constexpr):
    """``gates + query . mean`` in float32. A 16-bit query is exact, and three parts of its type hold a float32 mean."""
    if EXACT:
        return tl.dot(query, tl.trans(mean), gates, input_precision="ieee")
    high = mean.to(query.dtype)
    rest = mean - high.to(tl.float32)
    middle = rest.to(query.dtype)
    low = (rest - middle.to(tl.float32)).to(query.dtype)
    gates = tl.dot(query, tl.trans(low), gates)
    gates = tl.dot(query, tl.trans(middle), gates)
    return tl.dot(query, tl.trans(high), gates)


@triton.jit(do_not_specialize=["query_blocks", "blocks"])
def block_gate_kernel(
    query,
    means,  # [S, G, U, D] float32
    indices,  # [T, K, top_k] int32
    counts,  # [T, K] int32
    first_block,  # [T] int32
    end_block,  # [T] int32
    query_offsets,
    context_lens,
    query_blocks,
    blocks,
    QUERY_STRIDE: tl.constexpr,
    QUERY_HEAD_STRIDE: tl.constexpr,
    FOLD: tl.constexpr,  # query heads that choose together
    GROUP: tl.constexpr,  # query heads per KV head
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
):
    """Program (sequence x block of queries, head): the best blocks of some queries of one sequence."""
    sequence = (tl.program_id(0) // query_blocks).to(tl.int64)
    # The last queries have the most candidates: longest first leaves no long tail.
    first_query = (query_blocks - 1 - tl.program_id(0) % query_blocks) * BLOCK_ROWS
    kind = tl.program_id(1)
    start = tl.load(query_offsets + sequence)
    count = tl.load(query_offsets + sequence + 1) - start
    if first_query >= count:
        return
    local = first_query + tl.arange(0, BLOCK_ROWS)
    valid = local < count
    token = (start + local).to(tl.int64)
    own = (tl.load(context_lens + sequence) - count + local) // BLOCK_TOKENS
    first = tl.load(first_block + token, mask=valid, other=0)
    end = tl.load(end_block + token, mask=valid, other=0)
    slot = tl.arange(0, BLOCK_LIST)
    kv_head = kind * FOLD // GROUP
    mean_base = means + ((sequence * (tl.num_programs(1) * FOLD // GROUP) + kv_head) * blocks) * HEAD_DIM
    best = tl.full([BLOCK_ROWS, BLOCK_LIST], _LEAST, tl.int64)
    EXACT: tl.constexpr = query.dtype.element_ty.primitive_bitwidth > 16
    if TOP_K > 1:
        for begin in range(tl.min(first), tl.max(end), BLOCK_LIST):
            block = begin + slot
            gates = tl.zeros([BLOCK_ROWS, BLOCK_LIST], tl.float32)
            # A few channels at a time: three parts of all channels of the means would spill.
            for part in range(0, HEAD_DIM, BLOCK_DIM):
                dim = part + tl.arange(0, BLOCK_DIM)
                in_dim = dim < HEAD_DIM
                known = (block < blocks)[:, None] & in_dim[None, :]
                mean = tl.load(mean_base + block[:, None] * HEAD_DIM + dim[None, :], mask=known, other=0.0)
                for fold in tl.static_range(FOLD):
                    at = token * QUERY_STRIDE + (kind * FOLD + fold) * QUERY_HEAD_STRIDE
                    known = valid[:, None] & in_dim[None, :]
                    asked = tl.load(query + at[:, None] + dim[None, :], mask=known, other=0.0)
                    gates = _gates(asked, mean, gates, EXACT)
            # The bits of a float ascend with it if those of a negative one are turned round; -0 + 0 is 0.
            bits = (gates + 0.0).to(tl.int32, bitcast=True)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            # Of equal gates the later block is higher, so what is chosen depends on nothing else.
            key = (bits.to(tl.int64) << 32) | block[None, :].to(tl.int64)
            candidate = (block[None, :] >= first[:, None]) & (block[None, :] < end[:, None])
            key = tl.where(candidate, key, _LEAST)
            # One list descends and the other ascends: the larger of each pair are the best of both.
            best = tl.sort(tl.maximum(best, tl.sort(key)), descending=True)
    chosen = (slot[None, :] < TOP_K - 1) & (best != _LEAST)
    place = tl.where(chosen, (best & 0x7FFFFFFF).to(tl.int32), _NONE)
    # The own block takes a place that no other has, and comes last once they ascend.
    place = tl.where(slot[None, :] == TOP_K - 1, own[:, None], place)
    place = tl.sort(place)
    row = token * tl.num_programs(1) + kind
    stored = valid[:, None] & (slot < TOP_K)[None, :]
    tl.store(indices + row[:, None] * TOP_K + slot[None, :], tl.where(place == _NONE, -1, place), mask=stored)
    tl.store(counts + row, tl.sum(chosen.to(tl.int32), 1) + 1, mask=valid)


def mean_plan(view: PagedView, block_tokens: int, means: torch.Tensor) -> Launch:
    """Grid, arguments and compile options of the means ``[S, G, U, D]``."""
    sums = view.pages.stats.get(KEY_SUM) if block_tokens % view.page_size == 0 else None
    rows = view.pages.keys if sums is None else sums
    # Keys of one block at most, or sums of one: all else would be loaded in vain.
    count = block_tokens if sums is None else block_tokens // view.page_size
    tiling = Tiling(min(power_of_two(count), 16), 1, num_warps=1, num_stages=1)
    arguments = {
        "means": means,
        "rows": rows,
        "block_tables": view.rows.block_tables,
        "context_lens": view.rows.context_lens,
        "blocks": means.shape[2],
        "table_stride": view.rows.block_tables.stride(0),
        "PAGE_STRIDE": rows.stride(0),
        "HEAD_STRIDE": rows.stride(1),
        "ROW_STRIDE": rows.stride(2) if sums is None else 0,
        "PER_PAGE": view.page_size if sums is None else 1,
        "BLOCK_TOKENS": block_tokens,
        "PAGE_SIZE": view.page_size,
        "HEAD_DIM": view.head_dim,
        "BLOCK_DIM": max(16, power_of_two(view.head_dim)),
        "BLOCK_ROWS": tiling.rows,
    }
    return Launch(block_mean_kernel, (means.shape[2], view.num_kv_heads, view.rows.num_sequences), arguments, tiling)


def gate_plan(
    query: torch.Tensor,
    view: PagedView,
    block_tokens: int,
    candidates: tuple[torch.Tensor, torch.Tensor],
    means: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
) -> Launch:
    """Grid, arguments and compile options of the gate."""
    heads, kinds, top_k = query.shape[1], *indices.shape[1:]
    listed = max(16, power_of_two(top_k))
    # Two lists of 64-bit keys per query stay in registers: 167 of them, where the compiler alone would stop at 128.
    tiling = Tiling(max(16, min(64, 1024 // listed)), listed, num_warps=4, num_stages=1, most_registers=224)
    query_blocks = -(-max(view.rows.host_query_lens) // tiling.rows)
    arguments = {
        "query": query,
        "means": means,
        "indices": indices,
        "counts": counts,
        "first_block": candidates[0],
        "end_block": candidates[1],
        "query_offsets": view.rows.query_offsets,
        "context_lens": view.rows.context_lens,
        "query_blocks": query_blocks,
        "blocks": means.shape[2],
        "QUERY_STRIDE": query.stride(0),
        "QUERY_HEAD_STRIDE": query.stride(1),
        "FOLD": heads // kinds,
        "GROUP": heads // view.num_kv_heads,
        "TOP_K": top_k,
        "BLOCK_TOKENS": block_tokens,
        "HEAD_DIM": view.head_dim,
        "BLOCK_DIM": min(_CHANNELS, max(16, power_of_two(view.head_dim))),
        "BLOCK_ROWS": tiling.rows,
        "BLOCK_LIST": tiling.keys,
    }
    return Launch(block_gate_kernel, (view.rows.num_sequences * query_blocks, kinds), arguments, tiling)


def gate_blocks(
    query: torch.Tensor,
    view: PagedView,
    block_tokens: int,
    top_k: int,
    candidates: tuple[torch.Tensor, torch.Tensor],
    pooled: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.gate_blocks``; ``top_k`` is at most ``MAX_TOP_K``. Beside the result it holds the means."""
    query = last_dim_dense(query)
    kinds = view.num_kv_heads if pooled else query.shape[1]
    blocks = max((context // block_tokens for context in view.rows.host_context_lens), default=0)
    shape = (view.rows.num_sequences, view.num_kv_heads, blocks, view.head_dim)
    means = torch.empty(shape, dtype=torch.float32, device=query.device)
    indices = torch.empty((query.shape[0], kinds, top_k), dtype=torch.int32, device=query.device)
    counts = torch.empty(indices.shape[:2], dtype=torch.int32, device=query.device)
    if means.numel():
        mean_plan(view, block_tokens, means).run()
    if query.numel():
        gate_plan(query, view, block_tokens, candidates, means, indices, counts).run()
    return indices, counts
