"""Attention over pages on a CPU, in torch.

Two ways to compute a block of queries against gathered keys, with the GQA group folded into the
rows so that a KV head's keys are read once for its whole group:

- ``_fused``: torch's own CPU flash attention, which also returns the log-sum-exp. Measured, in
  GFLOP/s against two GEMMs and a softmax: float32 on AVX2 125..130 against 70..95; bfloat16 on
  AMX 530..650 against 55..190.
- ``_two_gemms``: for what the fused kernel cannot do (soft cap).
"""

from __future__ import annotations

import torch

from foveate.kv_cache.stored import StoredRows
from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Band, Selection
from .cpu import has_bfloat16_products
from .reference import gather_sequence

Result = tuple[torch.Tensor, torch.Tensor]

# Queries per block. Dense blocks are long, since only a block's own diagonal is computed in vain;
# blocks under a band are short, because each reads the band plus its own length.
DENSE_BLOCK, BAND_BLOCK = 512, 128


def prefill(query: torch.Tensor, view: PagedView, selection: Selection | None, spec: AttentionSpec) -> Result:
    """See ``ops.prefill``."""
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:2], dtype=torch.float32)
    if selection is None:
        start = 0
        for sequence, count in enumerate(view.rows.host_query_lens):
            part = slice(start, start + count)
            out[part], lse[part] = _dense_sequence(query[part], view, sequence, spec)
            start += count
    else:
        # One list, one wait: the counts of all rows.
        widths = selection.counts.amax(dim=1).tolist()
        for row, (sequence, start, count, position) in enumerate(selection.tiles.host):
            part = slice(start, start + count)
            out[part], lse[part] = _selected_tile(
                query[part], view, sequence, position, selection, row, widths[row], spec
            )
    return with_sinks(out, lse, spec)


def _dense_sequence(query: torch.Tensor, view: PagedView, sequence: int, spec: AttentionSpec) -> Result:
    count = query.shape[0]
    first = view.rows.host_context_lens[sequence] - count
    keys, values = gather_sequence(view, sequence, query.dtype)
    plain = spec.band == Band() and not spec.softcap
    block = DENSE_BLOCK if spec.band == Band() else BAND_BLOCK
    outs, lses = [], []
    for start in range(0, count, block):
        part = query[start : start + block]
        position, end = first + start, first + start + part.shape[0]
        if plain:
            out, lse = _causal_block(part, keys[:, :end], values[:, :end], position, spec)
        else:
            begin = 0 if spec.band.farthest is None else max(0, position - spec.band.farthest + 1)
            seen = torch.arange(begin, max(begin, end - spec.band.nearest))
            mask = _band_mask(position, part.shape[0], seen, spec.band)
            out, lse = _block(
                part, keys[:, begin : begin + len(seen)], values[:, begin : begin + len(seen)], mask, spec
            )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _causal_block(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, spec: AttentionSpec
) -> Result:
    """Queries ``[n, H, D]`` at ``position`` on, over keys ``[G, position + n, D]``, causal.

    The keys before the block need no mask, and the block's own square is what the fused kernel
    calls causal, so no mask is ever made.
    """
    group = query.shape[1] // keys.shape[0]
    own = [part[:, position:].repeat_interleave(group, dim=0)[None] for part in (keys, values)]
    out, lse = flash(query.transpose(0, 1)[None], own[0], own[1], spec.scale, causal=True)
    square = out[0].transpose(0, 1), lse[0].T
    if position == 0:
        return square
    before = _block(query, keys[:, :position], values[:, :position], None, spec)
    total = torch.logaddexp(before[1], square[1])
    merged = before[0].float() * torch.exp(before[1] - total)[..., None]
    merged += square[0].float() * torch.exp(square[1] - total)[..., None]
    return merged.to(query.dtype), total


def _selected_tile(
    query: torch.Tensor,
    view: PagedView,
    sequence: int,
    position: int,
    selection: Selection,
    row: int,
    width: int,
    spec: AttentionSpec,
) -> Result:
    """One tile ``[n, H, D]`` over the keys of its selection row."""
    count, heads, _ = query.shape
    if width == 0:
        return torch.zeros_like(query), torch.full((count, heads), float("-inf"))
    size = selection.granularity
    units = selection.indices[row, :, :width].long()
    context = view.rows.host_context_lens[sequence]
    seen = (units[..., None] * size + torch.arange(size)).flatten(1)
    # Padding (-1) and what lies behind the context is masked; its rows are read from place 0 and dropped.
    valid = (seen >= 0) & (seen < context)
    safe = seen.masked_fill(~valid, 0)
    pages = view.rows.block_tables[sequence].long()[safe // view.page_size]
    kv_heads, selected_heads = view.num_kv_heads, units.shape[0]
    head = torch.arange(selected_heads) // (selected_heads // kv_heads)
    flat = ((pages * kv_heads + head[:, None]) * view.page_size + safe % view.page_size).flatten()

    def gather(pool: StoredRows) -> torch.Tensor:
        return pool.flat(flat).view(selected_heads, -1, view.head_dim)

    keys, values = view.pages.key_rows(query.dtype), view.pages.value_rows(query.dtype)
    mask: torch.Tensor | None = _band_mask(position, count, seen, spec.band) & valid[:, None, :]
    if mask is not None and bool(mask.all()):
        mask = None
    return _block(query, gather(keys), gather(values), mask, spec)


def _band_mask(position: int, count: int, seen: torch.Tensor, band: Band) -> torch.Tensor:
    """Bool ``[..., count, keys]`` for queries from ``position`` on and keys at positions ``seen [..., keys]``."""
    distance = torch.arange(position, position + count)[:, None] - seen[..., None, :]
    mask = distance >= band.nearest
    return mask if band.farthest is None else mask & (distance < band.farthest)


def _block(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec
) -> Result:
    """Queries ``[n, H, D]`` over keys ``[K, m, D]``, K = G or H, with a bool mask ``[n, m]`` or ``[K, n, m]``."""
    count, heads, dim = query.shape
    kinds, length, _ = keys.shape
    group = heads // kinds
    if length == 0:
        return torch.zeros_like(query), torch.full((count, heads), float("-inf"))
    # Rows of one KV head: its group's heads one after another, [K, group * n, D].
    rows = query.view(count, kinds, group, dim).permute(1, 2, 0, 3).reshape(kinds, group * count, dim)
    if mask is not None:
        mask = mask.expand(kinds, count, length)
        mask = mask[:, None].expand(-1, group, -1, -1).reshape(kinds, group * count, length)
    out, lse = rows_over_keys(rows, keys, values, mask, spec)
    out = out.view(kinds, group, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)
    return out, lse.view(kinds, group, count).permute(2, 0, 1).reshape(count, heads)


def rows_over_keys(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec
) -> Result:
    """Rows ``[K, n, D]`` over keys ``[K, m, D]``, m > 0, with a bool mask ``[K, n, m]``: out and ``lse [K, n]``."""
    out, lse = (_two_gemms if spec.softcap else _fused)(rows, keys, values, mask, spec)
    if mask is not None:
        blind = ~mask.any(dim=-1)  # these see nothing, and softmax over nothing is NaN
        if bool(blind.any()):
            out = out.masked_fill(blind[..., None], 0)
            lse = lse.masked_fill(blind, float("-inf"))
    return out, lse


def _fused(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec
) -> Result:
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=rows.dtype).masked_fill_(~mask, float("-inf"))[None]
    out, lse = flash(rows[None], keys[None], values[None], spec.scale, mask=bias)
    return out[0], lse[0]


def flash(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Result:
    """Torch's CPU flash attention, ``[B, H, n, D]`` over ``[B, H, m, D]``: the only torch call that gives ``lse``."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _two_gemms(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec
) -> Result:
    dtype = rows.dtype
    if not has_bfloat16_products():  # without bfloat16 instructions a bfloat16 GEMM runs at 5 GFLOP/s
        rows, keys, values = rows.float(), keys.float(), values.float()
    logits = torch.bmm(rows, keys.transpose(1, 2)).float().mul_(spec.scale)
    if spec.softcap:
        logits.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if mask is not None:
        logits.masked_fill_(~mask, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = logits.sub_(lse[..., None]).exp_()
    return torch.bmm(weights.to(values.dtype), values).to(dtype), lse


def with_sinks(out: torch.Tensor, lse: torch.Tensor, spec: AttentionSpec) -> Result:
    if spec.sinks is None:
        return out, lse
    # o * exp(lse - logaddexp(lse, sink)); a query that sees nothing has lse = -inf and stays 0.
    share = torch.sigmoid(lse - spec.sinks.float())
    return (out.float() * share[..., None]).to(out.dtype), lse
