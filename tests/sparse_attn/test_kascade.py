"""Kascade by its definition (arXiv:2512.16391, section 3), written as dense masks, and what follows from it."""

from __future__ import annotations

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops, registry
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.errors import CalibrationMissing, ProfileError, SchemeConfigError
from foveate.sparse_attn.ops import anchor, anchor_torch
from foveate.sparse_attn.ops.anchor import anchor_scores, pooled_topk
from foveate.sparse_attn.profile import Profile
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, Role, StepGroup, StepState
from foveate.sparse_attn.selection import Band, Tiles

from .cases import kascade_profile
from .seen import Seen

HEADS, KV_HEADS, DIM, PAGE, TILE = 6, 2, 8, 16, 32
GROUP = HEADS // KV_HEADS
CPU = torch.device("cpu")
SPEC = AttentionSpec(1.5 * DIM**-0.5)
# The paper's pure form.
PURE = {"sink_tokens": 0, "window_tokens": 0, "dense_tail_tokens": 0, "tile_tokens": TILE}
# Five layers, three anchors; layers 1 and 4 reuse with heads exchanged or merged.
ANCHORS = [0, 2, 3]
HEAD_MAP = [[0, 1], [1, 0], [0, 1], [0, 1], [1, 1]]
LAYERS = len(HEAD_MAP)


def build(layers=ANCHORS, head_map=HEAD_MAP, **options):
    return registry.build("kascade", {"kascade": kascade_profile(layers, head_map)}, **(PURE | options))


class Model:
    """Raw q, k, v per layer of one sequence, its pages, and attention through them."""

    def __init__(self, length, scheme, seed=0, same=False, layers=LAYERS):
        generator = torch.Generator().manual_seed(seed)
        self.scheme, self.layers = scheme, layers
        self.q, self.k, self.v = (
            [torch.randn(length, heads, DIM, generator=generator) for _ in range(layers)]
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        if same:
            self.q, self.k, self.v = ([rows[0]] * layers for rows in (self.q, self.k, self.v))
        pages = -(-length // PAGE)
        self.pool = PagePool(CacheGeometry(layers, KV_HEADS, DIM, PAGE, pages + 1))
        self.table = torch.randperm(pages + 1, generator=generator)[:pages].tolist()

    def step(self, start, stop, phase):
        rows = Rows.build([self.table], [stop], [stop - start], CPU)
        slots = [self.table[i // PAGE] * PAGE + i % PAGE for i in range(start, stop)]
        group = StepGroup(self.scheme, phase, 0, rows, (0,))
        return StepState(
            self.pool, torch.tensor(slots), torch.arange(start, stop), [group], None,
            torch.zeros(1, 2, dtype=torch.float64),
        )  # fmt: skip

    def layer(self, index, step, start, stop):
        part = slice(start, stop)
        ops.write_kv(self.k[index][part], self.v[index][part], self.pool.layer(index), step.slots)
        return attend(self.q[index][part], LayerCall(index, SPEC), step)

    def run(self, start, stop, phase=Phase.PREFILL):
        """Outputs ``[L, T, H, D]``."""
        step = self.step(start, stop, phase)
        return torch.stack([self.layer(index, step, start, stop) for index in range(self.layers)])


def probabilities(q, k, scale=SPEC.scale):
    """``[H, T, T]``, causal."""
    logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(GROUP, 1)) * scale
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
    return torch.softmax(logits.masked_fill(hidden, float("-inf")), -1)


def best(weights, k):
    """The ``k`` largest, of equals the first."""
    order = sorted(range(len(weights)), key=lambda s: (-float(weights[s]), s))
    return order[:k]


def masked(q, k, v, allow):
    """Attention over ``allow`` ``[G, T, T]``."""
    logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(GROUP, 1)) * SPEC.scale
    logits = logits.masked_fill(~allow.repeat_interleave(GROUP, 0), float("-inf"))
    return torch.einsum("hts,shd->thd", torch.softmax(logits, -1), v.repeat_interleave(GROUP, 1))


def oracle_prefill(model, budget, anchors=ANCHORS, head_map=HEAD_MAP, pool_all=False, tile=TILE, scored=None):
    """Section 3.2 with masks; ``budget`` maps a tile's start to k, ``scored`` even queries of a tile are pooled."""
    length = len(model.q[0])
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    outs, carried = [], None
    for index in range(model.layers):
        q, k, v = model.q[index], model.k[index], model.v[index]
        if index in anchors:
            weights = probabilities(q, k).unflatten(0, (KV_HEADS, GROUP)).sum(1)
            if pool_all:
                weights = weights.sum(0, keepdim=True).expand(KV_HEADS, -1, -1)
            carried = torch.zeros(KV_HEADS, length, length, dtype=torch.bool)
            for start in range(0, length, tile):
                rows, end = slice(start, start + tile), min(start + tile, length)
                pooled = torch.arange(end - 1, start - 1, -max(1, tile // scored) if scored else -1)
                for head in range(KV_HEADS):
                    chosen = best(weights[head, pooled, :start].sum(0), budget(start))
                    carried[head, rows, chosen] = True
                carried[:, rows, rows] |= causal[rows, rows]
        allow = causal.expand(KV_HEADS, -1, -1) if index == 0 else carried[torch.tensor(head_map[index])]
        outs.append(masked(q, k, v, allow))
    return torch.stack(outs)


def oracle_decode(model, k, anchors=ANCHORS, head_map=HEAD_MAP):
    """Section 3.2 for the last query: nothing is forced in."""
    length = len(model.q[0])
    outs, carried = [], None
    for index in range(model.layers):
        q, keys, v = model.q[index], model.k[index], model.v[index]
        if index in anchors:
            weights = probabilities(q, keys)[:, -1].unflatten(0, (KV_HEADS, GROUP)).sum(1)
            carried = torch.zeros(KV_HEADS, 1, length, dtype=torch.bool)
            for head in range(KV_HEADS):
                carried[head, 0, best(weights[head], k)] = True
        allow = torch.ones_like(carried) if index == 0 else carried[torch.tensor(head_map[index])]
        outs.append(masked(q[-1:], keys, v, allow))
    return torch.stack(outs)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 211])
def test_prefill_is_the_papers(length):
    model = Model(length, build(budget_tokens=17))
    close(model.run(0, length), oracle_prefill(model, lambda start: 17))


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_the_budget_rolls_with_the_tiles(fraction):
    model = Model(200, build(budget_fraction=fraction, min_budget_tokens=9))
    close(model.run(0, 200), oracle_prefill(model, lambda start: max(9, int(fraction * start))))


def test_pooled_over_all_heads_needs_no_head_map():
    model = Model(150, build(budget_tokens=17, pool="all"))
    identity = [[0, 1]] * LAYERS
    close(model.run(0, 150), oracle_prefill(model, lambda start: 17, head_map=identity, pool_all=True))


@pytest.mark.parametrize("tile", [1, 16, 64])
def test_other_tiles(tile):
    model = Model(100, build(budget_tokens=11, tile_tokens=tile))
    close(model.run(0, 100), oracle_prefill(model, lambda start: 11, tile=tile))


@pytest.mark.parametrize("scored", [1, 5, TILE, 2 * TILE])
def test_some_queries_of_a_tile_can_stand_for_it(scored):
    model = Model(170, build(budget_tokens=17, scored_queries=scored))
    close(model.run(0, 170), oracle_prefill(model, lambda start: 17, scored=scored))
    close(model.run(169, 170, Phase.DECODE), oracle_decode(model, 17))


@pytest.mark.parametrize(("length", "k"), [(1, 5), (40, 5), (40, 40), (211, 21)])
def test_decode_is_the_papers(length, k):
    model = Model(length, build(budget_tokens=k))
    if length > 1:
        model.run(0, length - 1)
    close(model.run(length - 1, length, Phase.DECODE), oracle_decode(model, k))


@pytest.mark.parametrize("length", [127, 128])
def test_decode_takes_its_share_of_the_context(length):
    model = Model(length, build(budget_fraction=0.25, min_budget_tokens=1))
    model.run(0, length - 1)
    close(model.run(length - 1, length, Phase.DECODE), oracle_decode(model, length // 4))


def test_every_layer_an_anchor_is_oracle_top_k():
    every, identity = list(range(LAYERS)), [[0, 1]] * LAYERS
    model = Model(150, build(every, identity, budget_tokens=17))
    close(model.run(0, 150), oracle_prefill(model, lambda start: 17, every, identity))


@pytest.mark.parametrize("scored", [0, 8])
def test_exact_topk_is_kascade_with_every_layer_an_anchor(scored):
    everywhere, identity = list(range(LAYERS)), [[0, 1]] * LAYERS
    same = PURE | {"budget_tokens": 20, "scored_queries": scored}
    outs = [
        Model(150, scheme).run(0, 150)
        for scheme in (build(everywhere, identity, **same), registry.build("exact_topk", **same))
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("options", [{"budget_fraction": 1.0, "min_budget_tokens": 0}, {}], ids=["whole", "floor-128"])
def test_a_budget_of_everything_is_dense(options):
    length = 160 if options else 128
    model, dense = Model(length, build(**options)), Model(length, registry.build("dense"))
    close(model.run(0, length - 1), dense.run(0, length - 1))
    close(model.run(length - 1, length, Phase.DECODE), dense.run(length - 1, length, Phase.DECODE))


def test_the_first_layer_is_dense():
    model, dense = Model(150, build(budget_tokens=1)), Model(150, registry.build("dense"))
    got, want = model.run(0, 149), dense.run(0, 149)
    close(got[0], want[0])
    assert (got[1] - want[1]).abs().max() > 0.1
    close(
        model.run(149, 150, Phase.DECODE)[0],
        dense.run(149, 150, Phase.DECODE)[0],
    )


def test_a_layer_like_its_anchor_gives_what_the_anchor_gives():
    model = Model(150, build([0], [[0, 1]] * 3, budget_tokens=9, dense_first_layers=0), same=True, layers=3)
    got = model.run(0, 150)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def test_exchanged_heads_of_an_anchor_and_of_the_map_change_nothing():
    plain = Model(150, build(budget_tokens=9))
    swapped = Model(150, build(head_map=[[0, 1], [0, 1], [0, 1], [0, 1], [1, 1]], budget_tokens=9))
    for rows in (swapped.q, swapped.k, swapped.v):
        rows[0] = rows[0].unflatten(1, (KV_HEADS, -1)).flip(1).flatten(1, 2)
    close(swapped.run(0, 150)[1], plain.run(0, 150)[1])


def test_candidates_lie_before_the_tile():
    model = Model(150, build(budget_tokens=40))
    step = model.step(0, 150, Phase.PREFILL)
    step.observer = Seen()
    model.layer(2, step, 0, 150)
    group = step.groups[0]
    chosen = model.scheme.select_prefill(
        model.q[2], PagedView(model.pool.layer(2), group.rows), group.tiles_of(TILE), LayerCall(2, SPEC)
    )
    chosen.validate(group.rows)
    assert chosen.counts[:, 0].tolist() == [0, 32, 40, 40, 40]
    assert bool((chosen.indices < chosen.tiles.position[:, None, None]).all())
    kept = step.observer.plans[2].to_mask(group.rows)
    for row, (_, start, count, _) in enumerate(chosen.tiles.host):
        assert bool(kept[row, :, start : start + count].all()), "the tile's own keys are read"


def test_a_prefix_is_read_as_if_nothing_followed():
    whole, prefix = Model(211, build(min_budget_tokens=9)), Model(211, build(min_budget_tokens=9))
    close(prefix.run(0, 96), whole.run(0, 211)[:, :96])


def test_chunks_between_tiles_change_nothing_in_any_layer():
    whole, chunked = Model(211, build(budget_tokens=9)), Model(211, build(budget_tokens=9))
    parts = [chunked.run(start, stop) for start, stop in [(0, 32), (32, 128), (128, 211)]]
    close(torch.cat(parts, 1), whole.run(0, 211))


def test_requests_that_take_turns_do_not_see_each_others_choice():
    scheme = build(budget_tokens=9)
    models = [Model(length, scheme, seed=length) for length in (150, 90)]
    steps = [model.step(0, len(model.q[0]), Phase.PREFILL) for model in models]
    got = [[], []]
    for index in range(LAYERS):
        for model, step, outs in zip(models, steps, got, strict=True):
            outs.append(model.layer(index, step, 0, len(model.q[0])))
    for model, outs in zip(models, got, strict=True):
        close(torch.stack(outs), oracle_prefill(model, lambda start: 9))


def test_sinks_and_window_come_on_top():
    scheme = build(budget_tokens=9, sink_tokens=4, window_tokens=10)
    model = Model(150, scheme)
    step = model.step(0, 150, Phase.PREFILL)
    step.observer = Seen()
    model.layer(2, step, 0, 150)
    kept = step.observer.plans[2].to_mask(step.groups[0].rows)
    assert bool(kept[4, :, :4].all())
    assert bool(kept[4, :, 118:].all())
    assert kept[4].sum(-1).tolist() == [4 + 9 + 10 + 22] * KV_HEADS
    decode = model.step(149, 150, Phase.DECODE)
    decode.observer = Seen()
    model.layer(2, decode, 149, 150)
    kept = decode.observer.plans[2].to_mask(decode.groups[0].rows)
    assert bool(kept[0, :, 139:].all())
    assert kept[0].sum(-1).tolist() == [4 + 9 + 10 + 1] * KV_HEADS


# Scores


def make_view(contexts, queries, *, kv_heads=KV_HEADS, dim=DIM, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    needed = [-(-context // PAGE) for context in contexts]
    pool = PagePool(CacheGeometry(1, kv_heads, dim, PAGE, sum(needed) + 1, dtype))
    pool.keys.fill_(float("nan"))
    order = torch.randperm(sum(needed) + 1, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for pages, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([pages[i // PAGE] * PAGE + i % PAGE for i in range(context)])
        rows = torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots)
    return PagedView(pool.layer(0), Rows.build(tables, list(contexts), list(queries), CPU))


def make_query(view, heads):
    shape = (view.rows.num_queries, heads, view.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(view.pages.keys.dtype)


SPECS = {
    "plain": AttentionSpec(0.5),
    "softcap": AttentionSpec(0.5, softcap=2.0),
    "sinks": AttentionSpec(0.5, sinks=torch.tensor([0.5, -2.0, 100.0, 1.0, 0.0, 3.0])),
}
SHAPES = {
    "one-token": ((1,), (1,), TILE),
    "decode": ((1, 70, 300), (1, 1, 1), 1),
    "chunks": ((130, 17, 300), (30, 16, 111), TILE),
    "whole": ((211,), (211,), 64),
}


@pytest.mark.parametrize("block", [anchor_torch.BLOCK_LOGITS, 700], ids=["one-block", "blocks-of-few-rows"])
@pytest.mark.parametrize("pool", ["group", "all"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scores_equal_the_reference(shape, spec, pool, block, monkeypatch):
    monkeypatch.setattr(anchor_torch, "BLOCK_LOGITS", block)
    contexts, queries, tile = shape
    view = make_view(contexts, queries)
    query, tiles = make_query(view, HEADS), Tiles.of(view.rows, tile)
    got, want = (anchor_scores(query, view, tiles, spec, pool=pool, backend=name) for name in ("torch", "reference"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    part = anchor_scores(query, view, tiles, spec, pool=pool, rows=range(len(tiles) - 1, len(tiles)))
    torch.testing.assert_close(part[0], want[-1, :, : part.shape[2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(1, 7), (2, 1), (3, 8)], ids="kv{0[0]}xgroup{0[1]}".format)
@pytest.mark.parametrize("fast", [True, False], ids=["bfloat16-products", "float32-products"])
def test_scores_of_bfloat16_keys(heads, fast, monkeypatch):
    kv_heads, group = heads
    monkeypatch.setattr(anchor_torch, "has_bfloat16_products", lambda: fast)
    view = make_view((130, 40), (70, 40), kv_heads=kv_heads, dim=80, dtype=torch.bfloat16)
    query, tiles = make_query(view, kv_heads * group), Tiles.of(view.rows, TILE)
    spec = AttentionSpec(80**-0.5)
    got, want = (anchor_scores(query, view, tiles, spec, backend=name) for name in ("torch", "reference"))
    # Logits of a few units, rounded to 8 bits, are off by up to 2^-8 of them, and so are the probabilities.
    error = (got - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt()
    assert error < (4e-3 if fast else 1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_scores_are_probabilities_summed(backend):
    view = make_view((200,), (200,))
    query, tiles = make_query(view, HEADS), Tiles.of(view.rows, TILE)
    pooled = anchor_scores(query, view, tiles, SPECS["plain"], backend=backend)
    want = [[count * GROUP] * KV_HEADS for *_, count, _ in tiles.host]
    torch.testing.assert_close(pooled.sum(-1), torch.tensor(want).float(), rtol=1e-5, atol=0)
    model = Model(200, None)
    rows = probabilities(model.q[0], model.k[0]).unflatten(0, (KV_HEADS, GROUP))
    assert rows.sum() == pytest.approx(HEADS * 200)


def test_pooling_after_the_softmax_is_not_pooling_before():
    """A head with a huge query wins before the softmax; after it, it has one vote as any other."""
    view = make_view((64,), (1,), kv_heads=1)
    keys = view.pages.keys[view.rows.block_tables[0].long(), 0].flatten(0, 1)
    loud, quiet = 5, 9
    query = torch.stack([keys[loud] * 100, keys[quiet] * 3, keys[quiet] * 3])[None]
    pooled = anchor_scores(query, view, Tiles.of(view.rows, 1), AttentionSpec(1.0))[0, 0]
    assert pooled.argmax() == quiet
    assert (query[0].sum(0) @ keys.T).argmax() == loud
    assert pooled.sum() == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("pool", ["group", "all"])
def test_slabs_are_bounded_and_change_nothing(pool, monkeypatch):
    view = make_view((300, 90), (200, 90))
    query, tiles = make_query(view, HEADS), Tiles.of(view.rows, TILE)
    candidates = torch.zeros_like(tiles.position), tiles.position // TILE * TILE
    budgets = [20 + row for row in range(len(tiles))]

    def choose():
        return pooled_topk(query, view, tiles, SPEC, candidates, budgets, pool=pool)

    want, seen, plain = choose(), [], anchor.top_units

    def note(scores, *rest, **options):
        seen.append(scores.numel())
        return plain(scores, *rest, **options)

    monkeypatch.setitem(anchor.SLAB_SCORES, "cpu", 700)
    monkeypatch.setattr(anchor, "top_units", note)
    got = choose()
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.counts, want.counts)
    assert len(seen) > 3
    assert max(seen) <= 700


def test_scores_refuse_what_they_cannot_do():
    view = make_view((20,), (20,))
    tiles, query = Tiles.of(view.rows, TILE), make_query(view, HEADS)
    with pytest.raises(ValueError, match="every earlier key"):
        anchor_scores(query, view, tiles, AttentionSpec(1.0, band=Band(0, 5)))
    with pytest.raises(ValueError, match="queries given"):
        anchor_scores(query[:3], view, tiles, SPEC)
    with pytest.raises(ValueError, match="does not fit"):
        anchor_scores(query[:, :5], view, tiles, SPEC)
    with pytest.raises(ValueError, match="budgets for"):
        pooled_topk(query, view, tiles, SPEC, (tiles.position, tiles.position), [1, 2])


# Profiles and options


def test_roles_follow_the_profile():
    roles = [(role.role, role.anchor) for role in build().roles(LAYERS)]
    assert roles == [
        (Role.DENSE_ANCHOR, None), (Role.REUSE, 0), (Role.SELECT, None), (Role.SELECT, None), (Role.REUSE, 3),
    ]  # fmt: skip
    more = [(role.role, role.anchor) for role in build(dense_first_layers=2).roles(LAYERS)]
    assert more[:2] == [(Role.DENSE_ANCHOR, None), (Role.DENSE, None)]


def test_layers_before_the_first_anchor_are_dense():
    roles = [role.role for role in build([2], [[0, 1]] * 4).roles(4)]
    assert roles == [Role.DENSE, Role.DENSE, Role.SELECT, Role.REUSE]


def test_without_a_profile_it_names_the_command_or_spaces_anchors_evenly():
    with pytest.raises(CalibrationMissing, match="foveate calibrate MODEL --scheme kascade"):
        registry.build("kascade")
    scheme = registry.build("kascade", uncalibrated=3, **PURE)
    anchors = [layer for layer, role in enumerate(scheme.roles(30)) if role.anchor is None]
    assert anchors == [0, 10, 20]
    scheme = registry.build("kascade", uncalibrated=2, budget_tokens=17, **PURE)
    model = Model(100, scheme, layers=4)
    identity = [[0, 1]] * 4
    close(model.run(0, 100), oracle_prefill(model, lambda start: 17, [0, 2], identity, pool_all=True))
    assert len(registry.build("kascade", uncalibrated=9).roles(4)) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"budget_fraction": 1.5}, {"budget_fraction": "x"}, {"tile_tokens": 0}, {"tile_tokens": 48}, {"pool": "none"},
        {"anchors": 2}, {"anchors": -1}, {"uncalibrated": True}, {"budget_tokens": -1}, {"dense_first_layers": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(SchemeConfigError, match=next(iter(options))):
        build(**options)


@pytest.mark.parametrize(
    ("anchors", "head_map"),
    [
        ([2, 0], HEAD_MAP),
        ([0, 0], HEAD_MAP),
        ([0, 5], HEAD_MAP),
        ([0, 2], [[0, 1], [2, 0], [0, 1]]),
        ([0, 2], [[0, 1], [1, 0], [1, 0]]),
        ([0], [0, 1]),
    ],
    ids=["order", "twice", "no-such-layer", "no-such-head", "anchor-remapped", "no-map"],
)
def test_profiles_that_contradict_themselves(anchors, head_map):
    with pytest.raises(ProfileError, match="kascade"):
        build(anchors, head_map)


def test_an_empty_profile_is_refused():
    with pytest.raises(SchemeConfigError, match="anchors"):
        registry.build("kascade", {"kascade": Profile("kascade", {}, {}, "", {})})


def test_layers_with_a_window_are_read_whole_between_anchors():
    model, dense = Model(150, build(budget_tokens=5)), Model(150, registry.build("dense"))
    windowed = AttentionSpec(SPEC.scale, band=Band(0, 20))
    outs = []
    for each in (model, dense):
        step = each.step(0, 150, Phase.PREFILL)
        each.layer(0, step, 0, 150)
        ops.write_kv(each.k[1], each.v[1], each.pool.layer(1), step.slots)
        outs.append(attend(each.q[1], LayerCall(1, windowed), step))
    close(*outs)
