"""MoBA against its definition, written here as a dense mask, and the properties that follow from it."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import budget, ops, registry
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.ops import block_gate_native, block_gate_torch, native
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, Role, StepGroup, StepState
from foveate.sparse_attn.selection import Tiles

from .test_ops import make_query, make_view

PAGE, DIM, BLOCK = 16, 16, 32
SPEC = AttentionSpec(DIM**-0.5)
LAYER = LayerCall(0, SPEC)
CPU = torch.device("cpu")


def make(**options):
    return registry.build("moba", **({"block_tokens": BLOCK, "dense_last_layers": 0} | options))


class World:
    """Sequences in pages, written in spans, read under one scheme."""

    def __init__(self, scheme, lengths, *, heads=2, kv_heads=1, page=PAGE, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.scheme, self.lengths, self.page = scheme, lengths, page
        self.q, self.k, self.v = (
            [torch.randn(length, count, DIM, generator=generator).to(dtype) for length in lengths]
            for count in (heads, kv_heads, kv_heads)
        )
        needed = [-(-length // page) for length in lengths]
        geometry = CacheGeometry(1, kv_heads, DIM, page, sum(needed) + 2, dtype)
        self.pool = PagePool(geometry, scheme.page_stats(geometry))
        self.pool.keys.fill_(float("nan"))
        self.pool.values.fill_(float("nan"))
        order = torch.randperm(geometry.num_pages, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]

    def rows(self, spans):
        return Rows.build(
            self.tables[: len(spans)], [stop for _, stop in spans], [stop - start for start, stop in spans], CPU
        )

    def packed(self, parts, spans):
        return torch.cat([part[start:stop] for part, (start, stop) in zip(parts, spans, strict=False)])

    def write(self, spans):
        slots = [
            table[i // self.page] * self.page + i % self.page
            for table, span in zip(self.tables, spans, strict=False)
            for i in range(*span)
        ]
        ops.write_kv(self.packed(self.k, spans), self.packed(self.v, spans), self.pool.layer(0), torch.tensor(slots))

    def select(self, spans, phase=Phase.PREFILL):
        rows = self.rows(spans)
        select = self.scheme.select_prefill if phase is Phase.PREFILL else self.scheme.select_decode
        view = PagedView(self.pool.layer(0), rows)
        plan = budget.keep(select(self.packed(self.q, spans), view, Tiles.of(rows, 1), LAYER), self.scheme, phase)
        plan.validate(rows)
        return plan

    def attend(self, spans, phase=Phase.PREFILL):
        group = StepGroup(self.scheme.for_phase(phase), phase, 0, self.rows(spans), tuple(range(len(spans))))
        keys_read = torch.zeros(len(spans), 2, dtype=torch.float64)
        step = StepState(self.pool, torch.zeros(0), torch.zeros(0), [group], None, keys_read)
        return attend(self.packed(self.q, spans), LAYER, step), keys_read

    def whole(self):
        spans = [(0, length) for length in self.lengths]
        self.write(spans)
        return self.attend(spans)[0].split(self.lengths)


def oracle_mask(q, k, block, top_k):
    """Bool ``[H, N, N]`` by the definition: MoBA, section 2.2, and equal gates to the later block."""
    length, heads, _ = q.shape
    group = heads // k.shape[1]
    allow = torch.zeros(heads, length, length, dtype=torch.bool)
    for head, query in itertools.product(range(heads), range(length)):
        own = query // block
        gates = []
        for j in range(own):
            mean = k[j * block : (j + 1) * block, head // group].float().mean(0)
            gates.append((float(q[query, head].float() @ mean), j))
        for j in [own] + [j for _, j in sorted(gates, reverse=True)[: top_k - 1]]:
            allow[head, query, j * block : (j + 1) * block] = True
    return allow & torch.ones(length, length, dtype=torch.bool).tril()


def oracle(q, k, v, block, top_k, scale=DIM**-0.5):
    group = q.shape[1] // k.shape[1]
    k, v = (part.float().repeat_interleave(group, 1) for part in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    logits = logits.masked_fill(~oracle_mask(q, k, block, top_k), float("-inf"))
    return torch.einsum("hqk,khd->qhd", torch.softmax(logits, -1), v)


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.float(), want.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
@pytest.mark.parametrize("top_k", [1, 2, 3, 1000])
@pytest.mark.parametrize("group", [1, 4], ids="group{}".format)
def test_is_the_definition(length, top_k, group):
    world = World(make(top_k=top_k), [length], heads=2 * group, kv_heads=2)
    close(world.whole()[0], oracle(world.q[0], world.k[0], world.v[0], BLOCK, top_k))


@pytest.mark.parametrize("page", [16, 32, 64, 128], ids="page{}".format)
@pytest.mark.parametrize("block", [1, 8, 16, 64], ids="block{}".format)
def test_blocks_of_many_pages_and_pages_of_many_blocks(page, block):
    world = World(make(block_tokens=block, top_k=3), [150], page=page)
    assert bool(world.pool.stats) == (block >= page)
    close(world.whole()[0], oracle(world.q[0], world.k[0], world.v[0], block, 3))


def test_bfloat16():
    world = World(make(top_k=3), [211], heads=8, kv_heads=2, dtype=torch.bfloat16)
    got, want = world.whole()[0].float(), oracle(world.q[0], world.k[0], world.v[0], BLOCK, 3)
    assert (got - want).abs().max() < 2e-2
    assert (got - want).abs().mean() < 4e-4 + 2**-9 * want.abs().mean()  # the output itself is rounded


def test_enough_blocks_are_dense_and_one_block_is_block_diagonal():
    length = 4 * BLOCK + 3
    for top_k, block in ((5, length + 1), (1, BLOCK)):
        world = World(make(top_k=top_k), [length])
        close(world.whole()[0], oracle(world.q[0], world.k[0], world.v[0], block, 1))


@pytest.mark.parametrize("query", [3 * BLOCK + 7, 4 * BLOCK - 1, 4 * BLOCK])
def test_keys_behind_a_query_change_neither_its_output_nor_its_choice(query):
    worlds = [World(make(top_k=3), [150], heads=4) for _ in range(2)]
    worlds[1].k[0][query + 1 :] = 50.0
    worlds[1].v[0][query + 1 :] = -50.0
    outs = [world.whole()[0] for world in worlds]
    picks = [world.select([(0, 150)]).indices for world in worlds]
    assert torch.equal(outs[0][: query + 1], outs[1][: query + 1])
    assert torch.equal(picks[0][: query + 1], picks[1][: query + 1])
    assert not torch.equal(outs[0], outs[1])


@given(block=st.integers(0, 3), scale=st.floats(0.01, 1000.0), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_a_planted_block_is_chosen_and_the_length_of_a_query_changes_no_choice(block, scale, seed):
    world = World(make(top_k=2), [5 * BLOCK], seed=seed)
    world.k[0][block * BLOCK : (block + 1) * BLOCK] = 3 * world.q[0][-1, :1]
    world.write([(0, 5 * BLOCK)])
    last = [(5 * BLOCK - 1, 5 * BLOCK)]
    plan = world.select(last)
    assert plan.indices[0, 0].tolist() == [block, 4]
    world.q[0] *= 2.0 ** round(torch.tensor(scale).log2().item())  # a power of two, so that nothing is rounded
    assert torch.equal(world.select(last).indices, plan.indices)


def test_opposite_heads_of_a_group_choose_different_blocks():
    world = World(make(top_k=2), [4 * BLOCK])
    world.q[0][:, 1] = -world.q[0][:, 0]
    for sign, block in ((1, 0), (-1, 2)):
        world.k[0][block * BLOCK : (block + 1) * BLOCK, 0] = sign * world.q[0][-1, 0]
    world.write([(0, 4 * BLOCK)])
    assert world.select([(4 * BLOCK - 1, 4 * BLOCK)]).indices[0].tolist() == [[0, 3], [2, 3]]


@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "default"])
def test_of_equal_gates_the_later_block_is_chosen(backend):
    world = World(make(), [6 * BLOCK])
    # Whole numbers: means and products are exact, so that equal gates are equal in whatever order they are summed.
    world.q[0], world.k[0] = world.q[0].round(), world.k[0].round()
    world.k[0][: 5 * BLOCK] = world.k[0][:1]
    world.write([(0, 6 * BLOCK)])
    rows = world.rows([(0, 6 * BLOCK)])
    own = torch.arange(6 * BLOCK, dtype=torch.int32) // BLOCK
    view = PagedView(world.pool.layer(0), rows)
    indices, counts = ops.gate_blocks(world.q[0], view, BLOCK, 3, (torch.zeros_like(own), own), backend=backend)
    want = [[max(j, -1) for j in range(c - 2, c + 1)] for c in own.tolist()]
    assert indices[:, 0].tolist() == [sorted(row, key=lambda j: (j < 0, j)) for row in want]
    assert counts[:, 1].tolist() == [min(c + 1, 3) for c in own.tolist()]


@pytest.fixture(params=["torch", *getattr(native.library(), "isas", ())])
def gate(request):
    """The gate in torch, and compiled for each instruction set that this machine has."""
    if request.param == "torch":
        return lambda *args, pooled: block_gate_torch.gate_blocks(*args, pooled)
    return lambda *args, pooled: block_gate_native.gate_blocks(*args, pooled, isa=request.param)


@given(
    lengths=st.lists(st.integers(1, 250), min_size=1, max_size=3),
    top_k=st.integers(1, 20),
    block=st.sampled_from([8, 16, 32]),
    pooled=st.booleans(),
    sinks=st.integers(0, 40),
    window=st.integers(0, 60),
    few_values=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gate_equals_reference(gate, lengths, top_k, block, pooled, sinks, window, few_values, dtype, seed):
    scheme = make(block_tokens=block, top_k=top_k, sink_tokens=sinks, window_tokens=window)
    world = World(scheme, lengths, heads=4, kv_heads=2, dtype=dtype, seed=seed)
    # Sums of few binary digits: no gate is rounded, so the order of summation cannot decide. Of whole numbers from
    # -1 to 1 many are equal.
    digits, most = (1, 1) if few_values else (8, 4)
    world.q, world.k = (
        [(part * digits).round().div(digits).clamp(-most, most) for part in parts] for parts in (world.q, world.k)
    )
    spans = [(length // 3, length) for length in lengths]
    world.write([(0, length) for length in lengths])
    rows = world.rows(spans)
    view, tiles = PagedView(world.pool.layer(0), rows), Tiles.of(rows, 1)
    arguments = world.packed(world.q, spans), view, block, top_k
    candidates = budget.free_units(tiles, scheme, block, Phase.PREFILL)
    got = gate(*arguments, candidates, pooled=pooled)
    want = ops.gate_blocks(*arguments, candidates, pooled=pooled, backend="reference")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("shape", [(1, 1, 80, 9), (2, 7, 128, 40), (1, 3, 256, 64), (3, 1, 48, 2)], ids=str)
def test_gate_of_many_shapes(gate, shape):
    """KV heads, group, head dim and blocks per query, over more queries than one pass of the kernels takes."""
    kv_heads, group, dim, top_k = shape
    view = make_view((1500, 20), (170, 1), kv_heads=kv_heads, dim=dim)
    query = make_query(view, kv_heads * group)
    own = torch.cat([torch.arange(1330, 1500), torch.tensor([19])]).int() // 16
    arguments = query, view, 16, top_k, ((own > 50).int(), own - (own > 90).int())
    got = gate(*arguments, pooled=False)
    want = ops.gate_blocks(*arguments, pooled=False, backend="reference")
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_gates_that_are_not_finite_stay_in_their_row(gate):
    view = make_view((600,), (40,), kv_heads=1, dim=16)
    view.pages.keys.copy_(torch.randn(view.pages.keys.shape, generator=torch.Generator().manual_seed(0)))
    query = make_query(view, 2)
    own = torch.arange(560, 600).int() // 16
    arguments = view, 16, 3, (torch.zeros_like(own), own)
    want = ops.gate_blocks(query, *arguments, pooled=False, backend="reference")
    query[7, 0, :2] = float("inf")  # its gates are inf, -inf and NaN
    got = gate(query, *arguments, pooled=False)
    others = torch.ones(40, 2, dtype=torch.bool)
    others[7, 0] = False
    assert torch.equal(got[0][others], want[0][others])
    assert torch.equal(got[1][others], want[1][others])


def test_gates_shared_by_a_group_are_the_sum_of_its_heads():
    world = World(make(top_k=2, share_heads=True), [5 * BLOCK], heads=6, kv_heads=2)
    world.write([(0, 5 * BLOCK)])
    plan = world.select([(0, 5 * BLOCK)])
    assert plan.indices.shape[1] == 2
    means = world.k[0].view(5, BLOCK, 2, DIM).mean(1)
    gates = torch.einsum("kgd,ukd->kgu", world.q[0][-1].view(2, 3, DIM), means).sum(1)[:, :4]
    assert plan.indices[-1, :, 0].tolist() == gates.argmax(1).tolist()


@pytest.mark.parametrize("cuts", [(1,), (31, 33), (32, 64), (5, 6, 7, 8, 149)], ids=str)
def test_chunks_batches_and_sparse_decode_agree(cuts):
    """One prompt whole, in chunks beside a prompt of one token, and its last token as a decode step."""
    scheme = make(top_k=2, sparse_decode=True)
    alone, world = World(scheme, [150]), World(scheme, [150, 1])
    for mine, other in zip((world.q, world.k, world.v), (alone.q, alone.k, alone.v), strict=True):
        mine[0] = other[0]
    want = alone.whole()[0]
    for start, stop in itertools.pairwise([0, *cuts, 150]):
        spans = [(start, stop), (0, 1)] if start == 0 else [(start, stop)]
        world.write(spans)
        close(world.attend(spans)[0][: stop - start], want[start:stop])
    close(world.attend([(149, 150)], Phase.DECODE)[0], want[149:])


def test_means_follow_pages_that_are_copied_freed_and_filled_again():
    world = World(make(top_k=2), [3 * BLOCK])
    world.write([(0, BLOCK)])
    for at in range(BLOCK, 2 * BLOCK + 3):
        world.write([(at, at + 1)])
    table, spare = world.tables[0], next(p for p in range(world.pool.geometry.num_pages) if p not in world.tables[0])
    world.pool.copy_page(table[1], spare)  # a fork of a shared page
    world.tables = [[table[0], spare, *table[2:]]]
    page = torch.full((PAGE, 1, DIM), 1e4)  # another owner of the old page
    ops.write_kv(page, page, world.pool.layer(0), torch.arange(PAGE) + table[1] * PAGE)
    world.write([(2 * BLOCK + 3, 3 * BLOCK)])
    spans = [(2 * BLOCK, 3 * BLOCK)]
    close(world.attend(spans)[0], oracle(world.q[0], world.k[0], world.v[0], BLOCK, 2)[2 * BLOCK :])


def test_generated_tokens_read_everything_unless_asked():
    for sparse, read in ((False, 150), (True, 2 * BLOCK - BLOCK + 150 % BLOCK)):
        world = World(make(top_k=2, sparse_decode=sparse), [150])
        world.write([(0, 150)])
        assert world.attend([(149, 150)], Phase.DECODE)[1].tolist() == [[2 * read, 2 * 150]]


def test_counts_its_reads():
    world = World(make(top_k=2), [150])
    world.write([(0, 150)])
    want = sum(min(t, BLOCK * min(t // BLOCK, 1) + t % BLOCK) for t in range(150)) + 150
    assert world.attend([(0, 150)])[1].tolist() == [[2 * want, 150 * 151]]


def test_first_block_comes_beside_the_others():
    world = World(make(top_k=2, keep_first_block=True), [5 * BLOCK])
    world.k[0][:BLOCK] = 3 * world.q[0][-1, :1]  # liked best, but read anyway
    world.k[0][BLOCK : 2 * BLOCK] = 2 * world.q[0][-1, :1]
    world.write([(0, 5 * BLOCK)])
    assert world.select([(5 * BLOCK - 1, 5 * BLOCK)]).indices[0, 0].tolist() == [0, 1, 4]


def test_budget_is_another_way_of_saying_top_k():
    assert make(budget_tokens=3 * BLOCK + 1).blocks_read == 4
    assert make(budget_tokens=3 * BLOCK, top_k=9).blocks_read == 3
    assert make(top_k=9).blocks_read == 9


@pytest.mark.parametrize(("layers", "selecting"), [(32, 29), (4, 1), (2, 1), (1, 1)])
def test_last_three_layers_are_dense(layers, selecting):
    roles = [role.role for role in registry.build("moba").roles(layers)]
    assert roles == [Role.SELECT] * selecting + [Role.DENSE] * (layers - selecting)


@pytest.mark.parametrize(
    "options",
    [
        {"block_tokens": 48},
        {"block_tokens": 0},
        {"top_k": 0},
        {"top_k": True},
        {"top_k": 2.5},
        {"dense_last_layers": -1},
        {"sparse_decode": 1},
        {"keep_first_block": "no"},
        {"share_heads": None},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_by_name(options):
    with pytest.raises(SchemeConfigError, match=next(iter(options))):
        make(**options)
