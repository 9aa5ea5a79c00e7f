"""Prefill where each query has keys of its own: queries gathered per unit of keys, against the reference."""

from __future__ import annotations

import pytest
import torch

from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import attention_native, gathered_torch
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Selection

from .test_ops import SPECS, assert_same, make_query, make_view, random_selection

CHUNKS = ((130, 17, 200), (30, 16, 111))


def both(view, query, selection, spec):
    selection.validate(view.rows)
    return (ops.prefill(query, view, selection, spec, backend=backend) for backend in ("torch", "reference"))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("unit", [16, 32, 128], ids="unit{}".format)
@pytest.mark.parametrize("per", ["kv-head", "query-head"])
def test_equals_reference(spec, unit, per):
    view = make_view(*CHUNKS)
    query = make_query(view, 6)
    got, want = both(view, query, random_selection(view, 2 if per == "kv-head" else 6, unit, 1), spec)
    assert_same(got, want, 1e-5)


@pytest.mark.parametrize("page", [16, 32, 128], ids="page{}".format)
@pytest.mark.parametrize("heads", [(2, 1), (1, 7), (2, 3)], ids="kv{0[0]}xgroup{0[1]}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_units_pages_and_dtypes(page, heads, dtype):
    view = make_view((300, 1), (170, 1), kv_heads=heads[0], dim=80, page_size=page, dtype=dtype)
    query = make_query(view, heads[0] * heads[1])
    selection = random_selection(view, query.shape[1], 32, 1)
    got, want = both(view, query, selection, AttentionSpec(80**-0.5))
    assert_same(got, want, 1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("per", ["kv-head", "query-head"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_native_equals_reference(isa, dtype, per, spec):
    for unit, page in ((16, 16), (32, 16), (16, 64), (512, 16)):
        view = make_view((130, 17, 700), (100, 16, 311), dtype=dtype, page_size=page)
        query = make_query(view, 6)
        selection = random_selection(view, 2 if per == "kv-head" else 6, unit, 1)
        want = ops.prefill(query, view, selection, spec, backend="reference")
        got = attention_native.prefill(query, view, selection, spec, isa=isa)
        assert_same(got, want, 3e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(2, 3, 64), (3, 1, 80), (1, 7, 96), (1, 8, 128), (2, 2, 256), (1, 5, 16)], ids=str)
def test_native_head_shapes(isa, dtype, heads):
    kv_heads, group, dim = heads
    view = make_view((700,), (300,), kv_heads=kv_heads, dim=dim, dtype=dtype, page_size=32)
    query = make_query(view, kv_heads * group)
    selection, spec = random_selection(view, kv_heads * group, 64, 1), AttentionSpec(dim**-0.5)
    want = ops.prefill(query, view, selection, spec, backend="reference")
    got = attention_native.prefill(query, view, selection, spec, isa=isa)
    assert_same(got, want, 3e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("rows", [1, 16], ids="rows{}".format)
def test_slabs_and_lists_of_any_length_give_the_same(rows, monkeypatch):
    view = make_view(*CHUNKS)
    query, selection = make_query(view, 6), random_selection(view, 6, 16, 1)
    whole = gathered_torch.prefill(query, view, selection, SPECS["sinks"])
    monkeypatch.setattr(gathered_torch, "_SLAB_BYTES", 30_000)
    monkeypatch.setattr(gathered_torch, "_ROWS", rows)
    assert_same(gathered_torch.prefill(query, view, selection, SPECS["sinks"]), whole, 1e-6)


def test_any_split_of_the_selected_units_merges_to_the_whole():
    view = make_view(*CHUNKS)
    query, selection = make_query(view, 6), random_selection(view, 6, 16, 1)
    mask = selection.to_mask(view.rows)[..., ::16]
    side = torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    parts = [
        ops.prefill(query, view, Selection.from_mask(half, 16, selection.tiles), SPECS["causal"], backend="torch")
        for half in (mask & side, mask & ~side)
    ]
    assert any(bool(torch.isinf(lse).any()) for _, lse in parts)  # some queries see nothing of a part
    whole = ops.prefill(query, view, selection, SPECS["causal"], backend="torch")
    assert_same(ops.merge(parts), whole, 1e-5)


@pytest.mark.parametrize(("unit", "tile", "used"), [(16, 1, True), (8, 1, False), (16, 2, False)], ids=str)
def test_is_used_where_each_query_has_large_units_of_its_own(unit, tile, used, monkeypatch):
    calls = []
    gathered = gathered_torch.prefill
    monkeypatch.setattr(gathered_torch, "prefill", lambda *args: calls.append(1) or gathered(*args))
    view = make_view(*CHUNKS)
    got, want = both(view, make_query(view, 6), random_selection(view, 6, unit, tile), SPECS["causal"])
    assert_same(got, want, 1e-5)
    assert bool(calls) == used
