"""``thresholded``: the definition's numbers, the torch path against the reference, and what no threshold may change."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import VALUE_SUM
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import threshold_torch
from foveate.sparse_attn.ops.value_mean import causal_value_mean
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band, ScoreThreshold

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")
SHAPES = {
    "one-token": ((1,), (1,)),
    "prompts": ((63, 111), (63, 111)),
    "chunks": ((130, 17, 400), (30, 16, 111)),
    "decode": ((1000, 3, 64, 200), (1, 1, 1, 1)),
}
SPECS = {
    "causal": AttentionSpec(0.5),
    "softcap": AttentionSpec(0.5, softcap=2.0),
    "window": AttentionSpec(0.5, band=Band(0, 37)),
    "ring": AttentionSpec(0.5, band=Band(5, 60), softcap=3.0),
    "behind": AttentionSpec(0.5, band=Band(20, None)),
    "sinks": AttentionSpec(0.5, sinks=torch.tensor([0.5, -2.0, 100.0, 1.0, 0.0, 3.0])),
}
# (dropped_sum, dropped_scale, value_mean)
COMPENSATIONS = [
    ("none", 1.0, False),
    ("exact", 1.0, True),
    ("exact", 0.5, False),
    ("bound", 0.3, True),
    ("given", 1.0, True),
]


def make_view(contexts, queries, *, kv_heads=2, dim=16, page_size=16, dtype=torch.float32, tail=0, values=None):
    """A pool of NaN with random rows where sequences have tokens, ``tail`` tokens behind each one's last query."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-(context + tail) // page_size) for context in contexts]
    pool = PagePool(CacheGeometry(1, kv_heads, dim, page_size, sum(needed) + 3, dtype), (VALUE_SUM,))
    pool.keys.fill_(NAN)
    pool.values.fill_(NAN)
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for pages, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([pages[i // page_size] * page_size + i % page_size for i in range(context + tail)])
        rows = torch.randn(2, context + tail, kv_heads, dim, generator=generator).to(dtype)
        if values is not None:
            rows[1] = values
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots)
    return PagedView(pool.layer(0), Rows.build(tables, list(contexts), list(queries), CPU))


def make_query(view, heads):
    shape = (view.rows.num_queries, heads, view.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(view.pages.keys.dtype)


def make_plan(query, compensation=("exact", 1.0, True), **rest):
    """Thresholds that keep about a tenth; every seventh query reads all, every eleventh nothing."""
    dropped_sum, scale, value_mean = compensation
    theta = 2.0 + 0.5 * torch.rand(query.shape[:2], generator=torch.Generator().manual_seed(2))
    theta[::7] = -INF
    theta[5::11] = 1e4 if dropped_sum != "bound" else 5.0
    expected = 3.0 * torch.rand(query.shape[:2]) if dropped_sum == "given" else None
    return ScoreThreshold(theta, dropped_sum, scale, expected, value_mean, **rest)


def assert_same(got, want, ratio):
    for name, a, b in zip(("out", "lse"), got, want, strict=False):
        assert torch.equal(torch.isinf(a), torch.isinf(b)), f"{name}: other rows read nothing"
        a, b = (part.double().nan_to_num(nan=float("nan"), neginf=0) for part in (a, b))  # a NaN fails
        error = (a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt().clamp(min=1e-6)
        assert error < ratio, f"{name}: RMS error {error:.2e} of the reference"
    assert got[2].dtype == torch.int32
    assert torch.equal(got[2], want[2])


def both(view, query, plan, spec):
    return [ops.thresholded(query, view, plan, spec, backend=backend) for backend in ("torch", "reference")]


@pytest.mark.parametrize("compensation", COMPENSATIONS, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_equals_reference(shape, spec, compensation):
    if spec.band != Band():
        compensation = (*compensation[:2], False)
    view = make_view(*shape)
    query = make_query(view, 6)
    assert_same(*both(view, query, make_plan(query, compensation), spec), 2e-5)


@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("compensation", COMPENSATIONS, ids=str)
def test_a_key_that_is_not_a_number_is_told(queries, compensation):
    """By every query that sees it: it is above no threshold, but it must not be lost."""
    view = make_view((700,), (queries,))
    view.pages.keys[view.rows.host_block_tables[0][690 // view.page_size], :, 690 % view.page_size] = NAN
    query = make_query(view, 6)
    got, want = both(view, query, make_plan(query, (*compensation[:2], False)), AttentionSpec(0.5))
    seen = torch.arange(700 - queries, 700) >= 690
    assert torch.equal(want[0].isnan(), seen[:, None, None].expand_as(want[0]))
    for a, b in zip(got[:2], want[:2], strict=True):
        assert bool(a.isnan()[b.isnan()].all())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rest", [{"sink_tokens": 20}, {"recent_tokens": 1}, {"recent_tokens": 30, "sink_tokens": 3}])
@pytest.mark.parametrize("union", [False, True], ids=["independent", "union"])
def test_what_is_always_read(shape, rest, union):
    for band in (Band(), Band(0, 25), Band(4, None)):
        view = make_view(*shape)
        query = make_query(view, 6)
        plan = make_plan(query, ("exact", 1.0, band == Band()), union=union, **rest)
        assert_same(*both(view, query, plan, AttentionSpec(0.5, band=band)), 2e-5)


def thresholds_in_gaps(view, query, scale):
    """``[T, H]``: the middle of the widest gap between a query's 6th and 40th logit, where rounding decides nothing."""
    rows, start = [], 0
    group = query.shape[1] // view.num_kv_heads
    for sequence, (context, count) in enumerate(
        zip(view.rows.host_context_lens, view.rows.host_query_lens, strict=True)
    ):
        pages = torch.tensor(view.rows.host_block_tables[sequence])
        keys = view.pages.keys[pages].transpose(0, 1).flatten(1, 2)[:, :context].repeat_interleave(group, 0).float()
        logits = torch.einsum("qhd,hkd->qhk", query[start : start + count].float(), keys) * scale
        future = torch.arange(context) > torch.arange(context - count, context)[:, None]
        top = logits.masked_fill(future[:, None], -50.0).sort(-1, descending=True).values[..., 5:40]
        gap = (top[..., :-1] - top[..., 1:]).argmax(-1, keepdim=True)
        rows.append((top.gather(-1, gap) + top.gather(-1, gap + 1))[..., 0] / 2)
        start += count
    return torch.cat(rows)


@pytest.mark.parametrize("heads", [(2, 1), (2, 3), (1, 7), (1, 8)], ids="kv{0[0]}xgroup{0[1]}".format)
@pytest.mark.parametrize("dim", [64, 80, 256], ids="dim{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_head_shapes_and_dtypes(heads, dim, dtype, phase):
    kv_heads, group = heads
    queries = (70, 50) if phase == "prefill" else (1, 1)
    view = make_view((70, 333), queries, kv_heads=kv_heads, dim=dim, dtype=dtype, page_size=64)
    query = make_query(view, kv_heads * group)
    spec = AttentionSpec(2 * dim**-0.5)
    plan = replace(make_plan(query), theta=thresholds_in_gaps(view, query, spec.scale))
    assert_same(*both(view, query, plan, spec), 2e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("group", [3], ids="group{}".format)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("value_mean", [False, True], ids=["plain", "value-mean"])
def test_the_numbers_of_the_definition(phase, value_mean, group):
    """Logits 2, 1, 0, -1, -2, theta 0.5, values and results worked out by hand from the definition."""
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    pool = PagePool(CacheGeometry(1, 1, 2, 16, 1), (VALUE_SUM,))
    keys = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])[:, None] * torch.tensor([1.0, 0.0])
    ops.write_kv(keys[:, None], values[:, None], pool.layer(0), torch.arange(5))
    count = 1 if phase == "decode" else 5
    view = PagedView(pool.layer(0), Rows.build([[0]], [5], [count], CPU))
    query = torch.tensor([1.0, 0.0]).expand(count, group, 2).contiguous()
    theta = torch.full((count, group), 0.5)
    shares = {
        "none": (0.731059, 0.268941),
        "exact": (0.636409, 0.234122),
        "bound": (0.490853, 0.180575),
        "given": (0.636409, 0.234122),
    }
    for (dropped_sum, kept), backend in itertools.product(shares.items(), ("reference", "torch")):
        # exp(x - 2) summed over the logits 0, -1, -2
        given = torch.full_like(theta, 0.135335 + 0.049787 + 0.018316) if dropped_sum == "given" else None
        plan = ScoreThreshold(theta, dropped_sum, expected=given, value_mean=value_mean)
        out, lse, counts = ops.thresholded(query, view, plan, AttentionSpec(1.0), backend=backend)
        want = torch.tensor(kept)
        if value_mean:
            want = want + (1 - sum(kept)) * torch.tensor([0.8, 0.8])
        torch.testing.assert_close(out[-1], want.expand(group, 2), atol=2e-6, rtol=0)
        assert counts[-1].tolist() == [2] * group
        torch.testing.assert_close(lse[-1].exp(), torch.full((group,), 10.107338), atol=2e-5, rtol=0)
    plan = ScoreThreshold(theta, "exact", value_mean=True)
    out = ops.thresholded(query, view, plan, AttentionSpec(1.0))[0][-1, 0]
    torch.testing.assert_close(out, torch.tensor([0.739984, 0.337697]), atol=2e-6, rtol=0)
    dense = ops.thresholded(query, view, replace(plan, theta=theta - INF), AttentionSpec(1.0))[0][-1, 0]
    torch.testing.assert_close(dense, torch.tensor([0.785907, 0.343563]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("compensation", COMPENSATIONS, ids=str)
def test_a_threshold_of_minus_infinity_is_dense_attention(backend, shape, compensation):
    view = make_view(*shape)
    query = make_query(view, 6)
    plan = replace(make_plan(query, compensation), theta=torch.full(query.shape[:2], -INF))
    got = ops.thresholded(query, view, plan, SPECS["sinks"], backend=backend)
    want = ops.prefill(query, view, None, SPECS["sinks"], backend="reference")
    for a, b in zip(got, want, strict=False):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_exact_compensation_gathers_the_dense_probabilities(shape):
    view = make_view(*shape, kv_heads=1)
    query = make_query(view, 3)
    plan = make_plan(query, ("exact", 1.0, False))
    got = ops.thresholded(query, view, plan, SPECS["causal"])[0]
    start = 0
    for sequence, (context, count) in enumerate(zip(*shape, strict=True)):
        pages = torch.tensor(view.rows.host_block_tables[sequence])
        keys, values = (x[pages, 0].flatten(0, 1)[:context] for x in (view.pages.keys, view.pages.values))
        part = slice(start, start + count)
        logits = torch.einsum("qhd,kd->qhk", query[part], keys) * 0.5
        future = torch.arange(context) > torch.arange(context - count, context)[:, None]
        dense = torch.softmax(logits.masked_fill(future[:, None], -INF), -1)
        want = torch.einsum("qhk,kd->qhd", dense * (logits > plan.theta[part, :, None]), values)
        torch.testing.assert_close(got[part], want, atol=2e-5, rtol=1e-4)
        start += count


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("compensation", [row for row in COMPENSATIONS if row[0] != "none"], ids=str)
def test_the_value_mean_keeps_constants(backend, shape, compensation):
    """All values equal: the output is that value, whatever is kept and however the rest is estimated."""
    view = make_view(*shape, values=3.5)
    query = make_query(view, 6)
    plan = replace(make_plan(query, compensation), value_mean=True)
    out, _, kept = ops.thresholded(query, view, plan, SPECS["causal"], backend=backend)
    if compensation[0] == "given":  # an expectation of nothing keeps nothing of a query that reads nothing
        out = torch.where(kept[..., None] > 0, out, 3.5)
    torch.testing.assert_close(out, torch.full_like(out, 3.5), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_union_reads_what_any_head_of_the_group_chose(shape):
    view = make_view(*shape)
    query = make_query(view, 6)
    plan = make_plan(query)
    alone = ops.thresholded(query, view, plan, SPECS["causal"])
    union = ops.thresholded(query, view, replace(plan, union=True), SPECS["causal"])
    assert bool((union[2] >= alone[2]).all())
    assert bool((union[1] >= alone[1] - 1e-5).all())
    grouped = union[2].view(-1, 2, 3)
    assert torch.equal(grouped, grouped[..., :1].expand_as(grouped))
    if view.rows.num_queries > 1:
        assert union[2].sum() > alone[2].sum()


def test_blocks_of_any_length_agree(monkeypatch):
    view = make_view((400,), (400,))
    query = make_query(view, 6)
    plan = make_plan(query, recent_tokens=5)
    want = ops.thresholded(query, view, plan, SPECS["causal"], backend="torch")
    monkeypatch.setattr(threshold_torch, "BLOCK_BYTES", 6 * 400 * 4 * 37)
    assert_same(ops.thresholded(query, view, plan, SPECS["causal"], backend="torch"), want, 1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tail", [0, 5, 40], ids="tail{}".format)
def test_value_mean_is_causal_and_blind_to_what_lies_behind(shape, tail):
    """A step writes all of a prompt's chunk before its first part is computed."""
    view = make_view(*shape, tail=tail)
    got, start = causal_value_mean(view), 0
    for sequence, (context, count) in enumerate(zip(*shape, strict=True)):
        pages = torch.tensor(view.rows.host_block_tables[sequence])
        values = view.pages.values[pages].transpose(1, 2).flatten(0, 1)[:context]
        means = values.cumsum(0) / torch.arange(1, context + 1)[:, None, None]
        torch.testing.assert_close(got[start : start + count], means[-count:], atol=1e-5, rtol=1e-5)
        start += count


def test_decode_reads_no_values_that_no_head_keeps():
    """Values that nobody keeps may be anything: they are never read, not even to be multiplied by zero."""
    view = make_view((300,), (1,))
    query = make_query(view, 6)
    plan = replace(make_plan(query, ("exact", 1.0, False)), theta=torch.full((1, 6), 4.0))
    want = ops.thresholded(query, view, plan, SPECS["causal"], backend="reference")
    pages = torch.tensor(view.rows.host_block_tables[0])
    keys = view.pages.keys[pages].transpose(0, 1).flatten(1, 2)[:, :300]
    kept = (torch.einsum("grd,gkd->grk", query.view(2, 3, 16), keys) * 0.5 > 4.0).any(1)
    assert kept.sum() < 100
    for head, position in (~kept).nonzero().tolist():
        view.pages.values[pages[position // 16], head, position % 16] = NAN
    assert_same(ops.thresholded(query, view, plan, SPECS["causal"], backend="torch"), want, 1e-5)


def test_wrong_calls_are_refused():
    view = make_view((20,), (20,))
    query = make_query(view, 6)
    plan = make_plan(query)
    with pytest.raises(ValueError, match="do not fit queries"):
        ops.thresholded(query, view, replace(plan, theta=plan.theta[:3]), SPECS["causal"])
    with pytest.raises(ValueError, match="KV heads"):
        ops.thresholded(query[:, :3], view, replace(plan, theta=plan.theta[:, :3]), SPECS["causal"])
    with pytest.raises(ValueError, match="dropped_sum='given'"):
        ops.thresholded(query, view, replace(plan, dropped_sum="given"), SPECS["causal"])
    with pytest.raises(ValueError, match="do not fit thresholds"):
        ops.thresholded(query, view, replace(plan, dropped_sum="given", expected=plan.theta[:3]), SPECS["causal"])
    with pytest.raises(ValueError, match="causal attention only"):
        ops.thresholded(query, view, plan, SPECS["window"])
    bare = PagedView(replace(view.pages, stats={}), view.rows)
    with pytest.raises(ValueError, match="VALUE_SUM"):
        ops.thresholded(query, bare, plan, SPECS["causal"])
