"""int8 pages: written alike by C++ and torch, and read by every op as the floats that they stand for.

``make_views`` gives the same tokens twice: in int8 pages, and in float32 pages that hold what the int8 ones stand for.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_SUM, KEY_SUM_16, VALUE_SUM, Fold, PageStat
from foveate.kv_cache.stored import dequantize, quantize
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import anchor_native, attention_native, native, reference, threshold_native
from foveate.sparse_attn.ops.attention_ratio import attention_ratio
from foveate.sparse_attn.ops.key_change import key_change
from foveate.sparse_attn.ops.sums import chunk_sums, cut_sums, unit_sums
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band, ScoreThreshold, Selection, Tiles

CPU, NAN = torch.device("cpu"), float("nan")
EVERY_STAT = (*(PageStat(source, fold) for source in ("key", "value") for fold in Fold), KEY_SUM_16)
# RMS error of (out, lse) against the float32 reference over the same int8 pages. Measured: float32 7e-7, and 5.6e-5 and
# 5e-6 where AVX2 multiplies words (queries of 16 bits); bfloat16 4.6e-3 and 4e-4 where rows and weights are rounded to
# it (prompts on dot products and tiles), 1.5e-4 else in prompts; in decode 4e-5, and 1.1e-3 and 3e-5 where tiles of
# bytes take queries and weights in two planes.
EXACT, WORDS = (2e-6, 2e-6), (1e-4, 1e-5)
TOLERANCE = {"prefill": (7e-3, 6e-4), "decode": (2e-3, 1e-4)}


def tolerance(isa, dtype, phase):
    if dtype == torch.float32:
        return WORDS if isa == "avx2" else EXACT
    return TOLERANCE[phase]


SPECS = {
    "causal": AttentionSpec(0.2),
    "softcap": AttentionSpec(0.2, softcap=2.0),
    "ring": AttentionSpec(0.2, band=Band(5, 60), softcap=3.0),
    "sinks": AttentionSpec(0.2, sinks=torch.tensor([0.5, -2.0, 100.0, 1.0, 0.0, 3.0])),
}
# (KV heads, group, head dim): on tiles of bytes, and beside them by head dim and by group.
HEADS = [(2, 3, 64), (1, 8, 128), (1, 7, 64), (2, 2, 256), (3, 1, 80), (1, 5, 16), (1, 12, 64)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


def spoil(pool):
    """Anything may stand in a slot that was never written, NaN scales among it."""
    if pool.geometry.quantized:
        pool.keys.fill_(77), pool.values.fill_(-99)
        pool.key_scales.fill_(NAN), pool.value_scales.fill_(NAN)
    else:
        pool.keys.fill_(NAN), pool.values.fill_(NAN)


@cache
def make_views(contexts, queries, kv_heads=2, dim=64, page=16, stats=()):
    """Views of int8 pages and of float32 pages with the same rows, pages in shuffled order."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-context // page) for context in contexts]
    pools = [
        PagePool(CacheGeometry(1, kv_heads, dim, page, sum(needed) + 3, kind), stats)
        for kind in (torch.int8, torch.float32)
    ]
    for pool in pools:
        spoil(pool)
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for table, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([table[i // page] * page + i % page for i in range(context)])
        rows = torch.randn(2, context, kv_heads, dim, generator=generator)
        ops.write_kv(rows[0], rows[1], pools[0].layer(0), slots)
        ops.write_kv(*(dequantize(*quantize(part)) for part in rows), pools[1].layer(0), slots)
    rows = Rows.build(tables, list(contexts), list(queries), CPU)
    return tuple(PagedView(pool.layer(0), rows) for pool in pools)


def make_query(view, heads, dtype=torch.float32):
    shape = view.rows.num_queries, heads, view.head_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def choose(view, heads, granularity, tile):
    tiles = Tiles.of(view.rows, tile)
    units = -(-max(view.rows.host_context_lens) // granularity)
    mask = torch.rand(len(tiles), heads, units, generator=torch.Generator().manual_seed(2)) < 0.4
    mask &= torch.arange(units) <= ((tiles.position + tiles.query_count - 1) // granularity)[:, None, None]
    mask[0, 0] = False
    return Selection.from_mask(mask, granularity, tiles)


def check(got, want, tolerance):
    for name, a, b, ratio in zip(("out", "lse"), got, want, tolerance, strict=False):
        assert torch.equal(torch.isinf(a), torch.isinf(b)), f"{name}: other rows see nothing"
        a, b = (part.double().nan_to_num(neginf=0, nan=NAN) for part in (a, b))
        error = (a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt().clamp(min=1e-6)
        assert error < ratio, f"{name}: RMS error {error:.2e} of the reference"


@pytest.mark.parametrize("heads", HEADS, ids="{0[0]}x{0[1]}x{0[2]}".format)
@pytest.mark.parametrize("granularity", [None, 1, 16], ids="granularity-{}".format)
def test_native_decode(isa, dtype, heads, granularity):
    kv_heads, group, dim = heads
    eight, floats = make_views((1000, 3, 200), (1, 1, 1), kv_heads, dim)
    query = make_query(eight, kv_heads * group, dtype)
    selection = granularity and choose(eight, kv_heads, granularity, 1)
    want = reference.attention(query, floats, selection, AttentionSpec(0.2))
    got = attention_native.decode(query, eight, selection, AttentionSpec(0.2), isa=isa)
    check(got, want, tolerance(isa, dtype, "decode"))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("granularity", [None, 4, 32], ids="granularity-{}".format)
def test_native_attention_of_every_kind_of_layer(isa, dtype, phase, granularity, spec):
    shape = ((130, 17, 600), (1, 1, 1)) if phase == "decode" else ((130, 17, 200), (30, 16, 111))
    eight, floats = make_views(*shape)
    query = make_query(eight, 6, dtype)
    selection = granularity and choose(eight, 6, granularity, 1 if phase == "decode" else 32)
    want = reference.attention(query, floats, selection, spec)
    got = getattr(attention_native, phase)(query, eight, selection, spec, isa=isa)
    check(got, want, tolerance(isa, dtype, phase))


@pytest.mark.parametrize("heads", HEADS, ids="{0[0]}x{0[1]}x{0[2]}".format)
@pytest.mark.parametrize("kind", ["dense", "keys-per-query"])
def test_native_prefill(isa, dtype, heads, kind):
    kv_heads, group, dim = heads
    eight, floats = make_views((130, 17, 200), (30, 16, 111), kv_heads, dim)
    query = make_query(eight, kv_heads * group, dtype)
    selection = choose(eight, kv_heads, 16, 1) if kind == "keys-per-query" else None
    want = reference.attention(query, floats, selection, AttentionSpec(0.2))
    got = attention_native.prefill(query, eight, selection, AttentionSpec(0.2), isa=isa)
    check(got, want, tolerance(isa, dtype, "prefill"))


def one_sequence(key, value, queries):
    """A view of int8 pages that hold ``key`` and ``value [T, G, D]``, for the last ``queries`` of them."""
    context, kv_heads, dim = key.shape
    pages = -(-context // 16)
    pool = PagePool(CacheGeometry(1, kv_heads, dim, 16, pages, torch.int8), ())
    ops.write_kv(key, value, pool.layer(0), torch.arange(context))
    return PagedView(pool.layer(0), Rows.build([list(range(pages))], [context], [queries], CPU))


@pytest.mark.parametrize("apart", [4.0, 9.0, 14.0])
def test_native_prefill_behind_an_attention_sink(isa, apart):
    """The first key, ``apart`` nats above the rest, takes most of the attention and has no value: weights may be off by
    2^-16 of the largest among 64 keys, which the sink is of those beside it, but not of others."""
    generator = torch.Generator().manual_seed(0)
    key, value = (0.3 * torch.randn(700, 2, 64, generator=generator) for _ in range(2))
    key[0], value[0] = 0.0, 0.0
    key[0, :, 0] = apart
    query = 0.3 * torch.randn(90, 6, 64, generator=generator)
    query[:, :, 0] = 1.0
    spec = AttentionSpec(1.0)
    view = one_sequence(key, value, 90)
    want = reference.attention(query, view, None, spec)
    out, lse = attention_native.prefill(query, view, None, spec, isa=isa)
    torch.testing.assert_close(lse, want[1], rtol=0, atol=5e-4)
    assert (out - want[0]).pow(2).mean().sqrt() < 8 * 2**-16 * value.pow(2).mean().sqrt(), "64 keys"
    value[:64] = 0.0
    view = one_sequence(key, value, 90)
    got = attention_native.prefill(query, view, None, spec, isa=isa)
    check(got, reference.attention(query, view, None, spec), WORDS)


@pytest.mark.parametrize("nats", [-5000.0, -400.0, 400.0, 5000.0], ids="{:g}".format)
def test_native_prefill_of_logits_of_any_size(isa, nats):
    """Every other key has the largest logit; what is read is the mean of their values."""
    generator = torch.Generator().manual_seed(0)
    key = torch.zeros(256, 2, 64)
    key[::2, :, 0], key[1::2, :, 0] = (1.0, 0.5) if nats > 0 else (0.5, 1.0)
    value = torch.randint(0, 2, key.shape, generator=generator) * 2.0 - 1.0
    query = torch.zeros(1, 6, 64)
    query[..., 0] = 1.0 if nats > 0 else -1.0
    out, _ = attention_native.prefill(query, one_sequence(key, value, 1), None, AttentionSpec(abs(nats)), isa=isa)
    want = value[::2].mean(0).repeat_interleave(3, 0)
    torch.testing.assert_close(out[0], want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("heads", [2, 6], ids=["group1", "group3"])  # a pass is of 24 queries, or of 8
@pytest.mark.parametrize("seen", ["unseen", "hardly-weighed"])
def test_a_large_value_takes_no_bits_from_others(isa, heads, seen):
    """Before it and in its own pass; and from those who see it with a weight that makes little of it."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(200, 2, 64, generator=generator) for _ in range(2))
    query, spec = torch.randn(200, heads, 64, generator=generator), AttentionSpec(0.125)
    query[..., 0], key[..., 0] = 1.0, 0.0
    value[100] *= 1e5
    if seen == "hardly-weighed":
        key[100, :, 0] = -25 / spec.scale
    view = one_sequence(key, value, 200)
    got = attention_native.prefill(query, view, None, spec, isa=isa)
    want = reference.attention(query, view, None, spec)
    check([part[:100] for part in got], [part[:100] for part in want], WORDS)
    check([part[100:] for part in got], [part[100:] for part in want], WORDS)


@pytest.mark.parametrize("factor", [1e-24, 1e-12, 1e12, 1e30], ids="x{:g}".format)
def test_native_prefill_of_values_of_any_size(isa, factor):
    """Large beside small in one block, and zeros."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(150, 2, 64, generator=generator) for _ in range(2))
    value[::3] *= 1e-3
    value[1::7] = 0.0
    query, spec = torch.randn(40, 6, 64, generator=generator), AttentionSpec(0.125)
    view = one_sequence(key, factor * value, 40)
    want = reference.attention(query, view, None, spec)
    got = attention_native.prefill(query, view, None, spec, isa=isa)
    check([part / scale for part, scale in zip(got, (factor, 1.0), strict=True)], (want[0] / factor, want[1]), WORDS)


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=["nan", "inf"])
def test_values_that_are_not_numbers_reach_those_who_read_them(isa, bad):
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(200, 2, 64, generator=generator) for _ in range(2))
    value[100, 0, 3] = bad
    query = torch.randn(200, 6, 64, generator=generator)
    view = one_sequence(key, value, 200)
    out, lse = attention_native.prefill(query, view, None, AttentionSpec(0.125), isa=isa)
    assert bool(out[100:, :3].isnan().all()), "heads of the first KV head"
    assert bool(out[:60].isfinite().all()), "queries before it; those of one pass share what is not seen by all"
    assert bool(out[:, 3:].isfinite().all())
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_largest_sums_of_the_widest_heads(isa, dtype, phase):
    """512 products of the largest key and query: 98 % of what 32 bits hold, where words are multiplied."""
    rows = Rows.build([[0]], [2], [2 if phase == "prefill" else 1], CPU)
    pool = PagePool(CacheGeometry(1, 1, 512, 16, 1, torch.int8), ())
    key = torch.stack([torch.full((1, 512), -1.0), torch.full((1, 512), 1.0)])
    ops.write_kv(key, key, pool.layer(0), torch.arange(2))
    query = torch.ones(rows.num_queries, 1, 512, dtype=dtype)
    out, lse = getattr(attention_native, phase)(
        query, PagedView(pool.layer(0), rows), None, AttentionSpec(0.2), isa=isa
    )
    torch.testing.assert_close(out[-1].float(), torch.ones(1, 512))
    torch.testing.assert_close(lse[-1], torch.tensor([512 * 0.2]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("queries", [(1, 1), (60, 111)], ids=["decode", "prefill"])
@pytest.mark.parametrize("value_mean", [False, True], ids=["", "value-mean"])
def test_native_thresholds(isa, queries, value_mean):
    eight, floats = make_views((90, 300), queries, stats=(VALUE_SUM,))
    query = make_query(eight, 6)
    plan = ScoreThreshold(torch.full(query.shape[:2], 0.5), dropped_sum="exact", value_mean=value_mean)
    want = ops.thresholded(query, floats, plan, AttentionSpec(0.2), backend="reference")
    for got, allowed in (
        # A logit near the threshold that rounds to its other side moves a row by its weight.
        (
            threshold_native.thresholded(query, eight, plan, AttentionSpec(0.2), isa=isa),
            2e-4 if isa == "avx2" else 2e-5,
        ),
        (ops.thresholded(query, eight, plan, AttentionSpec(0.2), backend="torch"), 2e-5),
        (ops.thresholded(query, eight, plan, AttentionSpec(0.2), backend="reference"), 2e-5),
    ):
        check(got, want, (allowed, WORDS[1] if allowed > 2e-5 else EXACT[1]))
        assert (got[2] - want[2]).abs().max() <= 1, "a logit that rounds to the other side of the threshold"


def anchor_error(isa, eight, floats, query, tiles, spec, pool="group"):
    want = ops.anchor_scores(query, floats, tiles, spec, pool=pool, backend="reference")
    got = anchor_native.scores(query, eight, tiles, spec, range(len(tiles)), pool == "all", isa=isa)
    return (got - want).abs().max() / want.max()


# Of decode; 5e-5 where AVX2 multiplies words.
def most_anchor_error(isa, dtype):
    return (1e-4 if isa == "avx2" else 1e-6) if dtype == torch.float32 else 1e-2


def in_six_bits(query):
    """As AVX2 rounds queries that choose for a prompt."""
    level = query.float().abs().amax(-1, keepdim=True) / 31
    return (query.float() / level).round() * level


def check_prompt_anchors(isa, eight, floats, query, tiles, spec):
    """Element by element: weights are kept as bytes, and one is 0.90 to 1.11 of what it should be."""
    exact = in_six_bits(query) if isa == "avx2" else query
    want = ops.anchor_scores(exact, floats, tiles, spec, backend="reference")
    got = anchor_native.scores(query, eight, tiles, spec, range(len(tiles)), False, isa=isa)
    assert (got[want == 0] == 0).all(), "what no query sees"
    torch.testing.assert_close(got, want, rtol=0.12, atol=1e-6)
    assert (got - want).abs().mean() < 0.02 * want.mean()


@pytest.mark.parametrize("step", [1, 5])
@pytest.mark.parametrize(
    "spec", [spec for name, spec in SPECS.items() if name != "ring"], ids=lambda spec: str(spec.softcap)
)
def test_native_anchor_scores(isa, dtype, spec, step):
    eight, floats = make_views((130, 200), (130, 111))
    query, tiles = make_query(eight, 6, dtype), Tiles.of(eight.rows, 32).every(step)
    check_prompt_anchors(isa, eight, floats, query, tiles, spec)


@pytest.mark.parametrize("heads", [*HEADS, (1, 16, 48)], ids="kv{0[0]}xgroup{0[1]}xdim{0[2]}".format)
def test_native_anchor_scores_by_heads(isa, dtype, heads):
    kv_heads, group, dim = heads
    eight, floats = make_views((300, 17), (111, 9), kv_heads, dim)
    query, tiles = make_query(eight, kv_heads * group, dtype), Tiles.of(eight.rows, 32)
    check_prompt_anchors(isa, eight, floats, query, tiles, AttentionSpec(2 * dim**-0.5))


@pytest.mark.parametrize(
    ("bad", "softcap"), [(NAN, 0.0), (NAN, 2.0), (float("inf"), 0.0)], ids=["nan", "nan-softcap", "inf"]
)
def test_a_query_that_is_not_a_number_makes_the_scores_of_its_tile_that(isa, dtype, bad, softcap):
    eight, _ = make_views((200,), (64,))
    query, tiles = make_query(eight, 6, dtype), Tiles.of(eight.rows, 32)
    query[40, 1, 7] = bad
    spec = AttentionSpec(0.2, softcap=softcap)
    scores = anchor_native.scores(query, eight, tiles, spec, range(len(tiles)), False, isa=isa)
    other, own = tiles.ends[0], tiles.ends[1]
    assert bool(scores[0, :, :other].isfinite().all())
    assert bool(scores[1, 0, : own - 32].isnan().all())


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 4.0], ids="x{}".format)
def test_keys_that_native_anchors_choose_are_worth_as_much_as_the_best(isa, sharpness):
    eight, floats = make_views((700,), (64,))
    query, tiles, spec = make_query(eight, 6), Tiles.of(eight.rows, 32), AttentionSpec(sharpness * 0.25)
    first, end = torch.zeros(len(tiles), dtype=torch.long), torch.full((len(tiles),), 600)
    budgets = [60] * len(tiles)
    chosen, counts = anchor_native.topk(query, eight, tiles, spec, (first, end), budgets, 60, False, isa=isa)
    assert (counts == 60).all()
    worth = ops.anchor_scores(query, floats, tiles, spec, backend="reference")[:, :, :600]
    best = worth.topk(60, dim=2).values.sum(2)
    allowed = 5e-3 if isa == "avx2" and sharpness == 4.0 else 2e-3  # queries in 6 bits, and scores that lie far apart
    torch.testing.assert_close(worth.gather(2, chosen.long()).sum(2), best, rtol=allowed, atol=0)


@pytest.mark.parametrize("heads", [*HEADS, (1, 16, 48)], ids="kv{0[0]}xgroup{0[1]}xdim{0[2]}".format)
def test_native_anchor_scores_of_decode(isa, dtype, heads):
    kv_heads, group, dim = heads
    eight, floats = make_views((1300, 1025, 3), (1, 1, 1), kv_heads, dim)  # parts of 1,024 keys, blocks of 128
    query, tiles = make_query(eight, kv_heads * group, dtype), Tiles.of(eight.rows, 1)
    spec = AttentionSpec(2 * dim**-0.5)
    assert anchor_error(isa, eight, floats, query, tiles, spec) < most_anchor_error(isa, dtype)


@pytest.mark.parametrize("pool", ["group", "all"])
@pytest.mark.parametrize("name", ["softcap", "sinks"])
def test_native_anchor_scores_of_decode_by_facts(isa, dtype, name, pool):
    eight, floats = make_views((300, 17), (1, 1))
    query, tiles = make_query(eight, 6, dtype), Tiles.of(eight.rows, 1)
    assert anchor_error(isa, eight, floats, query, tiles, SPECS[name], pool) < most_anchor_error(isa, dtype)


def test_native_anchor_weights_kept_past_the_caches(isa, dtype):
    """20,000 keys and 256 columns of a byte are 4.9 MiB (with 16 threads and more they are cut to less)."""
    eight, floats = make_views((20_000,), (32,), kv_heads=1, dim=16)
    query, tiles = make_query(eight, 8, dtype), Tiles.of(eight.rows, 32)
    check_prompt_anchors(isa, eight, floats, query, tiles, AttentionSpec(0.5))


@pytest.mark.parametrize("apart", [10.0, 14.0, 18.0])
def test_keys_far_below_an_attention_sink_are_still_ranked(isa, apart):
    """All queries spend nearly everything on the first key, ``apart`` to ``apart + 2`` nats above the rest."""
    context, dim = 300, 64
    rows = Rows.build([list(range(19))], [context], [40], CPU)
    pool = PagePool(CacheGeometry(1, 1, dim, 16, 19, torch.int8), ())
    key = torch.zeros(context, 1, dim)
    key[:, 0, 0], key[0, 0, 1] = torch.linspace(0, 2, context), apart + 2
    ops.write_kv(key, key, pool.layer(0), torch.arange(context))
    view, query = PagedView(pool.layer(0), rows), torch.zeros(40, 4, dim)
    query[:, :, :2] = 1.0
    tiles = Tiles.of(rows, 64)
    got = anchor_native.scores(query, view, tiles, AttentionSpec(1.0), range(len(tiles)), False, isa=isa)
    want = ops.anchor_scores(query, view, tiles, AttentionSpec(1.0), backend="reference")
    seen = want > 0
    # Here all columns of a key are rounded alike.
    torch.testing.assert_close(got[seen], want[seen], rtol=0.12, atol=0)


def test_a_key_that_reads_as_nan_makes_the_scores_of_a_prompt_that(isa):
    eight, _ = make_views.__wrapped__((200,), (64,))  # not those of others: it is spoilt
    query, tiles = make_query(eight, 6), Tiles.of(eight.rows, 32)
    assert eight.pages.key_scales is not None
    eight.pages.key_scales[eight.rows.block_tables[0, 3]] = float("nan")
    scores = anchor_native.scores(query, eight, tiles, AttentionSpec(0.2), range(len(tiles)), False, isa=isa)
    assert scores.isnan()[:, :, : tiles.ends[0]].all()


PURE = {
    "decode": lambda view, backend: ops.decode(make_query(view, 6), view, None, AttentionSpec(0.2), backend=backend),
    "softcapped": lambda view, backend: ops.decode(
        make_query(view, 6), view, None, AttentionSpec(0.2, softcap=2.0), backend=backend
    ),
    "selected": lambda view, backend: ops.decode(
        make_query(view, 6), view, choose(view, 2, 4, 1), AttentionSpec(0.2), backend=backend
    ),
}
PROMPT = {
    "prefill": lambda view, backend: ops.prefill(make_query(view, 6), view, None, AttentionSpec(0.2), backend=backend),
    "window": lambda view, backend: ops.prefill(
        make_query(view, 6), view, None, AttentionSpec(0.2, band=Band(0, 37)), backend=backend
    ),
    "selected": lambda view, backend: ops.prefill(
        make_query(view, 6), view, choose(view, 2, 4, 32), AttentionSpec(0.2), backend=backend
    ),
    "keys-per-query": lambda view, backend: ops.prefill(
        make_query(view, 6), view, choose(view, 2, 16, 1), AttentionSpec(0.2), backend=backend
    ),
    "anchors": lambda view, backend: (
        ops.anchor_scores(make_query(view, 6), view, Tiles.of(view.rows, 32), AttentionSpec(0.2), backend=backend),
    ),
    "antidiagonals": lambda view, backend: (
        ops.antidiagonal_scores(make_query(view, 6), view, Tiles.of(view.rows, 32), 4, 0.2, backend=backend),
    ),
    "changes": lambda view, backend: (key_change(view, 3, 64, 4, backend=backend),),
    "sums": lambda view, backend: (unit_sums(view, 8, backend=backend)[:, :16],),
    "chunks": lambda view, backend: (
        chunk_sums(view, torch.tensor([[0, 7], [30, 100]]), torch.tensor([[7, 50], [1, 99]]), backend=backend),
    ),
    "cut": lambda view, backend: (cut_sums(view, 8, (21, 100), (130, 200), backend=backend),),
    "cut-pages": lambda view, backend: (cut_sums(view, 32, (21, 100), (130, 200), backend=backend),),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", PURE.values(), ids=PURE)
def test_ops_of_decode_in_torch(op, backend):
    eight, floats = make_views((300, 3, 170), (1, 1, 1))
    check(op(eight, backend), op(floats, "reference"), (1e-5, 1e-5))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", PROMPT.values(), ids=PROMPT)
def test_ops_of_prompts_in_torch(op, backend):
    eight, floats = make_views((130, 200), (130, 111), stats=(KEY_SUM,))
    check(op(eight, backend), op(floats, "reference"), (1e-5, 1e-5))


def test_ops_without_a_backend():
    eight, floats = make_views((130, 200), (130, 111), stats=(KEY_SUM, VALUE_SUM))
    query = make_query(eight, 6)
    of = [attention_ratio(query, view, AttentionSpec(0.2), 4, 32) for view in (eight, floats)]
    check((of[0],), (of[1],), (1e-5,))


@pytest.mark.parametrize("dim", [16, 80, 512], ids="{}-channels".format)
@pytest.mark.parametrize("stored", [torch.int8, None], ids=["int8", "full"])
def test_native_writes_what_torch_writes(dtype, stored, dim):
    """Bit for bit, scales and odd rows included; sums of statistics in float32, so up to their order."""
    if native.library() is None:
        pytest.skip("the kernels were not built on this machine")
    generator = torch.Generator().manual_seed(0)
    geometry = CacheGeometry(1, 2, dim, 16, 20, stored or dtype)
    pools = [PagePool(geometry, EVERY_STAT) for _ in range(2)]
    tensors = [[tensor for tensor in pool._tensors()] for pool in pools]
    for tensor in (*tensors[0], *tensors[1]):
        tensor.fill_(3)
    order = torch.randperm(20, generator=generator)[:18]
    slots = torch.cat([page * 16 + torch.arange(16) for page in order])
    slots[[7, 150]] = -1
    # Rows of very different sizes, lying as the model's projections leave them.
    sizes = torch.exp(8 * torch.randn(288, 1, 1, generator=generator))
    key, value = ((torch.randn(2, 288, dim, generator=generator).transpose(0, 1) * sizes).to(dtype) for _ in range(2))
    key[5, 0], key[9, 1, 3], value[10, 0, 2], key[11] = 0, NAN, float("inf"), 1e-38
    for backend, pool in zip(("torch", "native"), pools, strict=True):
        for part in (slice(0, 100), slice(100, 101), slice(101, 288)):
            ops.write_kv(key[part], value[part], pool.layer(0), slots[part], backend=backend)
    kept = len(tensors[0]) - len(EVERY_STAT)
    for want, got in zip(tensors[0][:kept], tensors[1][:kept], strict=True):
        assert torch.equal(want.float().nan_to_num(nan=12345.0), got.float().nan_to_num(nan=12345.0))
    for stat, want, got in zip(EVERY_STAT, tensors[0][kept:], tensors[1][kept:], strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=0, equal_nan=True, msg=lambda text, s=stat: f"{s}: {text}"
        )


@pytest.mark.parametrize("stored", [torch.int8, torch.float32], ids=["int8", "float32"])
def test_statistics_are_those_of_the_rows_that_are_read(stored):
    pool = PagePool(CacheGeometry(1, 2, 32, 16, 4, stored), EVERY_STAT)
    rows = torch.randn(2, 30, 2, 32, generator=torch.Generator().manual_seed(0))
    ops.write_kv(rows[0], rows[1], pool.layer(0), torch.arange(16, 46))
    for page, count in ((1, 16), (2, 14)):
        for stat, want in ops.page_stats(pool.layer(0), page, count).items():
            torch.testing.assert_close(pool.layer(0).stats[stat][page], want, rtol=1e-5, atol=1e-5)


def test_a_slot_behind_the_last_page_is_refused_and_nothing_written():
    pool = PagePool(CacheGeometry(1, 1, 16, 16, 2, torch.int8))
    pool.keys.zero_()
    with pytest.raises(IndexError):
        ops.write_kv(torch.ones(2, 1, 16), torch.ones(2, 1, 16), pool.layer(0), torch.tensor([0, 32]))
    if native.library() is not None:
        assert not pool.keys.any()


def test_triton_refuses_int8_pages():
    pool = PagePool(CacheGeometry(1, 1, 16, 16, 2, torch.int8))
    with pytest.raises(ValueError, match="int8"):
        ops.write_kv(torch.ones(1, 1, 16), torch.ones(1, 1, 16), pool.layer(0), torch.tensor([0]), backend="triton")


@pytest.mark.parametrize("scale", [0.05, 0.2], ids="scale{}".format)
def test_attention_is_off_by_no_more_than_the_rounding_allows(scale):
    """From |k - k8| <= step / 2: a logit moves by at most d = scale * |q|_1 * step_k / 2, so log-sum-exp by d, the
    weights, which sum to 1, by exp(2 d) - 1 in all, and the output by that times the largest value, plus step_v / 2."""
    generator = torch.Generator().manual_seed(0)
    length, dim, heads = 400, 64, 6
    key, value = torch.randn(2, length, 2, dim, generator=generator)
    pools = [PagePool(CacheGeometry(1, 2, dim, 16, 25, kind)) for kind in (torch.int8, torch.float32)]
    rows = Rows.build([list(range(25))], [length], [length], CPU)
    views = [PagedView(pool.layer(0), rows) for pool in pools]
    for view in views:
        ops.write_kv(key, value, view.pages, torch.arange(length))
    query = torch.randn(length, heads, dim, generator=generator)
    (out, lse), (want, want_lse) = (ops.prefill(query, view, None, AttentionSpec(scale)) for view in views)
    steps = [pools[0].key_scales[0].transpose(0, 1).flatten(1), pools[0].value_scales[0].transpose(0, 1).flatten(1)]
    step_k, step_v = (part.cummax(1).values.T.repeat_interleave(3, 1) for part in steps)  # [T, H], of the keys seen
    moved = scale * query.abs().sum(-1) * step_k / 2
    assert ((lse - want_lse).abs() <= moved + 1e-5).all()
    largest = value.abs().amax(-1).cummax(0).values.repeat_interleave(3, 1)
    bound = torch.expm1(2 * moved) * largest + step_v / 2
    error = (out - want).abs().amax(-1)
    assert (error <= bound + 1e-5).all()
    assert float(error.max()) > 1e-4, "int8 costs something, or it was not used"
