"""Every CPU attention path against the float32 reference, and the reference against plain attention."""

from __future__ import annotations

import itertools

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM, KEY_SUM_16, VALUE_SUM
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import attention_torch, cpu, native
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import CAUSAL, Band, Selection, Tiles

NAN = float("nan")


def make_view(contexts, queries, *, kv_heads=2, dim=16, page_size=16, dtype=torch.float32, seed=0):
    """A pool of NaN with random keys where sequences have tokens, pages in shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // page_size) for context in contexts]
    geometry = CacheGeometry(1, kv_heads, dim, page_size, sum(needed) + 3, dtype)
    pool = PagePool(geometry)
    pool.keys.fill_(NAN)
    pool.values.fill_(NAN)
    order = torch.randperm(geometry.num_pages, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for pages, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([pages[i // page_size] * page_size + i % page_size for i in range(context)])
        rows = torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots)
    return PagedView(pool.layer(0), Rows.build(tables, list(contexts), list(queries), torch.device("cpu")))


def make_query(view, heads, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (view.rows.num_queries, heads, view.head_dim)
    return torch.randn(shape, generator=generator).to(view.pages.keys.dtype)


def random_selection(view, heads, granularity, tile, seed=2):
    generator = torch.Generator().manual_seed(seed)
    tiles = Tiles.of(view.rows, tile)
    units = -(-max(view.rows.host_context_lens) // granularity)
    mask = torch.rand(len(tiles), heads, units, generator=generator) < 0.4
    last = (tiles.position + tiles.query_count - 1) // granularity
    mask &= torch.arange(units) <= last[:, None, None]
    mask[0, 0] = False  # a row that reads nothing
    return Selection.from_mask(mask, granularity, tiles)


def assert_same(got, want, ratio):
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        assert torch.equal(torch.isinf(a), torch.isinf(b)), f"{name}: other rows see nothing"
        a, b = (part.double().nan_to_num(nan=float("nan"), neginf=0) for part in (a, b))  # a NaN fails
        error = (a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt().clamp(min=1e-6)
        assert error < ratio, f"{name}: RMS error {error:.2e} of the reference"


SPECS = {
    "causal": AttentionSpec(0.25),
    "softcap": AttentionSpec(0.25, softcap=2.0),
    "window": AttentionSpec(0.25, band=Band(0, 37)),
    "far": AttentionSpec(0.25, band=Band(20, None)),
    "ring": AttentionSpec(0.25, band=Band(5, 60), softcap=3.0),
    "sinks": AttentionSpec(0.25, sinks=torch.tensor([0.5, -2.0, 100.0, 1.0, 0.0, 3.0])),
}
SHAPES = {
    "one-token": ((1,), (1,)),
    "whole-prompts": ((63, 111), (63, 111)),
    "chunks": ((130, 17, 1000), (30, 16, 111)),
    "long-block": ((700,), (700,)),
}


@pytest.fixture(params=[False, True], ids=["no-bf16", "bf16"])
def fast_bfloat16(request, monkeypatch):
    """Whether the CPU multiplies bfloat16, whatever this one does."""
    monkeypatch.setattr(attention_torch, "has_bfloat16_products", lambda: request.param)


@pytest.mark.parametrize(
    ("machine", "bf16", "amx", "onednn", "has"),
    [
        ("x86_64", False, False, True, False),  # AVX-512 alone: oneDNN widens
        ("x86_64", True, False, True, True),
        ("x86_64", False, True, True, True),
        ("aarch64", False, False, True, True),
        ("aarch64", False, False, False, False),
    ],
)
def test_which_cpus_multiply_bfloat16(monkeypatch, machine, bf16, amx, onednn, has):
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    cpu.has_bfloat16_products.cache_clear()
    try:
        assert cpu.has_bfloat16_products() is has
    finally:
        cpu.has_bfloat16_products.cache_clear()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prefill_equals_reference(shape, spec):
    view = make_view(*shape)
    query = make_query(view, 6)
    want = ops.prefill(query, view, None, spec, backend="reference")
    assert_same(ops.prefill(query, view, None, spec, backend="torch"), want, 1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("granularity", [1, 4, 16], ids="granularity{}".format)
@pytest.mark.parametrize("per", ["kv-head", "query-head"])
def test_selected_prefill_equals_reference(granularity, spec, per):
    view = make_view((130, 17, 200), (30, 16, 111))
    query = make_query(view, 6)
    selection = random_selection(view, 2 if per == "kv-head" else 6, granularity, 32)
    selection.validate(view.rows)
    want = ops.prefill(query, view, selection, spec, backend="reference")
    assert_same(ops.prefill(query, view, selection, spec, backend="torch"), want, 1e-5)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("contexts", [(1,), (64,), (15, 16, 17), (1000, 3, 200)], ids=str)
@pytest.mark.parametrize("selected", [False, True], ids=["dense", "selected"])
def test_decode_equals_reference(contexts, spec, selected):
    view = make_view(contexts, [1] * len(contexts))
    query = make_query(view, 6)
    selection = random_selection(view, 2, 4, 1) if selected else None
    want = ops.decode(query, view, selection, spec, backend="reference")
    assert_same(ops.decode(query, view, selection, spec, backend="torch"), want, 1e-5)


@pytest.mark.parametrize("contiguous", [False, True], ids=["scattered", "side-by-side"])
def test_decode_reads_runs_of_pages_and_scattered_pages_alike(contiguous):
    view = make_view((300,), (1,))
    if contiguous:
        order = list(view.rows.host_block_tables[0])
        table = list(range(len(order)))
        keys, values = (torch.full_like(pool, NAN) for pool in (view.pages.keys, view.pages.values))
        keys[table], values[table] = view.pages.keys[order], view.pages.values[order]
        pages = type(view.pages)(keys, values, {})
        moved = PagedView(pages, Rows.build([table], [300], [1], torch.device("cpu")))
    else:
        moved = view
    query = make_query(view, 6)
    want = ops.decode(query, view, None, SPECS["causal"], backend="reference")
    assert_same(ops.decode(query, moved, None, SPECS["causal"], backend="torch"), want, 1e-5)


@pytest.mark.parametrize("heads", [(2, 1), (2, 3), (1, 7), (1, 8)], ids="kv{0[0]}xgroup{0[1]}".format)
@pytest.mark.parametrize("dim", [64, 80, 256], ids="dim{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [0.0, 2.0], ids=["plain", "softcap"])
def test_head_shapes_and_dtypes(heads, dim, dtype, softcap, fast_bfloat16):
    kv_heads, group = heads
    view = make_view((70, 33), (70, 5), kv_heads=kv_heads, dim=dim, dtype=dtype)
    query = make_query(view, kv_heads * group)
    spec = AttentionSpec(dim**-0.5, softcap)
    want = ops.prefill(query, view, None, spec, backend="reference")
    assert_same(ops.prefill(query, view, None, spec, backend="torch"), want, 1e-5 if dtype == torch.float32 else 8e-3)


def test_reference_is_plain_attention():
    view = make_view((40,), (40,), kv_heads=1, dim=8)
    query = make_query(view, 2)
    page = torch.tensor(view.rows.host_block_tables[0])
    keys, values = (pool[page, 0].flatten(0, 1)[:40] for pool in (view.pages.keys, view.pages.values))
    want = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys.expand(2, -1, -1), values.expand(2, -1, -1), is_causal=True, scale=0.3
    )
    out, _ = ops.prefill(query, view, None, AttentionSpec(0.3), backend="reference")
    torch.testing.assert_close(out.transpose(0, 1), want)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_merge_of_disjoint_parts_is_the_whole(with_sinks):
    view = make_view((120, 9), (120, 9))
    query = make_query(view, 4)
    sinks = torch.tensor([0.0, 4.0, -3.0, 90.0]) if with_sinks else None
    bands = [Band(0, 10), Band(10, 33), Band(33, None)]
    parts = [ops.prefill(query, view, None, AttentionSpec(0.25, band=band), backend="reference") for band in bands]
    want = ops.prefill(query, view, None, AttentionSpec(0.25, sinks=sinks), backend="reference")
    assert_same(ops.merge(parts, sinks), want, 1e-5)


def test_merge_of_nothing_is_zero():
    part = torch.zeros(3, 2, 4), torch.full((3, 2), float("-inf"))
    out, lse = ops.merge([part, part])
    assert torch.equal(out, part[0])
    assert torch.equal(lse, part[1])


def test_wrong_shapes_are_refused():
    view = make_view((20,), (20,))
    with pytest.raises(ValueError, match="queries given"):
        ops.prefill(torch.zeros(3, 2, 16), view, None, SPECS["causal"])
    with pytest.raises(ValueError, match="does not fit"):
        ops.prefill(torch.zeros(20, 3, 16), view, None, SPECS["causal"])
    with pytest.raises(ValueError, match="one query per sequence"):
        ops.decode(torch.zeros(20, 2, 16), view, None, SPECS["causal"])
    with pytest.raises(ValueError, match="do not fit pages"):
        ops.write_kv(torch.zeros(3, 2, 8), torch.zeros(3, 2, 8), view.pages, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("chunks", [(45,), (1,) * 45, (16, 16, 13), (5, 30, 10)], ids=["whole", "ones", "pages", "odd"])
def test_statistics_equal_recomputation_however_tokens_arrive(chunks):
    stats = (KEY_SUM, KEY_MIN, KEY_MAX, VALUE_SUM)
    pool = PagePool(CacheGeometry(1, 2, 8, 16, 5), stats)
    for stat in stats:
        pool.layer(0).stats[stat].fill_(NAN)  # what an earlier owner left
    table, key, value = [3, 0, 4], torch.randn(45, 2, 8), torch.randn(45, 2, 8)
    slots = torch.tensor([table[i // 16] * 16 + i % 16 for i in range(45)])
    for start, stop in itertools.pairwise(itertools.accumulate(chunks, initial=0)):
        ops.write_kv(key[start:stop], value[start:stop], pool.layer(0), slots[start:stop])
    for page, filled in zip(table, (16, 16, 13), strict=True):
        for stat, want in ops.page_stats(pool.layer(0), page, filled).items():
            torch.testing.assert_close(pool.layer(0).stats[stat][page], want, msg=lambda m, s=stat: f"{s.name}: {m}")


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    "chunks", [(150,), (1,) * 150, (16, 50, 84), (5, 130, 15)], ids=["whole", "ones", "runs", "odd"]
)
def test_sums_of_runs_equal_recomputation_however_tokens_arrive(chunks, backend):
    """A page of four runs; a run that holds no token yet is nobody's, so only those with tokens are compared."""
    if backend == "native" and native.library() is None:
        pytest.skip("the kernels were not built on this machine")
    pool = PagePool(CacheGeometry(1, 2, 16, 64, 5), (KEY_SUM, KEY_SUM_16))
    for kept in pool.layer(0).stats.values():
        kept.fill_(NAN)  # what an earlier owner left
    table, key = [3, 0, 4], torch.randn(150, 2, 16)
    slots = torch.tensor([table[i // 64] * 64 + i % 64 for i in range(150)])
    for start, stop in itertools.pairwise(itertools.accumulate(chunks, initial=0)):
        ops.write_kv(key[start:stop], key[start:stop], pool.layer(0), slots[start:stop], backend=backend)
    for page, filled in zip(table, (64, 64, 22), strict=True):
        want = ops.page_stats(pool.layer(0), page, filled)[KEY_SUM_16]
        assert want.shape == (2, -(-filled // 16), 16)
        torch.testing.assert_close(pool.layer(0).stats[KEY_SUM_16][page][:, : want.shape[1]], want)
        torch.testing.assert_close(pool.layer(0).stats[KEY_SUM][page], want.sum(1))


def test_slot_minus_one_writes_nowhere():
    pool = PagePool(CacheGeometry(1, 1, 4, 16, 2), (KEY_SUM,))
    pool.keys.zero_()
    ops.write_kv(torch.ones(2, 1, 4), torch.ones(2, 1, 4), pool.layer(0), torch.tensor([-1, 5]))
    assert pool.keys.sum() == 4
    assert torch.equal(pool.keys[0, 0, 0, 5], torch.ones(4))


def test_band_algebra():
    assert Band(0, 10).within(Band(3, None)) == Band(3, 10)
    assert CAUSAL.within(CAUSAL) == CAUSAL
    for band, position in itertools.product([CAUSAL, Band(0, 4), Band(4, None), Band(2, 5), Band(5, 3)], range(12)):
        far = band.farthest if band.farthest is not None else 99
        assert band.visible(position) == sum(band.nearest <= position - key < far for key in range(position + 1))
