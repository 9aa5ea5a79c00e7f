"""MoBA's gate on a CPU, by the compiled kernels of ``native/``."""

from __future__ import annotations

import ctypes

import torch

from foveate.kv_cache.view import PagedView

from .block_gate_torch import block_means
from .native import DTYPES, ISAS, GateCall, library


def supports(query: torch.Tensor, view: PagedView) -> bool:
    """Can the kernels compute this call? They take float32 and bfloat16, and head dims divisible by 16."""
    on_cpu = query.device.type == "cpu" and query.dtype in DTYPES
    return on_cpu and view.head_dim % 16 == 0 and library() is not None


def gate_blocks(
    query: torch.Tensor,
    view: PagedView,
    block_tokens: int,
    top_k: int,
    candidates: tuple[torch.Tensor, torch.Tensor],
    pooled: bool,
    *,
    isa: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``ops.gate_blocks``. Beside the result it holds the block means of one sequence.

    ``isa`` is for tests.
    """
    kernels = library()
    if kernels is None:
        raise RuntimeError("the native CPU kernels were not built")
    if query.stride(2) != 1:
        query = query.contiguous()
    rows = view.rows
    tokens, heads, dim = query.shape
    kinds = view.num_kv_heads if pooled else heads
    indices = torch.empty(tokens, kinds, top_k, dtype=torch.int32)
    counts = torch.empty(tokens, kinds, dtype=torch.int32)
    first, end = (bound.to(torch.int32).contiguous() for bound in candidates)
    start = 0
    for sequence, (context, count) in enumerate(zip(rows.host_context_lens, rows.host_query_lens, strict=True)):
        part = slice(start, start + count)
        start += count
        if not count:
            continue
        means = block_means(view, sequence, block_tokens, (context - 1) // block_tokens).contiguous()
        call = GateCall(
            query=query[part].data_ptr(),
            means=means.data_ptr(),
            first=first[part].data_ptr(),
            end=end[part].data_ptr(),
            indices=indices[part].data_ptr(),
            counts=counts[part].data_ptr(),
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            queries=count,
            position=context - count,
            blocks=means.shape[1],
            block_tokens=block_tokens,
            top_k=top_k,
            num_heads=heads,
            num_kv_heads=view.num_kv_heads,
            kinds=kinds,
            head_dim=dim,
            dtype=DTYPES[query.dtype],
            isa=ISAS.index(isa or kernels.isa),
            num_threads=torch.get_num_threads(),
        )
        if kernels.gate(ctypes.byref(call)):
            raise MemoryError("no memory for the scratch space of the gate's kernels")
    return indices, counts
