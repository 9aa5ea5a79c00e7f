"""Decode attention over pages on a CPU, in torch: pages are read where they lie.

Every whole page of every sequence is one entry of a batch, and its partial results are merged per
sequence by log-sum-exp. Pages that lie side by side in the pool are read through a view, without
a copy; a copy of K and V first would triple the bytes moved, and decode is bound by bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.kv_cache.view import PagedView, Rows

from ..protocol import AttentionSpec
from ..selection import Band, Selection
from . import attention_torch
from .attention_torch import Result

# A view of a run of pages costs one kernel call, about 30 us; copying one page costs about 20 us.
MIN_PAGES_PER_RUN = 4
# Up to so many pages with hidden keys are sliced one by one (one call each) instead of gathered and masked (seven).
MAX_SLICED_EDGES = 4


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """Where the visible keys of each sequence lie.

    Attributes:
        runs: ``(first page, pages)`` of whole pages side by side, or ``None`` to gather ``whole``.
        whole: ``[W]`` physical pages all of whose keys are visible.
        whole_owner: ``[W]`` the sequence of each.
        spans: ``(page, sequence, first visible, end of visible)`` of the E pages with some keys hidden.
        edges: ``[E]`` these pages.
        edge_owner: ``[E]``.
        edge_hidden: ``[E, page_size]`` bool.
    """

    runs: list[tuple[int, int]] | None
    whole: torch.Tensor
    whole_owner: torch.Tensor
    spans: list[tuple[int, int, int, int]]
    edges: torch.Tensor
    edge_owner: torch.Tensor
    edge_hidden: torch.Tensor


def decode(query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec) -> Result:
    """See ``ops.decode``."""
    if selection is not None or spec.softcap:
        return attention_torch.prefill(query, view, selection, spec)
    key = ("decode_torch", spec.band)
    plan = view.rows.plans.get(key)
    if plan is None:
        plan = view.rows.plans[key] = _plan(view.rows, view.page_size, spec.band)
    sequences, heads, dim = query.shape
    kv_heads = view.num_kv_heads
    rows = query.view(sequences, kv_heads, heads // kv_heads, dim)
    outs: list[torch.Tensor] = []
    lses: list[torch.Tensor] = []
    pools = view.pages.key_rows(query.dtype), view.pages.value_rows(query.dtype)
    if plan.runs is None:
        keys, values = (pool.pages(plan.whole) for pool in pools)
        _append(outs, lses, rows[plan.whole_owner], keys, values, spec.scale)
    else:
        done = 0
        for page, count in plan.runs:
            keys, values = (pool[page : page + count] for pool in pools)
            _append(outs, lses, rows[plan.whole_owner[done : done + count]], keys, values, spec.scale)
            done += count
    if len(plan.spans) <= MAX_SLICED_EDGES:
        for page, sequence, first, last in plan.spans:
            keys, values = (pool[page : page + 1, :, first:last] for pool in pools)
            _append(outs, lses, rows[sequence : sequence + 1], keys, values, spec.scale)
    else:
        keys, values = (pool.pages(plan.edges) for pool in pools)
        # Hidden rows may never have been written: 0 * NaN would be NaN.
        hidden = plan.edge_hidden[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0), values.masked_fill(hidden, 0)
        bias = torch.zeros(hidden.shape[0], 1, 1, view.page_size, dtype=query.dtype)
        bias.masked_fill_(plan.edge_hidden[:, None, None, :], float("-inf"))
        _append(outs, lses, rows[plan.edge_owner], keys, values, spec.scale, bias)
    owner = torch.cat([plan.whole_owner, plan.edge_owner])
    out, lse = _merge_by_owner(torch.cat(outs), torch.cat(lses), owner, sequences) if outs else _nothing(rows)
    return attention_torch.with_sinks(out.reshape(query.shape).to(query.dtype), lse.reshape(sequences, heads), spec)


def _append(
    outs: list[torch.Tensor],
    lses: list[torch.Tensor],
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> None:
    if bias is not None:
        bias = bias.expand(-1, 1, rows.shape[2], -1)
    out, lse = attention_torch.flash(rows, keys, values, scale, mask=bias)
    outs.append(out)
    lses.append(lse)


def _merge_by_owner(out: torch.Tensor, lse: torch.Tensor, owner: torch.Tensor, sequences: int) -> Result:
    """``out [W, G, r, D]``, ``lse [W, G, r]`` summed up per sequence."""
    if sequences == 1:
        total = torch.logsumexp(lse, dim=0, keepdim=True)
        weights = torch.exp(lse - total)
        return torch.einsum("wgrd,wgr->grd", out.float(), weights)[None], total
    spread = owner[:, None, None].expand_as(lse)
    top = torch.full((sequences, *lse.shape[1:]), float("-inf")).scatter_reduce_(0, spread, lse, "amax")
    safe = top.nan_to_num(neginf=0.0)
    weights = torch.exp(lse - safe[owner])
    mass = torch.zeros_like(top).index_add_(0, owner, weights)
    summed = torch.zeros(sequences, *out.shape[1:]).index_add_(0, owner, out.float() * weights[..., None])
    return summed / mass.clamp(min=torch.finfo(torch.float32).tiny)[..., None], safe + mass.log()


def _nothing(rows: torch.Tensor) -> Result:
    return torch.zeros_like(rows, dtype=torch.float32), torch.full(rows.shape[:3], float("-inf"))


def _plan(rows: Rows, page_size: int, band: Band) -> _Plan:
    whole: list[tuple[int, int]] = []  # (page, sequence)
    edges: list[tuple[int, int, int, int]] = []  # (page, sequence, first visible, end of visible)
    for sequence, (context, pages) in enumerate(zip(rows.host_context_lens, rows.host_block_tables, strict=True)):
        end = context - band.nearest
        begin = 0 if band.farthest is None else max(0, context - band.farthest)
        for logical in range(begin // page_size, -(-max(end, begin) // page_size)):
            first, last = max(begin - logical * page_size, 0), min(end - logical * page_size, page_size)
            if (first, last) == (0, page_size):
                whole.append((pages[logical], sequence))
            elif first < last:
                edges.append((pages[logical], sequence, first, last))
    runs: list[tuple[int, int]] = []
    for page, _ in whole:
        if runs and page == runs[-1][0] + runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    offsets = torch.arange(page_size)
    span = torch.tensor([edge[2:] for edge in edges], dtype=torch.int64).reshape(-1, 2)
    table = torch.tensor(whole, dtype=torch.int64).reshape(-1, 2)
    edge_table = torch.tensor([edge[:2] for edge in edges], dtype=torch.int64).reshape(-1, 2)
    return _Plan(
        runs if len(runs) * MIN_PAGES_PER_RUN <= len(whole) or not whole else None,
        table[:, 0],
        table[:, 1],
        edges,
        edge_table[:, 0],
        edge_table[:, 1],
        (offsets < span[:, :1]) | (offsets >= span[:, 1:]),
    )
