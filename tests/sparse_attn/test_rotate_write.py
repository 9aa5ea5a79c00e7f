"""Rotation while keys are written, and decode steps that read every key in one call, against the ops they stand for."""

from __future__ import annotations

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM, KEY_SUM_16, VALUE_SUM
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import native
from foveate.sparse_attn.ops.whole_native import PreparedLayer, PreparedStep
from foveate.sparse_attn.protocol import AttentionSpec, Phase, StepGroup, StepState
from foveate.sparse_attn.selection import Band

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

CPU = torch.device("cpu")
STATS = (KEY_SUM, KEY_MIN, KEY_MAX, VALUE_SUM, KEY_SUM_16)
# Both compute in float32 and round once, in another order of additions: measured 2e-7 and one step of bfloat16.
CLOSE = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}


def rotation(tokens: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(tokens)[:, None] * torch.logspace(0, -3, width // 2)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [None, torch.int8], ids=["full", "int8"])
@pytest.mark.parametrize(("dim", "width"), [(64, 64), (80, 32), (128, 128)])
@pytest.mark.parametrize("tokens", [1, 50])
def test_native_rotates_and_writes_what_torch_does(dtype, stored, dim, width, tokens):
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn(tokens, 10, dim, generator=generator).to(dtype)
    cos, sin = rotation(tokens, width, dtype)
    slots = torch.arange(19, 19 + tokens)
    pools = [PagePool(CacheGeometry(1, 2, dim, 16, 6, stored or dtype), STATS) for _ in range(2)]
    queries = []
    for backend, pool in zip(("torch", "native"), pools, strict=True):
        query, key, value = joint.clone().split_with_sizes([6, 2, 2], 1)
        queries.append(ops.rotate_write_kv(query, key, value, cos, sin, pool.layer(0), slots, backend=backend))
    torch.testing.assert_close(queries[1], queries[0], **CLOSE[dtype])
    torch.testing.assert_close(queries[0][..., width:], joint[:, :6, width:], rtol=0, atol=0)
    pages, offsets = slots // 16, slots % 16
    want, got = (pool.layer(0).key_rows()[pages, :, offsets] for pool in pools)
    if stored is None:
        torch.testing.assert_close(got, want, **CLOSE[dtype])
    else:  # a last bit of float32 may move a key by a step of int8
        steps = pools[0].layer(0).key_scales[pages, :, offsets][..., None]
        assert bool(((got - want).abs() <= (2.0 if dtype is torch.bfloat16 else 1.01) * steps).all())
    assert torch.equal(*(pool.layer(0).value_rows()[pages, :, offsets] for pool in pools))
    for stat in STATS:
        want, got = (pool.layer(0).stats[stat][pages] for pool in pools)
        torch.testing.assert_close(
            got, want, rtol=0, atol=16 * (0.1 if stored else 2**-6) if stored or dtype is torch.bfloat16 else 1e-5
        )


def test_a_rotation_that_the_kernels_do_not_know_is_left_to_torch():
    pool = PagePool(CacheGeometry(1, 1, 16, 16, 2, torch.float32))
    query, key, value = (
        torch.randn(3, 4, 2, 16).split_with_sizes([1, 1, 1])[0][0],
        torch.randn(4, 1, 16),
        torch.randn(4, 1, 16),
    )
    cos, sin = rotation(4, 8, torch.float32)
    out = ops.rotate_write_kv(query, key, value, cos, sin, pool.layer(0), torch.arange(4), backend="native")
    torch.testing.assert_close(out, ops.write.rotate_halves(query, cos, sin))


def test_shapes_that_do_not_fit_are_refused():
    pool = PagePool(CacheGeometry(1, 1, 16, 16, 2, torch.float32))
    rows = torch.ones(4, 1, 16)
    cos, sin = rotation(4, 16, torch.float32)
    with pytest.raises(ValueError, match="do not fit key"):
        ops.rotate_write_kv(rows, rows, rows, cos[:3], sin[:3], pool.layer(0), torch.arange(4))
    with pytest.raises(ValueError, match="do not fit pages"):
        ops.rotate_write_kv(rows, rows, rows, cos, sin, pool.layer(0), torch.arange(3))


SPECS = {
    "causal": AttentionSpec(0.2),
    "window": AttentionSpec(0.2, softcap=2.0, band=Band(0, 37)),
    "sinks": AttentionSpec(0.2, sinks=torch.tensor([0.5, -2.0, 100.0, 1.0])),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("rotates", [True, False], ids=["rotated", "as-is"])
def test_a_prepared_layer_does_what_the_ops_do(spec, stored, rotates):
    heads, kv_heads, dim, contexts = 4, 2, 32, [70, 5, 33]
    generator = torch.Generator().manual_seed(1)
    pools = [PagePool(CacheGeometry(1, kv_heads, dim, 16, 12, stored), STATS) for _ in range(2)]
    tables = [[7, 1, 3, 9, 4], [0], [2, 8, 5]]
    past = torch.randn(2, 12 * 16, kv_heads, dim, generator=generator)
    joint = torch.randn(3, heads + 2 * kv_heads, dim, generator=generator)
    cos, sin = rotation(3, dim, torch.float32)
    slots = torch.tensor([table[(n - 1) // 16] * 16 + (n - 1) % 16 for table, n in zip(tables, contexts, strict=True)])
    outs, reads = [], []
    for fused, pool in zip((False, True), pools, strict=True):
        pages = pool.layer(0)
        ops.write_kv(past[0], past[1], pages, torch.arange(12 * 16))
        rows = Rows.build(tables, contexts, [1, 1, 1], CPU)
        group = StepGroup(None, Phase.DECODE, 0, rows, (2, 0, 1))
        step = StepState(pool, slots, torch.tensor(contexts) - 1, [group], None, torch.zeros(3, 2, dtype=torch.float64))
        query, key, value = joint.clone().split_with_sizes([heads, kv_heads, kv_heads], 1)
        if fused:
            prepared = PreparedStep.of(step, heads, torch.float32, cos[None], sin[None])
            assert prepared is PreparedStep.of(step, heads, torch.float32, cos[None], sin[None])
            strides = query.stride(0), key.stride(0), value.stride(0)
            layer = PreparedLayer(pages, spec, rotates, strides)
            assert layer.is_for(pages, strides)
            assert not layer.is_for(pages, (heads * dim, kv_heads * dim, strides[2]))
            assert not layer.is_for(pools[0].layer(0), strides)
            outs.append(layer.run(prepared, query, key, value).view(3, heads, dim))
            reads = step.keys_read.tolist()
        else:
            if rotates:
                query = ops.rotate_write_kv(query, key, value, cos, sin, pages, slots)
            else:
                ops.write_kv(key, value, pages, slots)
            outs.append(ops.decode(query, PagedView(pages, rows), None, spec)[0])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-6, atol=1e-6)
    seen = [heads * min(context, spec.band.farthest or context) for context in contexts]
    assert reads == [[seen[1]] * 2, [seen[2]] * 2, [seen[0]] * 2]


def test_steps_that_need_more_than_the_kernels_do_are_not_prepared():
    pool = PagePool(CacheGeometry(1, 1, 16, 16, 2, torch.float32))
    rows = Rows.build([[0]], [3], [3], CPU)
    read = torch.zeros(1, 2, dtype=torch.float64)
    step = StepState(
        pool, torch.arange(3), torch.arange(3), [StepGroup(None, Phase.PREFILL, 0, rows, (0,))], None, read
    )
    assert PreparedStep.of(step, 1, torch.float32, *rotation(3, 16, torch.float32)) is None
