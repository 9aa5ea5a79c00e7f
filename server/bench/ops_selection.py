"""The ops that choose keys, and the one that writes them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM
from foveate.sparse_attn import ops
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Tiles

from .cases import Case, Setting, causal_pairs, geometry_of, kernels, pages_of, query_of, steps_to_walk

# Sizes that the schemes have by default.
SCORE_TILE, GATE_BLOCK, GATE_TOP, DIAGONAL_TILE, STRIDE = 32, 64, 16, 128, 8


def scores(setting: Setting) -> Iterator[Case]:
    """Exact scores, pooled over tiles, and the best of them: 2 operations per channel, query head and visible key."""
    (view,) = pages_of(setting, setting.queries)
    query, tiles = query_of(setting, setting.queries), Tiles.of(view.rows, SCORE_TILE)
    spec = AttentionSpec(setting.shape.head_dim**-0.5)
    candidates = (torch.zeros_like(tiles.position), tiles.position)
    budgets = [max(1, int(setting.share * position)) for *_, position in tiles.host]
    calls = {
        kernel: (lambda call=call: call(query, view, tiles, spec, candidates, budgets))
        for kernel, call in kernels(ops.pooled_topk, setting, ops.pooled_topk).items()
    }
    work = 2.0 * setting.shape.head_dim * setting.shape.heads * causal_pairs(setting)
    yield Case(f"tiles of {SCORE_TILE}, best {setting.share:.0%}", calls, work, "mm")


def gate(setting: Setting) -> Iterator[Case]:
    """Every query against the mean key of every earlier block: 2 operations per channel, query head and block."""
    (view,) = pages_of(setting, setting.queries, stats=(KEY_SUM,))
    query, tiles = query_of(setting, setting.queries), Tiles.of(view.rows, 1)
    own = tiles.position // GATE_BLOCK
    candidates = (torch.zeros_like(own), own)
    calls = {
        kernel: (lambda call=call: call(query, view, GATE_BLOCK, GATE_TOP, candidates))
        for kernel, call in kernels(ops.gate_blocks, setting, ops.gate_blocks).items()
    }
    work = 2.0 * setting.shape.head_dim * setting.shape.heads * int(own.sum())
    yield Case(f"blocks of {GATE_BLOCK}, best {GATE_TOP}", calls, work, "mm")


def bounds(setting: Setting) -> Iterator[Case]:
    """The largest logit that a page can have: bytes of its smallest and largest keys, float32."""
    layers = steps_to_walk(setting.context * geometry_of(setting).bytes_per_token)
    views = pages_of(setting, 1, layers, (KEY_MIN, KEY_MAX))
    query, tiles = query_of(setting, 1), Tiles.of(views[0].rows, 1)
    calls = {
        kernel: (lambda call=call: [call(query, view, tiles) for view in views])
        for kernel, call in kernels(ops.page_bounds, setting).items()
    }
    read = sum(view.pages.stats[stat].nbytes for view in views for stat in (KEY_MIN, KEY_MAX))
    yield Case(f"pages of {views[0].page_size}", calls, float(read), "sum", layers)


def antidiagonal(setting: Setting) -> Iterator[Case]:
    """Block scores from every stride-th antidiagonal: that share of the operations of all logits."""
    (view,) = pages_of(setting, setting.queries)
    query, tiles = query_of(setting, setting.queries), Tiles.of(view.rows, DIAGONAL_TILE)
    scale = setting.shape.head_dim**-0.5
    calls = {
        kernel: (lambda call=call: call(query, view, tiles, STRIDE, scale))
        for kernel, call in kernels(ops.antidiagonal_scores, setting).items()
    }
    work = 2.0 * setting.shape.head_dim * setting.shape.heads * causal_pairs(setting) / STRIDE
    yield Case(f"blocks of {DIAGONAL_TILE}, stride {STRIDE}", calls, work, "mm")


def write(setting: Setting) -> Iterator[Case]:
    """A chunk's K and V into the pages of a layer, without statistics and with a sum: bytes read and written."""
    shape = setting.shape
    key = torch.randn(setting.queries, shape.kv_heads, shape.head_dim, device=setting.device).to(setting.dtype)
    value = torch.randn_like(key)
    for name, stats in (("no statistics", ()), ("key sums", (KEY_SUM,))):
        (view,) = pages_of(setting, setting.queries, stats=stats)
        size = view.page_size
        pages = torch.tensor(view.rows.host_block_tables[0], device=setting.device)
        positions = torch.arange(setting.context - setting.queries, setting.context, device=setting.device)
        slots = pages[positions // size] * size + positions % size
        calls = {
            kernel: (lambda call=call, view=view, slots=slots: call(key, value, view.pages, slots))
            for kernel, call in kernels(ops.write_kv, setting, ops.write_kv).items()
        }
        moved = key.nbytes + value.nbytes + setting.queries * geometry_of(setting).bytes_per_token
        yield Case(name, calls, float(moved), "sum")
