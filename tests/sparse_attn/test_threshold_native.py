"""The compiled kernels of ``thresholded``, each instruction set of this machine, against the float32 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import native, threshold_native
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band

from .test_threshold_ops import (
    COMPENSATIONS,
    INF,
    NAN,
    SHAPES,
    SPECS,
    assert_same,
    make_plan,
    make_query,
    make_view,
    thresholds_in_gaps,
)

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

# (KV heads, group, head dim, page size)
HEADS = [(2, 3, 64, 64), (1, 7, 80, 16), (1, 8, 128, 32), (3, 1, 96, 128), (2, 2, 256, 16), (1, 5, 16, 16)]


def both(view, query, plan, spec, isa):
    got = threshold_native.thresholded(query, view, plan, spec, isa=isa)
    return got, ops.thresholded(query, view, plan, spec, backend="reference")


@pytest.mark.parametrize("compensation", COMPENSATIONS, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_native_equals_reference(shape, spec, compensation, isa):
    if spec.band != Band():
        compensation = (*compensation[:2], False)
    view = make_view(*shape, tail=5)
    query = make_query(view, 6)
    assert_same(*both(view, query, make_plan(query, compensation), spec, isa), 2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "rest", [{"sink_tokens": 20}, {"recent_tokens": 1}, {"recent_tokens": 300, "sink_tokens": 3}], ids=str
)
@pytest.mark.parametrize("union", [False, True], ids=["independent", "union"])
def test_what_is_always_read(shape, rest, union, isa):
    for band in (Band(), Band(0, 25), Band(4, None)):
        view = make_view(*shape)
        query, spec = make_query(view, 6), AttentionSpec(0.5, band=band)
        plan = make_plan(query, ("exact", 1.0, band == Band()), union=union, **rest)
        if threshold_native.supports(query, view, plan, spec):
            assert_same(*both(view, query, plan, spec, isa), 2e-5)
        else:
            assert union
            assert shape[1][0] > 1


@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("bad", [3, 600, 699], ids="key{}".format)
@pytest.mark.parametrize("compensation", COMPENSATIONS, ids=str)
def test_a_key_that_is_not_a_number_is_told(queries, bad, compensation, isa):
    """By every query that sees it and by no other: it is above no threshold, but it must not be lost."""
    view = make_view((700,), (queries,))
    table = view.rows.host_block_tables[0]
    view.pages.keys[table[bad // view.page_size], :, bad % view.page_size] = NAN
    query = make_query(view, 6)
    got, want = both(view, query, make_plan(query, (*compensation[:2], False)), AttentionSpec(0.5), isa)
    assert bool(want[0].isnan().any())
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[1].isnan(), want[1].isnan())


@pytest.mark.parametrize("heads", HEADS, ids="kv{0[0]}-group{0[1]}-dim{0[2]}-page{0[3]}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_head_shapes_and_dtypes(heads, dtype, phase, isa):
    kv_heads, group, dim, page_size = heads
    contexts, queries = ((70, 333), (70, 50)) if phase == "prefill" else ((999, 333), (1, 1))
    view = make_view(contexts, queries, kv_heads=kv_heads, dim=dim, dtype=dtype, page_size=page_size)
    query = make_query(view, kv_heads * group)
    spec = AttentionSpec(2 * dim**-0.5)
    plan = replace(make_plan(query), theta=thresholds_in_gaps(view, query, spec.scale))
    assert_same(*both(view, query, plan, spec, isa), 2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_parts_of_a_long_sequence_agree(threads, isa):
    """More threads cut a sequence into more parts."""
    view = make_view((3000,), (1,), kv_heads=1)
    query = make_query(view, 3)
    plan = make_plan(query, recent_tokens=300, sink_tokens=20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(*both(view, query, plan, SPECS["causal"], isa), 2e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rising", [True, False], ids=["rising", "falling"])
@pytest.mark.parametrize("union", [False, True], ids=["independent", "union"])
def test_decode_where_each_block_has_higher_logits_than_the_one_before(rising, union, isa):
    """Weights are kept relative to a reference that moves, those of a block whose values are on their way too."""
    view = make_view((900,), (1,))
    query = make_query(view, 6)
    slope = torch.arange(900.0) / 20 if rising else torch.arange(900.0, 0, -1) / 20
    for page, first in zip(view.rows.host_block_tables[0], range(0, 900, 16), strict=True):
        rows = slope[first : first + 16]
        view.pages.keys[page, :, : len(rows), 0] = rows
    query[..., 0] = query[..., 0].abs() + 1
    plan = replace(make_plan(query), theta=torch.linspace(2, 60, 6)[None], union=union)
    assert_same(*both(view, query, plan, SPECS["causal"], isa), 2e-5)


def test_decode_reads_no_values_that_no_head_keeps(isa):
    view = make_view((300,), (1,))
    query = make_query(view, 6)
    plan = replace(make_plan(query, ("exact", 1.0, False)), theta=torch.full((1, 6), 4.0))
    want = ops.thresholded(query, view, plan, SPECS["causal"], backend="reference")
    pages = torch.tensor(view.rows.host_block_tables[0])
    keys = view.pages.keys[pages].transpose(0, 1).flatten(1, 2)[:, :300]
    kept = (torch.einsum("grd,gkd->grk", query.view(2, 3, 16), keys) * 0.5 > 4.0).any(1)
    for head, position in (~kept).nonzero().tolist():
        view.pages.values[pages[position // 16], head, position % 16] = NAN
    assert_same(threshold_native.thresholded(query, view, plan, SPECS["causal"], isa=isa), want, 1e-5)


def test_the_kernels_serve_what_they_can(isa):
    view = make_view((40,), (40,))
    query = make_query(view, 6)
    plan = make_plan(query)
    assert threshold_native.supports(query, view, plan, SPECS["causal"])
    assert not threshold_native.supports(query, view, replace(plan, union=True), SPECS["causal"])
    # Without thresholds it is dense attention, whichever way it is computed.
    plan = replace(plan, theta=torch.full(query.shape[:2], -INF))
    dense = ops.prefill(query, view, None, SPECS["causal"], backend="reference")
    got = threshold_native.thresholded(query, view, plan, SPECS["causal"], isa=isa)
    torch.testing.assert_close(got[0], dense[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got[1], dense[1], atol=2e-5, rtol=1e-4)
