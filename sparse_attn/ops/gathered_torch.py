"""Prefill on a CPU where each query has keys of its own, in torch: the FlashMoBA order.

Instead of gathering keys per query, queries are gathered per unit of keys: all query rows of a KV head that chose a
unit become one dense product with it, and each query's parts are merged by log-sum-exp (arXiv:2511.11571, section 4).
Units that a query sees in part, its own among them, go a second way, with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

from foveate.kv_cache.stored import StoredRows
from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from . import attention_torch
from .attention_torch import Result

# Query rows that are multiplied with one unit at a time; a list of rows is padded to a multiple of it.
_ROWS = 128
# Partial results held at once.
_SLAB_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class _Lists:
    """The query rows of each unit, in lists padded to a multiple of ``_ROWS`` rows.

    Attributes:
        units: ``[C]`` unit of each run of ``_ROWS`` places.
        heads: ``[C]`` its KV head.
        pairs: ``[C * _ROWS]`` which pair of the selection stands in each place; padded by 0.
        places: ``[n, K, M]`` place of each pair, 0 for those that are not among these.
    """

    units: torch.Tensor
    heads: torch.Tensor
    pairs: torch.Tensor
    places: torch.Tensor


def prefill(query: torch.Tensor, view: PagedView, selection: Selection, spec: AttentionSpec) -> Result:
    """See ``ops.prefill``; the selection has a row per query.

    Beside the result it holds 32 MiB of partial results, a few times.
    """
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:2], dtype=torch.float32)
    heads, dim = query.shape[1:]
    width = selection.indices.shape[2]
    step = max(1, _SLAB_BYTES // (heads * width * dim * query.element_size()))
    start = 0
    for sequence, (context, count) in enumerate(
        zip(view.rows.host_context_lens, view.rows.host_query_lens, strict=True)
    ):
        for begin in range(0, count, step):
            part = slice(start + begin, start + min(begin + step, count))
            position = context - count + begin
            out[part], lse[part] = _slab(
                query[part], view, sequence, position, selection.indices[part], selection.granularity, spec
            )
        start += count
    return attention_torch.with_sinks(out, lse, spec)


def _slab(
    query: torch.Tensor,
    view: PagedView,
    sequence: int,
    first_position: int,
    indices: torch.Tensor,
    size: int,
    spec: AttentionSpec,
) -> Result:
    """Queries ``[n, H, D]`` from ``first_position`` on, over their units ``[n, K, M]``."""
    position = torch.arange(first_position, first_position + query.shape[0], dtype=torch.int32)[:, None, None]
    begin = indices * size
    seen = (indices >= 0) & (begin <= position - spec.band.nearest)
    whole = seen & (begin + size - 1 <= position - spec.band.nearest)
    if spec.band.farthest is not None:
        seen &= begin + size - 1 > position - spec.band.farthest
        whole &= begin > position - spec.band.farthest
    parts = [
        _part(query, view, sequence, first_position, indices, size, spec, among, masked)
        for among, masked in ((whole, False), (seen & ~whole, True))
        if bool(among.any())
    ]
    if not parts:
        return torch.zeros_like(query), torch.full(query.shape[:2], float("-inf"))
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    weights = [torch.exp(lse - total).nan_to_num(0.0)[..., None] for _, lse in parts]
    merged = sum(out.float() * weight for (out, _), weight in zip(parts, weights, strict=True))
    return torch.as_tensor(merged).to(query.dtype), total


def _part(
    query: torch.Tensor,
    view: PagedView,
    sequence: int,
    first_position: int,
    indices: torch.Tensor,
    size: int,
    spec: AttentionSpec,
    among: torch.Tensor,
    masked: bool,
) -> Result:
    """Attention over the pairs ``among`` ``[n, K, M]`` of a query and a unit of its selection."""
    (tokens, heads, dim), (kinds, width) = query.shape, indices.shape[1:]
    fold = heads // kinds
    lists = _lists(indices, among, view.num_kv_heads)
    # One pair stands for the ``fold`` heads that share a row of the selection; they lie side by side.
    rows = query.reshape(tokens * kinds, fold * dim)[lists.pairs // width].view(-1, _ROWS * fold, dim)
    keys, values, unwritten = _units(view, sequence, lists, size, query.dtype)
    mask = None
    if masked:
        at = first_position + lists.pairs.view(-1, _ROWS, 1) // (kinds * width)
        distance = at - lists.units[:, None, None] * size - torch.arange(size)
        mask = distance >= spec.band.nearest
        if spec.band.farthest is not None:
            mask &= distance < spec.band.farthest
        mask &= ~unwritten[:, None]
        mask = mask.repeat_interleave(fold, dim=1)
        # Rows that were never written may hold NaN, and 0 * NaN is NaN.
        keys, values = (part.masked_fill(unwritten[..., None], 0) for part in (keys, values))
    out, lse = attention_torch.rows_over_keys(rows, keys, values, mask, spec)
    places = (lists.places[..., None] * fold + torch.arange(fold)).transpose(2, 3).reshape(-1, width)
    valid = among[:, :, None].expand(-1, -1, fold, -1).reshape(-1, width)
    found = lse.reshape(-1)[places].masked_fill_(~valid, float("-inf"))
    total = torch.logsumexp(found, dim=1)
    weights = torch.exp(found - total[:, None]).nan_to_num(0.0).to(out.dtype)
    merged = embedding_bag(places, out.reshape(-1, dim), per_sample_weights=weights, mode="sum")
    # Weights rounded to 16 bits no longer sum to one.
    merged = merged.float() / weights.float().sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return merged.view(tokens, heads, dim), total.view(tokens, heads)


def _lists(indices: torch.Tensor, among: torch.Tensor, kv_heads: int) -> _Lists:
    """Sorts the pairs ``among`` by KV head and unit."""
    kinds = indices.shape[1]
    pairs = among.flatten().nonzero()[:, 0]
    span = int(indices.max()) + 1
    head = torch.arange(kinds)[:, None] // (kinds // kv_heads)
    column, order = (head * span + indices).flatten()[pairs].sort(stable=True)
    sizes = torch.bincount(column, minlength=kv_heads * span)
    runs = (sizes + _ROWS - 1) // _ROWS
    # Place of the i-th pair in order: its rank among those of its column, behind all runs of earlier columns.
    shift = (runs.cumsum(0) - runs) * _ROWS - (sizes.cumsum(0) - sizes)
    place = torch.arange(len(pairs)) + shift[column]
    owner = torch.repeat_interleave(torch.arange(len(runs)), runs)
    listed = torch.zeros(len(owner) * _ROWS, dtype=torch.int64)
    listed[place] = pairs[order]
    places = torch.zeros(indices.numel(), dtype=torch.int64)
    places[pairs[order]] = place
    return _Lists(owner % span, owner // span, listed, places.view(indices.shape))


def _units(
    view: PagedView, sequence: int, lists: _Lists, size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(keys, values)`` ``[C, size, D]`` of each run's unit, and which of their rows lie behind the context."""
    page_size = view.page_size
    pieces = max(size // page_size, 1)  # pages of a unit
    shares = max(page_size // size, 1)  # units of a page
    logical = lists.units[:, None] * size // page_size + torch.arange(pieces)
    table = view.rows.block_tables[sequence].long()
    pages = table[logical.clamp(max=len(table) - 1)]
    share = lists.units[:, None] % shares
    flat = ((pages * view.num_kv_heads + lists.heads[:, None]) * shares + share).flatten()

    def gather(pool: StoredRows) -> torch.Tensor:
        return pool.flat(flat, min(size, page_size)).view(-1, size, view.head_dim)

    places = lists.units[:, None] * size + torch.arange(size)
    keys, values = gather(view.pages.key_rows(dtype)), gather(view.pages.value_rows(dtype))
    return keys, values, places >= view.rows.host_context_lens[sequence]
