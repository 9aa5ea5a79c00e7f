"""The compiled CPU kernels, each instruction set that this machine has, against the float32 reference."""

from __future__ import annotations

import logging
import shutil
import subprocess
from functools import cache

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import LayerPages, PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import attention_native, native, reference
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band, Selection, Tiles

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

NAN = float("nan")
CPU = torch.device("cpu")
# RMS error of (out, lse) against the reference in float32. Measured: float32 7e-7; bfloat16 2.4e-3 and 7e-5 where
# weights are rounded to bfloat16 (2^-9 each), as dot products and tiles need it, 2.4e-4 and 4e-7 where they are not.
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (4e-3, 2e-4)}

SPECS = {
    "causal": AttentionSpec(0.2),
    "softcap": AttentionSpec(0.2, softcap=2.0),
    "window": AttentionSpec(0.2, band=Band(0, 37)),
    "far": AttentionSpec(0.2, band=Band(20, None)),
    "ring": AttentionSpec(0.2, band=Band(5, 60), softcap=3.0),
    "sinks": AttentionSpec(0.2, sinks=torch.tensor([0.5, -2.0, 100.0, 1.0, 0.0, 3.0])),
}
# (contexts, queries)
PREFILLS = {
    "one-token": ((1,), (1,)),
    "prompts": ((63, 111), (63, 111)),
    "chunks": ((130, 17, 1000), (30, 16, 111)),
    "long": ((700,), (700,)),
}
DECODES = {"1": (1,), "64": (64,), "15-16-17": (15, 16, 17), "1000-3-200": (1000, 3, 200)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (KV heads, group, head dim): every remainder by 16, 32 and 64 channels, and groups beside powers of two.
HEADS = [(2, 3, 64), (3, 1, 80), (1, 7, 96), (1, 8, 128), (2, 2, 256), (1, 5, 16), (1, 2, 48)]


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


@cache
def make_view(contexts, queries, kv_heads, dim, dtype, page_size=16):
    """A pool of NaN with random keys where sequences have tokens, pages in shuffled order."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-context // page_size) for context in contexts]
    pool = PagePool(CacheGeometry(1, kv_heads, dim, page_size, sum(needed) + 3, dtype))
    pool.keys.fill_(NAN)
    pool.values.fill_(NAN)
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for pages, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([pages[i // page_size] * page_size + i % page_size for i in range(context)])
        rows = torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots, backend="torch")
    return PagedView(pool.layer(0), Rows.build(tables, list(contexts), list(queries), CPU))


@cache
def make_query(view, heads):
    shape = view.rows.num_queries, heads, view.head_dim
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(view.pages.keys.dtype)


@cache
def make_selection(view, heads, granularity, tile):
    """About 40 % of the units; the first row reads nothing."""
    tiles = Tiles.of(view.rows, tile)
    units = -(-max(view.rows.host_context_lens) // granularity)
    mask = torch.rand(len(tiles), heads, units, generator=torch.Generator().manual_seed(2)) < 0.4
    last = (tiles.position + tiles.query_count - 1) // granularity
    mask &= torch.arange(units) <= last[:, None, None]
    mask[0, 0] = False
    return Selection.from_mask(mask, granularity, tiles)


@cache
def expected(query, view, selection, spec):
    return reference.attention(query, view, selection, spec)


def check(op, query, view, selection, spec, isa, slack=1):
    want = expected(query, view, selection, spec)
    got = op(query, view, selection, spec, isa=isa)
    assert got[0].dtype == query.dtype
    for name, a, b, ratio in zip(("out", "lse"), got, want, TOLERANCE[query.dtype], strict=True):
        assert a.shape == b.shape
        assert torch.equal(torch.isinf(a), torch.isinf(b)), f"{name}: other rows see nothing"
        a, b = a.double().nan_to_num(neginf=0, nan=NAN), b.double().nan_to_num(neginf=0, nan=NAN)
        error = (a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt().clamp(min=1e-6)
        assert error < ratio * slack, f"{name}: RMS error {error:.2e} of the reference"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", PREFILLS.values(), ids=PREFILLS)
def test_prefill(isa, dtype, shape, spec):
    view = make_view(*shape, 2, 64, dtype)
    check(attention_native.prefill, make_query(view, 6), view, None, spec, isa)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("granularity", [1, 4, 16, 32], ids="granularity{}".format)
@pytest.mark.parametrize("per", ["kv-head", "query-head"])
def test_selected_prefill(isa, dtype, granularity, per, spec):
    view = make_view((130, 17, 200), (30, 16, 111), 2, 64, dtype)
    selection = make_selection(view, 2 if per == "kv-head" else 6, granularity, 32)
    check(attention_native.prefill, make_query(view, 6), view, selection, spec, isa)


@pytest.mark.parametrize("granularity", [1, 16], ids="granularity{}".format)
def test_prefill_with_keys_per_query(isa, dtype, granularity):
    view = make_view((130, 17, 200), (30, 16, 111), 2, 64, dtype)
    selection = make_selection(view, 2, granularity, 1)
    check(attention_native.prefill, make_query(view, 6), view, selection, SPECS["causal"], isa)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("contexts", DECODES.values(), ids=DECODES)
@pytest.mark.parametrize("granularity", [None, 1, 4, 16, 32], ids="granularity-{}".format)
def test_decode(isa, dtype, contexts, granularity, spec):
    view = make_view(contexts, (1,) * len(contexts), 2, 64, dtype)
    selection = make_selection(view, 2, granularity, 1) if granularity else None
    check(attention_native.decode, make_query(view, 6), view, selection, spec, isa)


@pytest.mark.parametrize("heads", HEADS, ids="kv{0[0]}-group{0[1]}-dim{0[2]}".format)
@pytest.mark.parametrize("selected", [False, True], ids=["dense", "selected"])
def test_head_shapes(isa, dtype, heads, selected):
    kv_heads, group, dim = heads
    spec = AttentionSpec(dim**-0.5)
    view = make_view((70, 333), (70, 37), kv_heads, dim, dtype, 32)
    selection = make_selection(view, kv_heads * group, 8, 16) if selected else None
    check(attention_native.prefill, make_query(view, kv_heads * group), view, selection, spec, isa)
    view = make_view((70, 333), (1, 1), kv_heads, dim, dtype, 32)
    selection = make_selection(view, kv_heads * group, 8, 1) if selected else None
    check(attention_native.decode, make_query(view, kv_heads * group), view, selection, spec, isa)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(isa, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        view = make_view((5000,), (1,), 2, 64, dtype, 64)
        check(attention_native.decode, make_query(view, 6), view, None, SPECS["causal"], isa)
        view = make_view((130, 17, 1000), (30, 16, 111), 2, 64, dtype)
        check(attention_native.prefill, make_query(view, 6), view, None, SPECS["causal"], isa)
    finally:
        torch.set_num_threads(before)


def test_values_behind_the_window_are_never_touched(isa, dtype):
    """Pages that left a sliding window may have been given away and hold anything."""
    spec = AttentionSpec(0.2, band=Band(0, 40))
    for op, queries in ((attention_native.prefill, 20), (attention_native.decode, 1)):
        view = make_view((200,), (queries,), 2, 64, dtype)
        query = make_query(view, 6)
        keys, values = view.pages.keys.clone(), view.pages.values.clone()
        for position in range(200 - queries - 40 + 1):
            page = view.rows.host_block_tables[0][position // 16]
            keys[page, :, position % 16] = NAN
            values[page, :, position % 16] = NAN
        torn = PagedView(LayerPages(keys, values, {}), view.rows)
        for got, want in zip(op(query, torn, None, spec, isa=isa), op(query, view, None, spec, isa=isa), strict=True):
            assert torch.equal(got, want)


def test_large_logits_do_not_overflow(isa, dtype):
    view = make_view((300,), (300,), 2, 64, dtype)
    # Logits of some hundreds round to 1e-5, and so do their exponentials, here and in the reference.
    check(attention_native.prefill, make_query(view, 6) * 30, view, None, SPECS["causal"], isa, slack=5)


def test_a_selection_of_nothing(isa, dtype):
    view = make_view((40,), (40,), 2, 64, dtype)
    tiles = Tiles.of(view.rows, 16)
    nothing = Selection.from_mask(torch.zeros(len(tiles), 2, 3, dtype=torch.bool), 16, tiles)
    out, lse = attention_native.prefill(make_query(view, 6), view, nothing, SPECS["sinks"], isa=isa)
    assert not out.any()
    assert bool((lse == float("-inf")).all())


def test_query_of_any_strides(isa, dtype):
    view = make_view((70, 333), (70, 37), 2, 64, dtype)
    query = make_query(view, 6)
    by_head = query.transpose(0, 1).contiguous().transpose(0, 1)
    by_channel = query.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (by_head, by_channel):
        check(attention_native.prefill, strided, view, None, SPECS["causal"], isa)


@pytest.mark.parametrize("op", ["prefill", "decode"])
def test_cpu_attention_is_native_where_it_can_be(op, monkeypatch):
    calls = []
    monkeypatch.setattr(attention_native, op, lambda *args: calls.append(args))
    for dtype, dim, taken in ((torch.bfloat16, 64, 1), (torch.float16, 64, 0), (torch.float32, 40, 0)):
        view = make_view((20, 30), (1, 1), 2, dim, dtype)
        getattr(ops, op)(make_query(view, 4), view, None, AttentionSpec(0.2))
        assert len(calls) == taken
        calls.clear()


def test_without_the_library_attention_runs_in_torch(monkeypatch, caplog):
    monkeypatch.setattr(native, "LIBRARY_NAME", "missing.so")
    with caplog.at_level(logging.WARNING):
        assert native.library.__wrapped__() is None
    assert "missing.so" in caplog.text
    assert len(caplog.records) == 1
    monkeypatch.setattr(attention_native, "library", lambda: None)
    view = make_view((20, 30), (1, 1), 2, 64, torch.float32)
    query = make_query(view, 4)
    assert not attention_native.supports(query, view, SPECS["causal"])
    out, _ = ops.decode(query, view, None, AttentionSpec(0.2))
    torch.testing.assert_close(out, expected(query, view, None, AttentionSpec(0.2))[0])


def test_instruction_set_can_be_named(monkeypatch):
    path = native.Path(native.__file__).with_name(native.LIBRARY_NAME)
    for name in native.library().isas:
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        assert native.Library(path).isa == name
    monkeypatch.setenv(native.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match="FOVEATE_CPU_ISA=mmx: this machine has"):
        native.Library(path)


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils is not installed")
def test_opening_the_library_runs_no_code_of_an_instruction_set():
    """A table that is filled when the library is opened is filled by instructions that this CPU may not have."""
    path = native.Path(native.__file__).with_name(native.LIBRARY_NAME)
    symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    assert "foveate_prefill" in symbols
    assert [line for line in symbols.splitlines() if "_GLOBAL__sub_I_isa" in line] == []


@pytest.mark.parametrize("isa", native.library().isas)
@pytest.mark.parametrize("queries", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("bad", [3, 600, 699], ids="key{}".format)
def test_a_key_that_is_not_a_number_is_told(isa, queries, bad):
    """By every query that sees it and by no other, as the reference has it."""
    view = make_view((700,), (queries,), 2, 64, torch.float32)
    table = view.rows.host_block_tables[0]
    view.pages.keys[table[bad // view.page_size], :, bad % view.page_size] = NAN
    query = make_query(view, 4)
    kernel = attention_native.decode if queries == 1 else attention_native.prefill
    out, lse = kernel(query, view, None, AttentionSpec(0.2), isa=isa)
    want, want_lse = reference.attention(query, view, None, AttentionSpec(0.2))
    assert bool(want.isnan().any())
    assert torch.equal(out.isnan(), want.isnan())
    assert torch.equal(lse.isnan(), want_lse.isnan())


def test_band_without_keys():
    view = make_view((20, 30), (20, 7), 2, 64, torch.float32)
    _, lse = attention_native.prefill(make_query(view, 4), view, None, AttentionSpec(0.2, band=Band(40, None)))
    assert bool((lse == float("-inf")).all())
