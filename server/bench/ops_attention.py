"""Attention over pages: chunks of prompts against the product, one new token against reading memory."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import torch

from foveate.kv_cache.view import PagedView
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import attention_native, threshold_native
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import ScoreThreshold, Selection, Tiles

from .cases import Case, Setting, causal_pairs, geometry_of, kernels, pages_of, query_of, steps_to_walk

TILE = 128


def prefill(setting: Setting) -> Iterator[Case]:
    """All keys, and random pages: 4 operations per channel, query head and visible key."""
    (view,) = pages_of(setting, setting.queries)
    query, spec = query_of(setting, setting.queries), AttentionSpec(setting.shape.head_dim**-0.5)
    per_pair = 4 * setting.shape.head_dim * setting.shape.heads
    selection = choose(view, view.page_size, setting.share, TILE)
    group = setting.shape.heads // setting.shape.kv_heads
    chosen = int((selection.counts.sum(1) * view.page_size * selection.tiles.query_count).sum())
    cases: list[tuple[str, Selection | None, float]] = [
        ("all keys", None, float(per_pair * causal_pairs(setting))),
        (f"pages, {setting.share:.0%}", selection, 4.0 * setting.shape.head_dim * chosen * group),
    ]
    for name, keys, work in cases:
        calls = {
            kernel: (lambda call=call, keys=keys: call(query, view, keys, spec))
            for kernel, call in kernels(ops.prefill, setting, attention_native.prefill).items()
        }
        yield Case(name, calls, work, "mm")


def decode(setting: Setting) -> Iterator[Case]:
    """All keys, and random pages, runs and tokens: bytes of the K and V that are read."""
    shape = setting.shape
    row = geometry_of(setting).bytes_per_token / shape.kv_heads  # K and V of one token and KV head
    whole = setting.context * shape.kv_heads * row
    views = pages_of(setting, 1, steps_to_walk(whole))
    query, spec = query_of(setting, 1), AttentionSpec(shape.head_dim**-0.5)
    page = views[0].page_size
    units = {
        f"pages, {setting.share:.0%}": page,
        f"16 tokens, {setting.share:.0%}": 16,
        f"tokens, {setting.share:.0%}": 1,
    }
    choices: dict[str, Selection | None] = {"all keys": None}
    choices |= {name: choose(views[0], unit, setting.share, 1) for name, unit in units.items()}
    for name, keys in choices.items():
        read = whole if keys is None else float(keys.counts.sum()) * keys.granularity * row
        calls = {
            kernel: (lambda call=call, keys=keys: [call(query, view, keys, spec) for view in views])
            for kernel, call in kernels(ops.decode, setting, attention_native.decode).items()
        }
        yield Case(name, calls, read * len(views), "sum", len(views))


def threshold(setting: Setting) -> Iterator[Case]:
    """All keys are scored, and the values of those above a threshold read: by any head of their group."""
    shape = setting.shape
    half = setting.context * geometry_of(setting).bytes_per_token / 2
    views = pages_of(setting, 1, steps_to_walk(2 * half))
    query, spec = query_of(setting, 1), AttentionSpec(shape.head_dim**-0.5)
    kept = min(max(setting.share, 1e-6), 1 - 1e-6)
    # Keys are normal in every channel, so a query's logits are normal with its own length, over sqrt(D).
    spread = query.float().norm(dim=-1) * spec.scale
    plan = ScoreThreshold(NormalDist().inv_cdf(1 - kept) * spread)
    union = 1 - (1 - kept) ** (shape.heads // shape.kv_heads)
    calls = {
        kernel: (lambda call=call: [call(query, view, plan, spec) for view in views])
        for kernel, call in kernels(ops.thresholded, setting, threshold_native.thresholded).items()
    }
    yield Case(f"{setting.share:.0%} of the values", calls, half * (1 + union) * len(views), "sum", len(views))


def choose(view: PagedView, granularity: int, share: float, tile: int) -> Selection:
    """Random units for each tile, ``share`` of those before it, and one at least."""
    tiles = Tiles.of(view.rows, tile)
    units = -(-max(view.rows.host_context_lens) // granularity)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(tiles), view.num_kv_heads, units, generator=generator) < share
    mask[..., 0] = True
    before = (tiles.position.cpu() // granularity).clamp(min=1)
    mask &= torch.arange(units) < before[:, None, None]
    return Selection.from_mask(mask.to(view.rows.block_tables.device), granularity, tiles)
