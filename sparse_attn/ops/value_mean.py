"""The mean of the values that each query sees, from the page statistic ``VALUE_SUM``."""

from __future__ import annotations

import torch

from foveate.kv_cache.stats import VALUE_SUM
from foveate.kv_cache.view import PagedView


def causal_value_mean(view: PagedView) -> torch.Tensor:
    """``[T, G, D]`` float32: for each query the mean of the values up to and with its own position.

    One sum per page for the pages before a sequence's first query, and the values themselves from
    there on: the page of a query may hold tokens behind it, written in the same step. Waits for
    no device.

    Args:
        view: Its pages keep ``VALUE_SUM``.
    """
    means = []
    size = view.page_size
    for sequence, (context, count) in enumerate(
        zip(view.rows.host_context_lens, view.rows.host_query_lens, strict=True)
    ):
        first = (context - count) // size
        table = view.rows.block_tables[sequence, : -(-context // size)].long()
        before = view.pages.stats[VALUE_SUM][table[:first]].sum(0)
        rows = view.pages.value_rows()[table[first:]].transpose(1, 2).flatten(0, 1)[: context - first * size].float()
        sums = rows.cumsum(0)[-count:] + before
        positions = torch.arange(context - count, context, device=sums.device)
        means.append(sums / (positions + 1)[:, None, None])
    return torch.cat(means)
