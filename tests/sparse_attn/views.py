"""Views of a small pool with random keys, for tests of what schemes choose."""

from __future__ import annotations

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 16


def make_view(
    contexts, queries, page=16, kv_heads=KV_HEADS, dim=DIM, stats=(), prompts=None, ids=None, seed=0, scattered=True
):
    """A pool of NaN with random keys where sequences have tokens, pages in shuffled order or side by side."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // page) for context in contexts]
    pool = PagePool(CacheGeometry(1, kv_heads, dim, page, sum(needed) + 2), stats)
    pool.keys.fill_(float("nan"))
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    order = order if scattered else sorted(order, reverse=True)
    tables = [[order.pop() for _ in range(count)] for count in needed]
    keys = []
    for table, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([table[i // page] * page + i % page for i in range(context)])
        keys.append(torch.randn(context, kv_heads, dim, generator=generator))
        ops.write_kv(keys[-1], keys[-1], pool.layer(0), slots)
    rows = Rows.build(tables, list(contexts), list(queries), CPU, prompts, ids)
    return PagedView(pool.layer(0), rows), keys


def make_query(view, heads=HEADS, seed=5):
    """Random queries ``[T, H, D]`` for the rows of a view."""
    return torch.randn(view.rows.num_queries, heads, view.head_dim, generator=torch.Generator().manual_seed(seed))
