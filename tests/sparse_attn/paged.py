"""Sequences of random keys in pages, for tests of what a scheme chooses; not collected by pytest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import PageStat
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops

CPU = torch.device("cpu")


class Paged:
    """One layer that holds several sequences, pages in shuffled order, NaN where nothing was written.

    Attributes:
        keys: Per sequence ``[context, G, D]``, as stored.
        values: Likewise.
        query: Per sequence ``[context, H, D]``, of the pool's type.
    """

    def __init__(
        self,
        contexts: Sequence[int],
        kv_heads: int = 2,
        group: int = 2,
        dim: int = 16,
        page_size: int = 16,
        stats: Iterable[PageStat] = (),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> list[torch.Tensor]:
            return [torch.randn(context, heads, dim, generator=generator).to(dtype) for context in contexts]

        self.contexts = tuple(contexts)
        self.query, self.keys, self.values = draw(kv_heads * group), draw(kv_heads), draw(kv_heads)
        needed = [-(-context // page_size) for context in contexts]
        self.pool = PagePool(CacheGeometry(1, kv_heads, dim, page_size, sum(needed) + 3, dtype), tuple(stats))
        for tensor in (self.pool.keys, self.pool.values, *self.pool.stats.values()):
            tensor.fill_(float("nan"))
        order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        for pages, keys, values in zip(self.tables, self.keys, self.values, strict=True):
            slots = [pages[i // page_size] * page_size + i % page_size for i in range(len(keys))]
            ops.write_kv(keys, values, self.pool.layer(0), torch.tensor(slots), backend="torch")

    def view(self, queries: Sequence[int]) -> tuple[torch.Tensor, PagedView]:
        """The last ``queries`` of each sequence, packed, over all its keys."""
        rows = Rows.build(self.tables, list(self.contexts), list(queries), CPU)
        asked = [query[len(query) - count :] for query, count in zip(self.query, queries, strict=True)]
        return torch.cat(asked), PagedView(self.pool.layer(0), rows)
