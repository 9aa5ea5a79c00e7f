"""XAttention by its definition: antidiagonal scores, and which blocks each tile reads."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.sparse_attn import budget, ops, registry
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.ops import antidiagonal_torch
from foveate.sparse_attn.protocol import LayerCall, Phase
from foveate.sparse_attn.selection import Tiles

from .paged import Paged
from .test_schemes import SPEC, World, close

BARE = {"sink_tokens": 0, "window_tokens": 0}


def shares_by_definition(query, keys, first, block, stride, scale):
    """``[blocks]`` shares of one tile and head: queries ``[n, D]`` from position ``first`` on, all keys ``[m, D]``.

    Written pair by pair: a query and a key meet on an antidiagonal of their square of ``stride`` x ``stride``.
    """
    begin, size = first // block * block, block // stride
    total = [0.0] * -(-len(keys) // block)
    for run in range(begin // stride, begin // stride + size):
        rows = [i for i in range(run * stride, (run + 1) * stride) if first <= i < first + len(query)]
        if not rows:
            continue
        logits = []
        for column in range(run + 1):
            pairs = [(i, column * stride + stride - 1 - (i - run * stride)) for i in rows]
            met = [float(query[i - first] @ keys[j]) for i, j in pairs if j < len(keys)]
            logits.append(sum(met) * scale / stride)
        peak = max(logits)
        weights = [math.exp(logit - peak) for logit in logits]
        for column, weight in enumerate(weights):
            total[column // size] += weight / sum(weights)
    return total


def chosen_by_definition(shares, tau, first, last):
    """Blocks that a tile chooses, best first; those below ``first`` and from ``last`` on are read anyway, and count."""
    free = list(range(first, last))
    held = sum(share for block, share in enumerate(shares) if block not in free)
    taken = []
    for block in sorted(free, key=lambda b: (-shares[b], b)):
        if held >= tau * sum(shares):
            break
        taken.append(block)
        held += shares[block]
    return sorted(taken)


SHAPES = {
    "1": ((1,), (1,), 1, 16, 4),
    "63-cut-inside-a-run": ((63,), (38,), 1, 16, 8),
    "111-g3": ((111,), (111,), 3, 32, 8),
    "three": ((150, 17, 64), (60, 17, 1), 2, 16, 4),
    "stride16-block64": ((200,), (130,), 2, 64, 16),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_scores_are_those_of_the_paper(name, backend):
    contexts, queries, group, block, stride = SHAPES[name]
    world = Paged(contexts, group=group, dtype=torch.float64)
    query, view = world.view(queries)
    tiles = Tiles.of(view.rows, block)
    got = ops.antidiagonal_scores(query, view, tiles, stride, 0.7, backend=backend)
    assert got.shape == (len(tiles), 2 * group, -(-max(contexts) // block))
    for row, (sequence, start, count, position) in enumerate(tiles.host):
        for head in range(2 * group):
            asked, keys = query[start : start + count, head], world.keys[sequence][:, head // group]
            want = shares_by_definition(asked, keys, position, block, stride, 0.7)
            want += [0.0] * (got.shape[2] - len(want))
            torch.testing.assert_close(got[row, head], torch.tensor(want), atol=2e-5, rtol=1e-5)


def test_one_square_by_hand():
    """S = 2: e = q1 . k0 + q0 . k1 of the run's own square is 5, that of the square before is 3."""
    world = Paged([32], kv_heads=1, group=1, dim=1)
    world.keys[0][:, 0, 0] = 0.0
    world.keys[0][:4, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 2.0])
    slots = torch.tensor([world.tables[0][i // 16] * 16 + i % 16 for i in range(32)])
    ops.write_kv(world.keys[0], world.values[0], world.pool.layer(0), slots)
    _, view = world.view([30])  # positions 2, 3 are the second run
    query = torch.zeros(30, 1, 1)
    query[:2, 0, 0] = torch.tensor([1.0, 1.0])
    scores = ops.antidiagonal_scores(query, view, Tiles.of(view.rows, 2), 2, 1.0)
    # e[1, 0] = q3 k0 + q2 k1 = 3, e[1, 1] = q3 k2 + q2 k3 = 5; softmax of 3 / 2 and 5 / 2
    torch.testing.assert_close(scores[0, 0, :2], torch.softmax(torch.tensor([1.5, 2.5]), 0))
    assert not scores[0, 0, 2:].any()


def test_scores_of_a_tile_add_up_to_its_runs():
    query, view = Paged([150, 40]).view([150, 13])
    tiles = Tiles.of(view.rows, 32)
    runs = [(p + n - 1) // 8 - p // 8 + 1 for _, _, n, p in tiles.host]
    got = ops.antidiagonal_scores(query, view, tiles, 8, 1.0).sum(2)
    close(got, torch.tensor(runs, dtype=torch.float32)[:, None].expand_as(got))


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("group", ["none", "sum"])
@pytest.mark.parametrize(
    "kept", [{}, {"sink_tokens": 17, "window_tokens": 20}], ids=["nothing-kept", "sinks-and-window"]
)
def test_blocks_follow_until_their_share_is_reached(tau, group, kept):
    options = BARE | kept
    scheme = registry.build("xattention", tau=tau, group=group, block_tokens=16, stride_tokens=4, **options)
    world = Paged([300, 90], group=3)
    query, view = world.view([300, 41])
    tiles = Tiles.of(view.rows, 16)
    plan = scheme.for_phase(Phase.PREFILL).select_prefill(3 * query, view, tiles, LayerCall(0, SPEC))
    plan.validate(view.rows)
    got = budget.keep(plan, scheme, Phase.PREFILL).to_mask(view.rows)[..., ::16]
    shares = ops.antidiagonal_scores(3 * query, view, tiles, 4, SPEC.scale, backend="reference")
    if group == "sum":
        shares = shares.view(len(tiles), 2, 3, -1).sum(2)
    first, left = max(1, -(-options["sink_tokens"] // 16)), []
    for row, (_, _, _, position) in enumerate(tiles.host):
        own = position // 16
        last = max(position // 16 * 16 - options["window_tokens"], 0) // 16
        for head in range(shares.shape[1]):
            parts = shares[row, head].tolist()
            want = {*range(min(first, own + 1)), *range(last, own + 1)}
            want |= set(chosen_by_definition(parts, tau, first, last))
            assert got[row, head].nonzero().flatten().tolist() == sorted(want), f"tile {row}, head {head}"
            left.append(own + 1 - len(want))
    assert max(left) == 0 if tau == 1.0 else max(left) > (3 if tau < 0.9 else 0)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_a_threshold_is_met_and_just_so(seed, tau):
    """What is read holds ``tau`` of the tile's attention, and without the last block taken it would not."""
    scheme = registry.build("xattention", tau=tau, block_tokens=16, stride_tokens=4, **BARE)
    query, view = Paged([160], seed=seed).view([16])
    tiles = Tiles.of(view.rows, 16)
    plan = scheme.select_prefill(4 * query, view, tiles, LayerCall(0, SPEC))
    mask = budget.keep(plan, scheme, Phase.PREFILL).to_mask(view.rows)[0, :, ::16]
    shares = ops.antidiagonal_scores(4 * query, view, tiles, 4, SPEC.scale)[0]
    held = (shares * mask).sum(1)
    assert bool((held >= tau * shares.sum(1) - 1e-4).all())
    free = mask.clone()
    free[:, [0, 9]] = False
    weakest = torch.where(free, shares, float("inf")).amin(1)
    over = held - weakest < tau * shares.sum(1) + 1e-4
    assert bool((over | ~free.any(1)).all())


@pytest.mark.parametrize("tokens", [16, 40, 64])
def test_a_budget_takes_the_best_blocks(tokens):
    scheme = registry.build("xattention", budget_tokens=tokens, block_tokens=16, stride_tokens=4, tau=0.0, **BARE)
    query, view = Paged([200], group=2).view([200])
    tiles = Tiles.of(view.rows, 16)
    plan = scheme.select_prefill(query, view, tiles, LayerCall(0, SPEC))
    plan.validate(view.rows)
    got = budget.keep(plan, scheme, Phase.PREFILL).to_mask(view.rows)[..., ::16]
    shares = ops.antidiagonal_scores(query, view, tiles, 4, SPEC.scale)
    for own, head in itertools.product(range(len(tiles)), range(4)):
        best = sorted(range(1, own), key=lambda b: (-float(shares[own, head, b]), b))[: tokens // 16]
        assert got[own, head].nonzero().flatten().tolist() == sorted({0, own, *best})


def test_a_floor_under_the_threshold():
    query, view = Paged([200]).view([20])
    tiles = Tiles.of(view.rows, 16)
    counts = {}
    for floor in (0, 33):
        scheme = registry.build(
            "xattention", tau=0.0, min_budget_tokens=floor, block_tokens=16, stride_tokens=4, **BARE
        )
        counts[floor] = scheme.select_prefill(query, view, tiles, LayerCall(0, SPEC)).counts.unique().tolist()
    assert counts == {0: [1], 33: [4]}  # the first block, and three more


@pytest.mark.parametrize("options", [{"tau": 0.6}, {"budget_tokens": 32}, {"tau": 0.6, "group": "sum"}], ids=str)
def test_chunks_cut_between_tiles_choose_as_the_whole_prompt_does(options):
    scheme = registry.build("xattention", block_tokens=32, stride_tokens=8, **BARE, **options)
    world = Paged([203], group=2)
    query, view = world.view([203])
    whole = scheme.select_prefill(query, view, Tiles.of(view.rows, 32), LayerCall(0, SPEC)).to_mask(view.rows)
    for cuts in [(32,), (64, 96), (32, 64, 96, 128, 160, 192)]:
        row = 0
        for start, stop in itertools.pairwise([0, *cuts, 203]):
            part = Paged([stop], group=2)
            part.pool, part.tables = world.pool, [world.tables[0][: -(-stop // 16)]]
            _, view = part.view([stop - start])
            tiles = Tiles.of(view.rows, 32)
            got = scheme.select_prefill(query[start:stop], view, tiles, LayerCall(0, SPEC)).to_mask(view.rows)
            assert torch.equal(got, whole[row : row + len(tiles), :, :stop])
            row += len(tiles)


def test_grouped_heads_score_as_repeated_keys_do():
    grouped = Paged([130], kv_heads=2, group=3)
    query, view = grouped.view([130])
    repeated = Paged([130], kv_heads=6, group=1)
    repeated.query = grouped.query
    repeated.pool.keys[0] = grouped.pool.keys[0].repeat_interleave(3, 1)
    repeated.tables = grouped.tables
    _, wide = repeated.view([130])
    tiles = Tiles.of(view.rows, 32)
    want = ops.antidiagonal_scores(query, wide, tiles, 8, 1.0)
    close(ops.antidiagonal_scores(query, view, tiles, 8, 1.0), want)


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor made under it had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_memory_is_bounded_by_slabs(monkeypatch):
    """8,192 tokens: all scores of one KV head at stride 8 would be 2 M; the largest tensor is a slab or the queries."""
    query, view = Paged([8192], kv_heads=1, group=2, dim=16).view([8192])
    tiles = Tiles.of(view.rows, 128)
    want = ops.antidiagonal_scores(query, view, tiles, 8, 0.25)
    monkeypatch.setattr(antidiagonal_torch, "_SLAB_SCORES", 1 << 17)
    with Largest() as largest:
        got = ops.antidiagonal_scores(query, view, tiles, 8, 0.25)
    assert largest.elements == query.numel() == 1 << 18
    close(got, want)


def test_decode_is_dense():
    scheme = registry.build("xattention", tau=0.0, block_tokens=16, stride_tokens=4, **BARE)
    world = World([150], scheme)
    _, step = world.run([(0, 149)])
    assert step.keys_read[0, 0] < 0.5 * step.keys_read[0, 1]
    _, step = world.run([(149, 150)], phase=Phase.DECODE)
    assert step.keys_read[0, 0] == step.keys_read[0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_tokens": 48}, "block_tokens"),
        ({"block_tokens": 8}, "block_tokens"),
        ({"block_tokens": 256}, "block_tokens"),
        ({"stride_tokens": 3}, "stride_tokens"),
        ({"stride_tokens": 32}, "stride_tokens"),
        ({"tau": 1.1}, "tau"),
        ({"tau": "high"}, "tau"),
        ({"tau": True}, "tau"),
        ({"group": "max"}, "none, sum"),
        ({"budget_tokens": 1.0}, "budget_tokens"),
        ({"min_budget_tokens": -1}, "min_budget_tokens"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(options, said):
    with pytest.raises(SchemeConfigError, match=said):
        registry.build("xattention", **options)


def test_shapes_that_do_not_fit_are_refused():
    query, view = Paged([40]).view([3])
    with pytest.raises(ValueError, match="do not fit"):
        ops.antidiagonal_scores(query[:2], view, Tiles.of(view.rows, 16), 4, 1.0)
    with pytest.raises(ValueError, match="stride 32"):
        ops.antidiagonal_scores(query, view, Tiles.of(view.rows, 64), 32, 1.0)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (15, 1), (16, 1), (31, 1), (32, 2)])
def test_a_budget_below_a_block_is_one_block(tokens, blocks):
    options = {"block_tokens": 16, "stride_tokens": 4, "sink_tokens": 0, "window_tokens": 0, "dense_tail_tokens": 0}
    scheme = registry.build("xattention", budget_tokens=tokens, **options)
    query, view = Paged([200]).view([200])
    plan = scheme.select_prefill(query, view, Tiles.of(view.rows, 16), LayerCall(0, SPEC))
    assert plan.counts[5:].unique().tolist() == [1 + blocks], "the first one, and what the budget pays"
