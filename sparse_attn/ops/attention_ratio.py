"""How unevenly attention falls on both sides of each gap: what DHSA labels its boundaries by."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from .reference import gather_pages

EPSILON = 1e-6


def mass_ratio(attention: torch.Tensor, first_row: int, window: int) -> torch.Tensor:
    """Ratio of the attention that later queries give the tokens before and behind each gap.

    For gap ``i`` the rows ``i + w`` and later count, the tokens ``i - w + 1 .. i`` lie before it and
    ``i + 1 .. i + w`` behind; the ratio is the larger sum over the smaller one (DHSA, the authors'
    ``_compute_cumulative_attention_mass_ratio``; they have the rows of all queries).

    Args:
        attention: ``[n, L]`` weights of the queries at positions ``first_row`` and later, averaged over heads.
        first_row: Position of the first query.
        window: w.

    Returns:
        ``[L]`` float64, at least 1; 0 where a window does not fit (``i < w - 1`` or ``i >= L - w``).
    """
    rows, length = attention.shape
    ratio = attention.new_zeros(length, dtype=torch.float64)
    if length < 2 * window:
        return ratio
    sums = torch.nn.functional.pad(attention.double().cumsum(1), (1, 0))
    mass = sums[:, window:] - sums[:, :-window]  # of the tokens j .. j + w - 1
    gap = torch.arange(window - 1, length - window, device=attention.device)
    row = torch.arange(first_row, first_row + rows, device=attention.device)
    later = row[:, None] >= gap + window
    past = torch.where(later, mass[:, : len(gap)], 0.0).sum(0) + EPSILON
    future = torch.where(later, mass[:, window:], 0.0).sum(0) + EPSILON
    ratio[gap] = torch.maximum(past, future) / torch.minimum(past, future)
    return ratio


def attention_ratio(
    query: torch.Tensor, view: PagedView, spec: AttentionSpec, window: int, last_queries: int
) -> torch.Tensor:
    """``mass_ratio`` of each sequence, by its last queries of this call alone.

    One KV head's logits are held at a time: ``H / G * last_queries * context * 4`` bytes.

    Args:
        query: ``[T, H, D]``.
        view: Keys of this step are written already.
        spec: Scale and soft cap.
        window: w.
        last_queries: Queries of each sequence that are looked at, at most.

    Returns:
        ``[S, longest context]`` float32; 0 behind a sequence's context.
    """
    found = torch.zeros(view.rows.num_sequences, max(view.rows.host_context_lens), device=query.device)
    stop = 0
    for sequence, (context, count) in enumerate(
        zip(view.rows.host_context_lens, view.rows.host_query_lens, strict=True)
    ):
        stop += count
        rows = min(count, last_queries)
        keys = gather_pages(view.pages.key_rows(), view, sequence)
        queries = torch.unflatten(query[stop - rows : stop], 1, (len(keys), -1))
        position = torch.arange(context - rows, context, device=query.device)
        hidden = position[:, None] < torch.arange(context, device=query.device)
        mean = torch.zeros(rows, context, device=query.device)
        for head, rotated in enumerate(keys):
            logits = torch.einsum("ngd,kd->gnk", queries[:, head].float(), rotated.float()) * spec.scale
            if spec.softcap:
                logits = spec.softcap * torch.tanh(logits / spec.softcap)
            mean += logits.masked_fill_(hidden, float("-inf")).softmax(-1).sum(0)
        found[sequence, :context] = mass_ratio(mean / query.shape[1], context - rows, window)
    return found
