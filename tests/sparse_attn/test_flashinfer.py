"""Our calls to flashinfer, checked without a GPU: by the installed signatures, and by what the arguments mean.

The stand-ins accept what the installed functions accept, and compute with the float32 reference from nothing but the
arguments that they were given.
"""

from __future__ import annotations

import inspect
import math
import warnings
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import LayerPages, PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import attention, attention_flashinfer, reference
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # only what its import has to say
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed", exc_type=ImportError)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SPARE_PAGES = 2

SPECS = {
    "causal": AttentionSpec(0.25),
    "softcap": AttentionSpec(0.25, softcap=2.0),
    "window": AttentionSpec(0.25, band=Band(0, 37)),
    "window-of-one": AttentionSpec(0.25, band=Band(0, 1)),
    "window-softcap": AttentionSpec(0.25, softcap=3.0, band=Band(0, 20)),
    "sinks": AttentionSpec(0.25, sinks=torch.tensor([0.5, -2.0, 100.0, 1.0, 0.0, 3.0])),
}
SHAPES = {
    "one-token": ((1,), (1,)),
    "whole-prompts": ((63, 111), (63, 111)),
    "chunks": ((130, 17, 300), (30, 16, 111)),
    "full-pages": ((128, 256), (128, 1)),
}


def make_view(contexts, queries, *, kv_heads=2, dim=64, page_size=16, dtype=torch.float16):
    """Random keys in shuffled pages, NaN in every other slot; each sequence owns more pages than it has filled."""
    generator = torch.Generator().manual_seed(0)
    owned = [-(-context // page_size) + SPARE_PAGES for context in contexts]
    pool = PagePool(CacheGeometry(1, kv_heads, dim, page_size, sum(owned) + 3, dtype))
    pool.keys.fill_(math.nan)
    pool.values.fill_(math.nan)
    order = torch.randperm(sum(owned) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in owned]
    for pages, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([pages[i // page_size] * page_size + i % page_size for i in range(context)])
        rows = torch.randn(2, context, kv_heads, dim, generator=generator).to(dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots)
    return PagedView(pool.layer(0), Rows.build(tables, list(contexts), list(queries), CPU))


def make_query(view, heads):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(view.rows.num_queries, heads, view.head_dim, generator=generator)
    return query.to(view.pages.keys.dtype)


def bind(function, args, kwargs):
    """The arguments by name, defaults filled in; raises what the installed function would raise."""
    bound = inspect.signature(function).bind(None, *args, **kwargs)
    bound.apply_defaults()
    return {name.removeprefix("paged_kv_"): value for name, value in bound.arguments.items()}


def compute(made, planned, call):
    """Attention as the three calls describe it; ``lse`` with base 2, as flashinfer documents it."""
    assert made["kv_layout"] == "HND"
    assert made["float_workspace_buffer"].dtype == torch.uint8
    assert planned["pos_encoding_mode"] == "NONE"
    assert planned.get("causal", True), "a decode sees all keys, a prefill must be told"
    assert call["return_lse"]
    query, (keys, values) = call["q"], call["cache"]
    indptr, indices, last_page_len = (planned[name] for name in ("indptr", "indices", "last_page_len"))
    offsets = planned.get("qo_indptr", torch.arange(len(indptr), dtype=torch.int32))
    for numbers in (indptr, indices, last_page_len, offsets):
        assert (numbers.dtype, numbers.device) == (torch.int32, CPU)
    dim = planned.get("head_dim", planned.get("head_dim_qk"))
    assert keys.shape[1:] == (planned["num_kv_heads"], planned["page_size"], dim)
    assert query.shape == (offsets[-1], planned["num_qo_heads"], dim)
    assert query.dtype == planned["q_data_type"]
    assert keys.dtype == planned["kv_data_type"]
    assert indptr[-1] == len(indices)
    tables = [part.tolist() for part in indices.tensor_split(indptr[1:-1].long())]
    full = (indptr.diff() - 1) * planned["page_size"]
    contexts = (full + last_page_len).tolist()
    rows = Rows.build(tables, contexts, offsets.diff().tolist(), CPU)
    band = Band() if planned["window_left"] == -1 else Band(0, planned["window_left"] + 1)
    spec = AttentionSpec(planned["sm_scale"], planned["logits_soft_cap"] or 0.0, band)
    out, lse = reference.attention(query, PagedView(LayerPages(keys, values, {}), rows), None, spec)
    return out, lse / math.log(2)


def stand_in(real, made):
    """In place of the class ``real``; what is made of it is appended to ``made``."""
    # The decode wrapper's `plan` hands its keywords on: the function behind it knows their names.
    plan = getattr(real, "_plan_impl", real.plan)

    def build(*args, **kwargs):
        wrapper, planned = create_autospec(real, instance=True), {}
        options = bind(real.__init__, args, kwargs)
        wrapper.options = options
        wrapper.plan.side_effect = lambda *args, **kwargs: planned.update(bind(plan, args, kwargs))
        wrapper.run.side_effect = lambda *args, **kwargs: compute(options, planned, bind(real.run, args, kwargs))
        made.append(wrapper)
        return wrapper

    return create_autospec(real, side_effect=build)


def merge_state(v_a, s_a, v_b, s_b):
    total = torch.logaddexp2(s_a, s_b)
    first, second = (torch.exp2(s - total).nan_to_num(0.0)[..., None] for s in (s_a, s_b))
    return (first * v_a.float() + second * v_b.float()).to(v_a.dtype), total


@pytest.fixture
def made(monkeypatch):
    """Stand-ins for flashinfer; the list of wrappers that were made."""
    wrappers = []
    library = SimpleNamespace(
        BatchPrefillWithPagedKVCacheWrapper=stand_in(flashinfer.BatchPrefillWithPagedKVCacheWrapper, wrappers),
        BatchDecodeWithPagedKVCacheWrapper=stand_in(flashinfer.BatchDecodeWithPagedKVCacheWrapper, wrappers),
        merge_state=create_autospec(flashinfer.merge_state, side_effect=merge_state),
    )
    monkeypatch.setattr(attention_flashinfer, "library", lambda: library)
    monkeypatch.setattr(attention_flashinfer, "_workspace", lambda device: torch.zeros(16, dtype=torch.uint8))
    return wrappers


def assert_same(got, want):
    """``out`` may be rounded once more, where learned sinks scale it; ``lse`` goes to base 2 and back."""
    torch.testing.assert_close(got[0], want[0], rtol=2 * torch.finfo(want[0].dtype).eps, atol=1e-6)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("page_size", [16, 64, 128], ids="page{}".format)
def test_prefill_equals_reference(made, shape, spec, page_size):
    view = make_view(*shape, page_size=page_size)
    query = make_query(view, 6)
    want = ops.prefill(query, view, None, spec, backend="reference")
    assert_same(ops.prefill(query, view, None, spec, backend="flashinfer"), want)
    assert len(made) == 1


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("contexts", [(1,), (64,), (15, 16, 17), (300, 3, 200)], ids=str)
@pytest.mark.parametrize("page_size", [16, 128], ids="page{}".format)
def test_decode_equals_reference(made, contexts, spec, page_size):
    view = make_view(contexts, [1] * len(contexts), page_size=page_size)
    query = make_query(view, 6)
    want = ops.decode(query, view, None, spec, backend="reference")
    assert_same(ops.decode(query, view, None, spec, backend="flashinfer"), want)
    assert len(made) == 1


@pytest.mark.parametrize("heads", [(2, 1), (1, 3), (1, 4), (2, 7)], ids="kv{0[0]}xgroup{0[1]}".format)
@pytest.mark.parametrize("dim", attention_flashinfer.HEAD_DIMS, ids="dim{}".format)
@pytest.mark.parametrize("dtype", attention_flashinfer.DTYPES, ids=str)
def test_head_shapes_and_dtypes(made, heads, dim, dtype):
    kv_heads, group = heads
    view = make_view((40, 33), (1, 1), kv_heads=kv_heads, dim=dim, dtype=dtype)
    query = make_query(view, kv_heads * group)
    spec = AttentionSpec(dim**-0.5)
    for op in (ops.prefill, ops.decode):
        want = op(query, view, None, spec, backend="reference")
        assert_same(op(query, view, None, spec, backend="flashinfer"), want)
    # Its other decode kernel knows the groups 1, 2, 3, 4, 6, 8 and 16 only.
    assert made[1].options["use_tensor_cores"] == (group >= 4)


def test_a_plan_serves_every_layer_of_its_band_and_step(made):
    view = make_view((70,), (70,))
    query = make_query(view, 6)
    for spec in (SPECS["causal"], SPECS["window"]) * 3:
        ops.prefill(query, view, None, spec, backend="flashinfer")
    assert [wrapper.plan.call_count for wrapper in made] == [1, 1]
    assert [wrapper.run.call_count for wrapper in made] == [3, 3]
    following = PagedView(view.pages, Rows.build([list(view.rows.host_block_tables[0])], [71], [70], CPU))
    following.pages.keys.nan_to_num_()
    following.pages.values.nan_to_num_()
    ops.prefill(query, following, None, SPECS["causal"], backend="flashinfer")
    assert len(made) == 3


UNSUPPORTED = {
    "float32": ({"dtype": torch.float32}, AttentionSpec(0.25)),
    "head-dim-80": ({"dim": 80}, AttentionSpec(0.25)),
    "behind-a-window": ({}, AttentionSpec(0.25, band=Band(20, None))),
    "ring": ({}, AttentionSpec(0.25, band=Band(5, 60))),
    "sees-nothing": ({}, AttentionSpec(0.25, band=Band(0, 0))),
}


@pytest.mark.parametrize(("sizes", "spec"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_flashinfer_cannot_do_is_refused(made, sizes, spec):
    view = make_view((20,), (20,), **sizes)
    with pytest.raises(ValueError, match="no kernel"):
        ops.prefill(make_query(view, 6), view, None, spec, backend="flashinfer")
    assert made == []


def test_dense_calls_on_cuda_go_to_flashinfer_and_others_to_triton(monkeypatch):
    view = make_view((20,), (20,))
    query = SimpleNamespace(is_cuda=True, device=CUDA, dtype=torch.float16)
    plain, selection = SPECS["causal"], object()
    for installed, want in ((True, "flashinfer"), (False, "triton")):
        monkeypatch.setattr(attention_flashinfer, "available", lambda device, installed=installed: installed)
        assert attention._default_backend(query, view, None, plain) == want
        assert attention._default_backend(query, view, selection, plain) == "triton"
        assert attention._default_backend(query, view, None, UNSUPPORTED["ring"][1]) == "triton"
    assert attention._default_backend(make_query(view, 6), view, None, plain) == "torch"


@pytest.mark.parametrize(
    ("device", "capability", "compiler", "loads", "want"),
    [
        (CUDA, (9, 0), True, True, True),
        (CUDA, (7, 5), True, True, False),
        (CUDA, (9, 0), False, True, False),
        (CUDA, (9, 0), True, False, False),
        (CPU, (9, 0), True, True, False),
    ],
    ids=["hopper", "turing", "no-compiler", "does-not-load", "cpu"],
)
def test_available(monkeypatch, device, capability, compiler, loads, want):
    def load():
        if not loads:
            raise ImportError("libcuda.so.1")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_flashinfer, "_has_compiler", lambda: compiler)
    monkeypatch.setattr(attention_flashinfer, "library", load)
    assert attention_flashinfer.available.__wrapped__(device) is want


@pytest.mark.parametrize("sinks", [None, SPECS["sinks"].sinks], ids=["plain", "sinks"])
def test_merge_of_two_parts_is_the_whole(made, sinks):
    view = make_view((120, 9), (120, 9))
    query = make_query(view, 6)
    # The first 33 queries of each sequence see nothing in the second part.
    near, far = (
        ops.prefill(query, view, None, AttentionSpec(0.25, band=band), backend="reference")
        for band in (Band(0, 33), Band(33, None))
    )
    want = ops.prefill(query, view, None, AttentionSpec(0.25, sinks=sinks), backend="reference")
    got = attention_flashinfer.merge(near, far, sinks)
    # The parts are rounded to half precision before they are added: 1e-3 of values up to 4.
    torch.testing.assert_close(got[0], want[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=1e-6)
    nothing = torch.zeros_like(far[0]), torch.full_like(far[1], -math.inf)
    out, lse = attention_flashinfer.merge(nothing, nothing, sinks)
    assert not out.any()
    assert torch.equal(lse, nothing[1])


@pytest.mark.parametrize(
    ("shape", "dtype", "want"),
    [
        ((5, 64, 128), torch.bfloat16, True),
        ((5, 32, 256), torch.float16, True),
        ((5, 64, 256), torch.float16, False),
        ((5, 64, 80), torch.float16, False),
        ((5, 8, 128), torch.float32, False),
    ],
    ids=["fits", "fits-exactly", "too-many-threads", "head-dim-80", "float32"],
)
def test_can_merge(monkeypatch, shape, dtype, want):
    monkeypatch.setattr(attention_flashinfer, "available", lambda device: True)
    assert attention_flashinfer.can_merge(torch.zeros(shape, dtype=dtype)) is want


def test_a_plan_is_held_until_it_has_been_copied(monkeypatch):
    events = []

    def event():
        events.append(SimpleNamespace(done=False, record=lambda stream: None))
        events[-1].query = lambda own=events[-1]: own.done
        return events[-1]

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    held = attention_flashinfer._copying
    held.clear()
    try:
        attention_flashinfer._hold("first", CUDA)
        attention_flashinfer._hold("second", CUDA)
        assert [plan for _, plan in held] == ["first", "second"]
        events[0].done = True
        attention_flashinfer._hold("third", CUDA)
        assert [plan for _, plan in held] == ["second", "third"]
    finally:
        held.clear()
