"""Anchor scores of the compiled CPU kernels, each instruction set that this machine has, against the reference."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from foveate.sparse_attn.ops import anchor_native, native
from foveate.sparse_attn.ops.anchor import anchor_scores, pooled_topk
from foveate.sparse_attn.ops.topk import top_units
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Tiles

from .paged import Paged

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

# Largest error of a pooled probability over the largest one. Measured: 3e-6 in float32, 4e-6 where bfloat16 is widened,
# and 2e-3 where weights are kept in bfloat16 (2^-9 each), as dot products and tiles do.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (KV heads, group, head dim)
HEADS = [(2, 3, 64), (3, 1, 80), (1, 7, 96), (2, 4, 128), (1, 2, 256), (1, 40, 16)]
SHAPES = {
    "one-token": ((1,), (1,), 32),
    "decode": ((1, 64, 700), (1, 1, 1), 1),
    "decode-parts": ((2500, 1024, 1025), (1, 1, 1), 1),  # kPartKeys of anchor.cpp is 1,024
    "chunks": ((130, 17, 700), (30, 16, 111), 32),
    "tile128": ((300,), (300,), 128),
}


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


def assert_scores(query, view, tiles, spec, isa, pool_all=False):
    rows = range(len(tiles))
    got = anchor_native.scores(query, view, tiles, spec, rows, pool_all, isa=isa)
    pool = "all" if pool_all else "group"
    want = anchor_scores(query, view, tiles, spec, pool=pool, backend="reference")
    assert got.shape == want.shape
    error = float((got - want).abs().max() / want.max())
    assert error < TOLERANCE[query.dtype], f"largest error {error:.1e}"
    return got


@pytest.mark.parametrize("heads", HEADS, ids="kv{0[0]}xgroup{0[1]}xdim{0[2]}".format)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_scores_equal_the_reference(shape, heads, dtype, isa):
    contexts, queries, tile = shape
    kv_heads, group, dim = heads
    query, view = Paged(contexts, kv_heads, group, dim, dtype=dtype).view(queries)
    assert_scores(query, view, Tiles.of(view.rows, tile), AttentionSpec(2 * dim**-0.5), isa)


@pytest.mark.parametrize("pool_all", [False, True], ids=["group", "all"])
@pytest.mark.parametrize(
    "facts",
    [{"softcap": 2.0}, {"sinks": torch.tensor([0.5, -2.0, 100.0, 1.0, 0.0, 3.0])}, {}],
    ids=["softcap", "sinks", "plain"],
)
@pytest.mark.parametrize(("queries", "tile"), [((30, 16, 111), 32), ((1, 1, 1), 1)], ids=["prompt", "decode"])
def test_facts_and_pools(facts, pool_all, queries, tile, dtype, isa):
    query, view = Paged((130, 17, 300), 2, 3, 64, page_size=64, dtype=dtype).view(queries)
    tiles = Tiles.of(view.rows, tile)
    assert_scores(query, view, tiles, AttentionSpec(0.25, **facts), isa, pool_all)


@pytest.mark.parametrize("step", [2, 5, 64])
@pytest.mark.parametrize("heads", [(2, 3, 64), (1, 7, 96)], ids="kv{0[0]}xgroup{0[1]}xdim{0[2]}".format)
def test_some_queries_of_a_tile(step, heads, dtype, isa):
    kv_heads, group, dim = heads
    query, view = Paged((130, 17, 700), kv_heads, group, dim, dtype=dtype).view((30, 16, 111))
    whole = Tiles.of(view.rows, 32)
    tiles = whole.every(step)
    assert tiles.ends == whole.ends
    got = assert_scores(query, view, tiles, AttentionSpec(0.25), isa)
    asked = torch.tensor([count for _, _, count, _ in tiles.host]) * group
    torch.testing.assert_close(got.sum(2), asked[:, None].expand(-1, kv_heads).float(), rtol=2e-3, atol=0)
    torch.testing.assert_close(
        anchor_scores(query, view, tiles, AttentionSpec(0.25), backend="torch"),
        anchor_scores(query, view, tiles, AttentionSpec(0.25), backend="reference"),
        rtol=2e-2,
        atol=2e-2 if dtype == torch.bfloat16 else 1e-5,
    )


def test_the_number_of_threads_changes_nothing(isa):
    query, view = Paged((2500, 7, 1100), 2, 3, 64).view((1, 1, 1))
    tiles, scores = Tiles.of(view.rows, 1), []
    for count in (1, 2, 5):
        with threads(count):
            scores.append(anchor_native.scores(query, view, tiles, AttentionSpec(0.25), range(3), False, isa=isa))
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])


def test_long_contexts_are_pooled_in_parts_of_a_tile(dtype, isa):
    """With many threads each has room for some columns only of the weights that are kept: 24 of 256 at 20,000 keys."""
    query, view = Paged((20_000,), 1, 8, 16, page_size=128, dtype=dtype).view((40,))
    with threads(32):
        assert_scores(query, view, Tiles.of(view.rows, 32), AttentionSpec(0.5), isa)


def test_many_weights_are_kept_past_the_caches(dtype, isa):
    """10,000 keys and 256 columns of 4 bytes: 10 MiB, of 32 that each of two threads has."""
    query, view = Paged((10_000,), 1, 8, 16, page_size=128, dtype=dtype).view((40,))
    with threads(2):
        assert_scores(query, view, Tiles.of(view.rows, 32), AttentionSpec(0.5), isa)


def test_a_peak_far_above_what_came_before_moves_the_reference(dtype, isa):
    paged = Paged((600,), 1, 2, 64, dtype=dtype)
    query, view = paged.view((40,))
    late = torch.tensor(paged.tables[0])[550 // 16]
    paged.pool.keys[0, late, 0, 550 % 16] *= 12
    scores = assert_scores(query, view, Tiles.of(view.rows, 32), AttentionSpec(1.0), isa)
    assert scores[-1, 0, 550] > 10


def test_a_peak_in_decode_leaves_the_blocks_before_it_nothing(dtype, isa):
    """Each block of 128 keys has a reference of its own: all but one become 0 relative to the peak's."""
    paged = Paged((1500,), 1, 1, 64, dtype=dtype)
    query, view = paged.view((1,))
    place = torch.tensor(paged.tables[0])[1300 // 16]
    paged.pool.keys[0, place, 0, 1300 % 16] = 20 * query[0, 0]
    scores = assert_scores(query, view, Tiles.of(view.rows, 1), AttentionSpec(1.0), isa)
    assert scores[0, 0, 1300] > 0.99
    assert scores[0, 0, :1280].max() == 0


def test_queries_may_be_part_of_wider_rows(isa):
    query, view = Paged((90,), 2, 3, 64).view((90,))
    packed = torch.cat([query, torch.full_like(query, float("nan"))], dim=1)[:, : query.shape[1]]
    tiles = Tiles.of(view.rows, 32)
    args = (view, tiles, AttentionSpec(0.1), range(1, 3), False)
    assert torch.equal(anchor_native.scores(packed, *args, isa=isa), anchor_native.scores(query, *args, isa=isa))


@pytest.mark.parametrize("pool", ["group", "all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_choice_is_that_of_top_units(shape, pool, dtype, isa):
    contexts, queries, tile = shape
    query, view = Paged(contexts, 2, 3, 64, dtype=dtype).view(queries)
    tiles, spec = Tiles.of(view.rows, tile), AttentionSpec(0.25)
    first = torch.tensor([2 * (row % 3) for row in range(len(tiles))], dtype=torch.int32)
    end = (tiles.position + tiles.query_count - 3).clamp(min=0)
    budgets = [(0, 1, 40, 5000)[row % 4] for row in range(len(tiles))]
    width = max(
        min(budget, position + count) for budget, (*_, count, position) in zip(budgets, tiles.host, strict=True)
    )
    width = max(width, 1)
    got = anchor_native.topk(query, view, tiles, spec, (first, end), budgets, width, pool == "all", isa=isa)
    scores = anchor_native.scores(query, view, tiles, spec, range(len(tiles)), pool == "all", isa=isa)
    indices, counts = top_units(scores, (first, end), torch.tensor(budgets), most=max(budgets))
    assert torch.equal(got[1], counts)
    padded = torch.full_like(got[0], -1)
    padded[..., : indices.shape[2]] = indices[..., :width]
    assert torch.equal(got[0], padded)


def test_of_equal_scores_the_earliest_is_chosen(isa):
    """Every key twice, half of the context apart: with room for an odd number, the later twin stays behind."""
    paged = Paged((400,), 1, 2, 16)
    pages = torch.tensor(paged.tables[0])
    keys = paged.pool.keys[0]
    rows = keys[pages, 0].flatten(0, 1)
    rows[200:] = rows[:200]
    keys[pages, 0] = rows.view(-1, 16, 16)
    query, view = paged.view((1,))
    tiles = Tiles.of(view.rows, 1)
    everything = torch.tensor([0], dtype=torch.int32), torch.tensor([400], dtype=torch.int32)
    indices, _ = anchor_native.topk(query, view, tiles, AttentionSpec(1.0), everything, [21], 21, False, isa=isa)
    chosen = set(indices[0, 0].tolist())
    alone = [key for key in chosen if (key + 200) % 400 not in chosen]
    assert len(alone) == 1
    assert alone[0] < 200


@pytest.mark.parametrize(("first", "end"), [(0, 400), (3, 397), (9, 250)])
@pytest.mark.parametrize("budget", [2, 21, 130])
def test_where_most_scores_are_nothing_the_earliest_are_chosen(budget, first, end, isa):
    """Of 400 keys four have all the attention: the rest has exactly 0."""
    paged = Paged((400,), 1, 1, 16)
    query, view = paged.view((1,))
    pages = torch.tensor(paged.tables[0])
    paged.pool.keys[0, pages, 0] = -40 * query[0, 0]
    loud = [2, 11, 12, 249]
    for key in loud:
        paged.pool.keys[0, pages[key // 16], 0, key % 16] = 40 * query[0, 0]
    bounds = torch.tensor([first], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
    tiles, spec = Tiles.of(view.rows, 1), AttentionSpec(1.0)
    indices, _ = anchor_native.topk(query, view, tiles, spec, bounds, [budget], budget, False, isa=isa)
    heard = [key for key in loud if first <= key < end][:budget]
    quiet = [key for key in range(first, end) if key not in loud][: budget - len(heard)]
    assert indices[0, 0].tolist() == sorted([*heard, *quiet])


@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prompt"])
def test_where_no_score_is_a_number_the_earliest_are_chosen(queries, isa):
    paged = Paged((300,), 1, 2, 64)
    query, view = paged.view((queries,))
    place = torch.tensor(paged.tables[0])[5 // 16]
    paged.pool.keys[0, place, 0, 5] = float("nan")
    tiles = Tiles.of(view.rows, 32 if queries > 1 else 1)
    bounds = torch.full_like(tiles.position, 3), torch.full_like(tiles.position, 250)
    indices, counts = anchor_native.topk(
        query, view, tiles, AttentionSpec(0.2), bounds, [7] * len(tiles), 7, False, isa=isa
    )
    assert counts.tolist() == [[7]] * len(tiles)
    assert indices.tolist() == [[list(range(3, 10))]] * len(tiles)


def test_it_is_what_a_cpu_uses(monkeypatch):
    query, view = Paged((90,), 2, 3, 64).view((90,))
    tiles, used = Tiles.of(view.rows, 32), []
    plain = anchor_native.topk
    monkeypatch.setattr(anchor_native, "topk", lambda *args, **kw: used.append(1) or plain(*args, **kw))
    bounds = torch.zeros_like(tiles.position), tiles.position
    got = pooled_topk(query, view, tiles, AttentionSpec(0.1), bounds, [9, 9, 9])
    want = pooled_topk(query, view, tiles, AttentionSpec(0.1), bounds, [9, 9, 9], backend="reference")
    assert used
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.indices, want.indices)
