"""Quest by its definition: bounds of pages, and which pages each query reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import budget, ops, registry
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase
from foveate.sparse_attn.selection import Tiles

from .paged import Paged
from .test_schemes import SPEC, World, close

STATS = (KEY_MIN, KEY_MAX)
BARE = {"sink_tokens": 0, "window_tokens": 0, "dense_first_layers": 0}


def bound(query, keys):
    """``sum over c of max(q_c min_c, q_c max_c)`` of one query ``[D]`` and the keys ``[n, D]`` of a page."""
    low, high = keys.min(0).values, keys.max(0).values
    return float(torch.maximum(query * low, query * high).double().sum())


def read_by_definition(world, sequence, queries, page, tile, options):
    """Per head the set of keys that queries ``first`` to ``last - 1`` of one tile read, one mask ``[H, context]``."""
    first, last = queries
    keys, query = world.keys[sequence].float(), world.query[sequence].float()
    heads, kv_heads = query.shape[1], keys.shape[1]
    start = first // tile * tile
    mask = torch.zeros(heads, len(keys), dtype=torch.bool)
    mask[:, : -(-options["sink_tokens"] // page) * page] = True
    mask[:, max(start - options["window_tokens"], 0) // page * page : -(-last // page) * page] = True
    kept = mask[0].clone()
    free = [p for p in range(start // page) if not kept[p * page : (p + 1) * page].any()]
    bounds = torch.tensor(
        [
            [
                max(
                    bound(query[i, h], keys[p * page : (p + 1) * page, h * kv_heads // heads])
                    for i in range(first, last)
                )
                for p in free
            ]
            for h in range(heads)
        ]
    ).view(kv_heads, heads // kv_heads, len(free))
    if options["group"] == "max":
        bounds = bounds.amax(1, keepdim=True)
    elif options["group"] == "sum":
        bounds = bounds.sum(1, keepdim=True)
    wanted = max(options["min_pages"], options["budget_tokens"] // page)
    per_row = heads // (kv_heads * bounds.shape[1])
    for row, scores in enumerate(bounds.flatten(0, 1).tolist()):
        best = sorted(zip(scores, free, strict=True), key=lambda pair: (-pair[0], pair[1]))[:wanted]
        for _, p in best:
            mask[row * per_row : (row + 1) * per_row, p * page : (p + 1) * page] = True
    return mask


OPTIONS = {
    "pure": {"group": "none", "sink_tokens": 0, "window_tokens": 0, "budget_tokens": 48, "min_pages": 3},
    "per-head": {"group": "none", "sink_tokens": 5, "window_tokens": 20, "budget_tokens": 32, "min_pages": 1},
    "max": {"group": "max", "sink_tokens": 17, "window_tokens": 0, "budget_tokens": 32, "min_pages": 1},
    "sum": {"group": "sum", "sink_tokens": 0, "window_tokens": 31, "budget_tokens": 0, "min_pages": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    ("contexts", "group", "page"),
    [((1,), 1, 16), ((16, 17, 111), 3, 16), ((300, 2), 2, 32), ((193, 64), 7, 16)],
    ids=["1", "16-17-111-g3", "300-2-page32", "193-64-g7"],
)
def test_decode_reads_what_the_paper_says(name, contexts, group, page):
    options = OPTIONS[name]
    scheme = registry.build("quest", **options, dense_first_layers=0)
    world = Paged(contexts, group=group, page_size=page, stats=STATS)
    query, view = world.view([1] * len(contexts))
    tiles = Tiles.of(view.rows, 1)
    chosen = scheme.for_phase(Phase.DECODE).select_decode(query, view, tiles, LayerCall(0, SPEC))
    chosen.validate(view.rows)
    got = budget.keep(chosen, scheme, Phase.DECODE)
    got.validate(view.rows)
    got = got.to_mask(view.rows)
    got = got.repeat_interleave(query.shape[1] // got.shape[1], 1)
    for sequence, context in enumerate(contexts):
        want = read_by_definition(world, sequence, (context - 1, context), page, 1, options)
        assert torch.equal(got[sequence, :, :context], want)


@pytest.mark.parametrize("name", ["pure", "max", "sum"])
def test_a_sparse_prompt_takes_the_largest_bound_of_a_tile(name):
    options, contexts, queries = OPTIONS[name], (190, 50, 128), (77, 50, 1)
    scheme = registry.build("quest", **options, dense_first_layers=0, sparse_prefill=True, tile_tokens=32)
    world = Paged(contexts, group=3, stats=STATS)
    query, view = world.view(queries)
    tiles = Tiles.of(view.rows, 32)
    chosen = scheme.for_phase(Phase.PREFILL).select_prefill(query, view, tiles, LayerCall(0, SPEC))
    got = budget.keep(chosen, scheme, Phase.PREFILL).to_mask(view.rows)
    got = got.repeat_interleave(query.shape[1] // got.shape[1], 1)
    for row, (sequence, _, count, position) in enumerate(tiles.host):
        want = read_by_definition(world, sequence, (position, position + count), 16, 32, options)
        assert torch.equal(got[row, :, : contexts[sequence]], want), f"tile {row}"


def test_two_pages_by_hand():
    """q = (1, -2): page 0 has channels in [0, 3] and [-1, 4], page 1 in [1, 2] and [-3, -2]."""
    world = Paged([33], kv_heads=1, group=1, dim=2, stats=STATS)
    world.keys[0][:16] = torch.tensor([3.0, 4.0])
    world.keys[0][0, 0] = torch.tensor([0.0, -1.0])
    world.keys[0][16:32] = torch.tensor([1.0, -3.0])
    world.keys[0][20, 0] = torch.tensor([2.0, -2.0])
    world.keys[0][32] = torch.tensor([5.0, 0.0])
    slots = torch.tensor([world.tables[0][i // 16] * 16 + i % 16 for i in range(33)])
    ops.write_kv(world.keys[0], world.values[0], world.pool.layer(0), slots)
    _, view = world.view([1])
    bounds = ops.page_bounds(torch.tensor([[[1.0, -2.0]]]), view, Tiles.of(view.rows, 1))
    assert bounds.tolist() == [[[5.0, 8.0, 5.0]]]


@pytest.mark.parametrize(
    ("contexts", "queries", "kv_heads", "group", "dim", "page"),
    [
        ((1,), (1,), 1, 1, 16, 16),
        ((130, 17, 200), (30, 16, 111), 2, 3, 64, 16),
        ((300, 5, 64), (1, 1, 1), 2, 7, 80, 64),
        ((1000,), (9,), 1, 2, 32, 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("tile", [1, 32, 128])
def test_torch_equals_reference(contexts, queries, kv_heads, group, dim, page, tile):
    query, view = Paged(contexts, kv_heads, group, dim, page, STATS).view(queries)
    tiles = Tiles.of(view.rows, tile)
    got = ops.page_bounds(query, view, tiles)
    assert got.dtype == torch.float32
    close(got, ops.page_bounds(query, view, tiles, backend="reference"))


def test_many_sequences_go_in_slabs(monkeypatch):
    from foveate.sparse_attn.ops import page_bounds_torch

    query, view = Paged([40, 70, 3, 90, 17], stats=STATS).view([1] * 5)
    tiles = Tiles.of(view.rows, 1)
    want = ops.page_bounds(query, view, tiles)
    monkeypatch.setattr(page_bounds_torch, "_SLAB_BYTES", 2 * 2 * 6 * 2 * 16 * 4)  # two sequences of six pages
    assert torch.equal(ops.page_bounds(query, view, tiles), want)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 60), st.sampled_from([1, 3]), st.sampled_from(["float32", "bfloat16"]))
def test_bounds_are_above_every_product(seed, context, group, dtype):
    world = Paged([context], kv_heads=1, group=group, stats=STATS, dtype=getattr(torch, dtype), seed=seed)
    query, view = world.view([1])
    bounds = ops.page_bounds(query, view, Tiles.of(view.rows, 1))[0]
    products = torch.einsum("hd,kd->hk", query[0].double(), world.keys[0][:, 0].double())
    for page, part in enumerate(products.split(16, dim=1)):
        assert bool((bounds[:, page].double() >= part.amax(1) - 1e-4).all())
        if part.shape[1] == 1:  # over one key the bound is the product
            torch.testing.assert_close(bounds[:, page].double(), part[:, 0], atol=1e-4, rtol=1e-5)


def test_one_list_per_kv_head_or_one_per_query_head():
    world = Paged([200], kv_heads=2, group=3, stats=STATS)
    query, view = world.view([1])
    tiles = Tiles.of(view.rows, 1)
    chosen = {}
    for group in ("none", "max", "sum", "softmax"):
        scheme = registry.build("quest", **BARE, budget_tokens=48, group=group)
        chosen[group] = scheme.select_decode(query, view, tiles, LayerCall(0, SPEC)).indices
        assert chosen[group].shape == (1, 6 if group == "none" else 2, 3)
    for head in range(6):  # a query head chooses as if it were alone
        alone = Paged([200], kv_heads=2, group=1, stats=STATS)
        alone.pool, alone.tables = world.pool, world.tables
        _, view = alone.view([1])
        scheme = registry.build("quest", **BARE, budget_tokens=48, group="max")
        own = scheme.select_decode(query[:, [head, head]], view, tiles, LayerCall(0, SPEC)).indices
        assert torch.equal(own[0, head // 3], chosen["none"][0, head])


def test_softmax_weighs_heads_alike():
    """A head with large logits decides under ``sum`` what it shares under ``softmax``."""
    world = Paged([16 * 5], kv_heads=1, group=2, dim=2, stats=STATS)
    for page, key in enumerate([(0.0, 0.0), (9.0, 0.0), (8.0, 0.0), (0.0, 5.0), (0.0, 0.0)]):
        world.keys[0][page * 16 : page * 16 + 16] = torch.tensor(key)
    slots = torch.tensor([world.tables[0][i // 16] * 16 + i % 16 for i in range(80)])
    ops.write_kv(world.keys[0], world.values[0], world.pool.layer(0), slots)
    _, view = world.view([1])
    query = torch.tensor([[[10.0, 0.0], [0.0, 4.0]]])
    got = {}
    for group in ("sum", "softmax"):
        scheme = registry.build("quest", **BARE, budget_tokens=32, min_pages=0, group=group)
        plan = scheme.select_decode(query, view, Tiles.of(view.rows, 1), LayerCall(0, AttentionSpec(1.0)))
        got[group] = plan.indices.tolist()
    assert got == {"sum": [[[1, 2]]], "softmax": [[[1, 3]]]}


def test_the_prompt_is_dense_however_it_is_cut():
    scheme = registry.build("quest", budget_tokens=16, **BARE)
    want = World([150]).whole()[0]
    world = World([150], scheme)
    got = [world.run([span])[0][0] for span in [(0, 1), (1, 50), (50, 147), (147, 150)]]
    close(torch.cat(got), want)


def test_decode_reads_its_budget_and_the_first_layers_all():
    options = {"budget_tokens": 16, "min_pages": 1, "sink_tokens": 0, "window_tokens": 0}
    for dense, layers in [(0, [1, 1]), (1, [0, 1]), (5, [0, 0])]:
        scheme = registry.build("quest", dense_first_layers=dense, **options)
        world = World([150], scheme)
        world.run([(0, 149)], layer=1)
        _, step = world.run([(149, 150)], phase=Phase.DECODE, layer=1)
        # Position 149 lies in page 9, which holds 6 tokens; beside it one page of 16.
        assert step.keys_read[0].tolist() == [sum(4 * (22 if sparse else 150) for sparse in layers), 2 * 4 * 150]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_pages": -1}, "min_pages"),
        ({"min_pages": 1.5}, "min_pages"),
        ({"min_pages": 10**20}, "min_pages"),
        ({"dense_first_layers": True}, "dense_first_layers"),
        ({"group": "mean"}, "none, max, sum, softmax"),
        ({"group": []}, "group"),
        ({"sparse_prefill": 1}, "sparse_prefill"),
        ({"tile_tokens": 48}, "tile_tokens"),
        ({"tile_tokens": 8}, "tile_tokens"),
        ({"budget_tokens": -1}, "budget_tokens"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(options, said):
    with pytest.raises(SchemeConfigError, match=said):
        registry.build("quest", **options)


def test_shapes_that_do_not_fit_are_refused():
    query, view = Paged([40], stats=STATS).view([3])
    tiles = Tiles.of(view.rows, 16)
    with pytest.raises(ValueError, match="do not fit"):
        ops.page_bounds(query[:2], view, tiles)
    with pytest.raises(ValueError, match="do not fit"):
        ops.page_bounds(query[:, :3], view, tiles)
    query, view = Paged([40], stats=(KEY_MAX,)).view([3])
    with pytest.raises(ValueError, match="key_min"):
        ops.page_bounds(query, view, tiles)


def test_a_softmax_over_pages_does_not_see_those_behind_its_tile():
    """A prompt of 128 tokens chooses for its first tiles what it chooses when nothing stands behind them yet."""
    scheme = registry.build(
        "quest", sink_tokens=0, window_tokens=0, dense_tail_tokens=0, dense_first_layers=0,
        budget_tokens=16, min_pages=1, group="softmax", sparse_prefill=True, tile_tokens=32,
    )  # fmt: skip
    geometry = CacheGeometry(1, 1, 16, 16, 8)
    pool = PagePool(geometry, scheme.page_stats(geometry))
    query = torch.eye(4, 16).expand(128, 4, 16) * 8  # each head looks along a channel of its own
    key = torch.zeros(128, 1, 16)
    key[:16, 0, 0], key[16:32, 0, 1] = 3, 2.9  # head 0 prefers page 0, head 1 page 1
    key[64:, 0, 0] = 9  # behind the tiles, head 0 would find nearly all of its mass
    chosen = []
    for end in (64, 128):
        ops.write_kv(key[:end], key[:end], pool.layer(0), torch.arange(end))
        rows = Rows.build([list(range(8))], [end], [end], torch.device("cpu"))
        view = PagedView(pool.layer(0), rows)
        selection = scheme.select_prefill(query[:end], view, Tiles.of(rows, 32), LayerCall(0, AttentionSpec(0.25)))
        chosen.append([sorted(set(row[0].tolist()) - {-1}) for row in selection.indices])
    assert chosen[1][:2] == chosen[0]
    assert chosen[0][1] == [0]
