"""Which blocks of keys each query attends to by MoBA's gate: ``gate_blocks``."""

from __future__ import annotations

from typing import Literal

import torch

from foveate.kv_cache.view import PagedView

from . import block_gate_native, block_gate_torch, reference_block_gate

Backend = Literal["reference", "torch", "native", "triton"]


def gate_blocks(
    query: torch.Tensor,
    view: PagedView,
    block_tokens: int,
    top_k: int,
    candidates: tuple[torch.Tensor, torch.Tensor],
    *,
    pooled: bool = False,
    backend: Backend | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The query's own block and the ``top_k - 1`` past ones with the highest ``q . mean(K of the block)``.

    Block ``j`` holds the keys at positions ``j * block_tokens`` to ``(j + 1) * block_tokens - 1``. The
    gate is taken in float32, without the softmax's scale, per query and query head; of equal blocks
    the later one is chosen (MoBA, arXiv:2502.13189, section 2.2).

    Args:
        query: ``[T, H, D]``, the queries of ``view.rows`` one sequence after another.
        view: Keys of this step are written. Where the pages keep ``KEY_SUM`` and a block is made of
            whole pages, no key is read.
        block_tokens: A power of two.
        top_k: Blocks per query, its own among them; at least 1.
        candidates: ``(first, end)`` ``[T]`` int32: only the blocks ``first`` to ``end - 1`` may be
            chosen beside the own one; ``end`` is at most the own block.
        pooled: One choice per KV head, by the sum of its group's gates.
        backend: For tests.

    Returns:
        ``(indices [T, H or G, top_k] int32, ascending and padded by -1, counts [T, H or G] int32)``.

    Raises:
        ValueError: shapes do not fit.
    """
    tokens, heads, dim = query.shape
    if tokens != view.rows.num_queries or dim != view.head_dim or heads % view.num_kv_heads:
        raise ValueError(
            f"queries {tuple(query.shape)} do not fit {view.rows.num_queries} tokens "
            f"and {view.num_kv_heads} KV heads of {view.head_dim}"
        )
    if top_k < 1 or block_tokens < 1 or block_tokens & (block_tokens - 1):
        raise ValueError(f"top_k {top_k} must be at least 1, block_tokens {block_tokens} a power of two")
    if backend == "reference":
        return reference_block_gate.gate_blocks(query, view, block_tokens, top_k, candidates, pooled)
    chosen = backend or _default_backend(query, view, top_k)
    if chosen == "triton":
        from . import block_gate_triton

        return block_gate_triton.gate_blocks(query, view, block_tokens, top_k, candidates, pooled)
    if chosen == "native":
        return block_gate_native.gate_blocks(query, view, block_tokens, top_k, candidates, pooled)
    return block_gate_torch.gate_blocks(query, view, block_tokens, top_k, candidates, pooled)


def _default_backend(query: torch.Tensor, view: PagedView, top_k: int) -> Backend:
    if not query.is_cuda:
        return "native" if block_gate_native.supports(query, view) else "torch"
    from . import block_gate_triton

    return "triton" if top_k <= block_gate_triton.MAX_TOP_K else "torch"
