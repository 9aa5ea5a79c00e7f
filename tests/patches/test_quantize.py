"""Quantised linear layers: kernels against the reference of the same rounding, and models against themselves before."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from foveate.patches import linear_native, linear_torch
from foveate.patches.errors import QuantizationError
from foveate.patches.fingerprint import fingerprint
from foveate.patches.linear_weights import BLOCK, Int4Weight, Int8Weight
from foveate.patches.quantize import KINDS, QuantizedLinear, quantize
from foveate.sparse_attn.ops import native

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (rows, K, N): one row, few, more than a tile, several items, and every remainder by 4, 16, 32 and 64 channels.
SHAPES = {
    "decode": (1, 576, 576),
    "batch": (5, 192, 70),
    "odd": (3, 100, 33),
    "tiles": (33, 96, 80),
    "chunks": (70, 1536, 48),
    "long": (300, 64, 17),
    "wide": (40, 4864, 32),
    "thirteen": (13, 600, 33),
    "fifteen": (15, 1537, 257),
    "pieces": (199, 1600, 300),
}
# Largest error against the reference, of outputs around 1. Sums of many products round in float32; 2^-8 is half a
# step of bfloat16 at 2 to 4.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
# Root mean square error against the unquantised layer, relative to its output. Uniform rounding of normal weights by
# 1/254 and 1/30 of about 6 deviations, and of activations by 1/254 of about 6, gives 0.007, 0.058 and 0.007.
RELATIVE_ERROR = {"int8": 0.016, "int8wo": 0.011, "int4": 0.085, "int4wo": 0.085}


def made(rows: int, depth: int, channels: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(rows + depth + channels)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = torch.randn(channels, depth, generator=generator) / depth**0.5
    bias = functional.pad(torch.randn(channels, generator=generator), (0, -channels % BLOCK))
    return x, weight, bias


@pytest.fixture(params=getattr(native.library(), "linear_isas", ()))
def isa(request):
    return request.param


def takes_bytes(isa: str, rows: int, weight: Int4Weight | None = None) -> bool:
    """Are 4-bit weights multiplied as bytes?"""
    return isa != "avx2" and rows >= 64 and (weight is None or weight.fits_bytes)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_kernels_equal_the_reference(isa, kind, shape, dtype, biased):
    x, weight, bias = made(*shape, dtype)
    form, bits = KINDS[kind]
    quantized = form.of(weight)
    got = linear_native.NativeLinear(quantized, bias if biased else None, bits, isa=isa)(x)
    fewest = {"int4wo": linear_native.WIDEN_ROWS}
    if isa == "amx" and dtype == torch.bfloat16:
        fewest["int4"] = linear_native.TILE_WIDEN_ROWS
    if kind in fewest and len(x) >= fewest[kind]:  # x is not rounded then
        want = functional.linear(x.float(), quantized.exact(), bias[: len(weight)] if biased else None).to(dtype)
    else:
        as_bytes = kind == "int4" and takes_bytes(isa, len(x), quantized)
        want = linear_torch.linear(x, quantized, bias if biased else None, bits, as_bytes=as_bytes)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_sums_of_8_bits_are_exact(isa):
    """Scales that are powers of two leave whole numbers, so nothing may be rounded."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randint(-127, 128, (40, 512), generator=generator).float() for _ in range(2))
    x[:, 0] = weight[:, 0] = 127
    got = linear_native.NativeLinear(Int8Weight.of(weight), None, 8, isa=isa)(x)
    assert torch.equal(got, x @ weight.T)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_larger_tensor_and_zeros_and_nan(isa, kind, rows):
    x, weight, _ = made(rows, 128, 32)
    x = torch.cat([x, x], dim=1)[:, 64:192]
    x[0], x[1, 5] = 0, torch.nan
    form, bits = KINDS[kind]
    got = linear_native.NativeLinear(form.of(weight), None, bits, isa=isa)(x)
    assert bool((got[0] == 0).all())
    assert bool(got[1].isnan().all())
    assert bool(got[2:].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_shows(isa, kind):
    x, weight, _ = made(3, 64, 16)
    x[1, 7] = -torch.inf
    form, bits = KINDS[kind]
    got = linear_native.NativeLinear(form.of(weight), None, bits, isa=isa)(x)
    assert not bool(got[1].isfinite().any())
    assert bool(got[[0, 2]].isfinite().all())


def test_widened_weight_is_the_exact_one(isa):
    weight = Int4Weight.of(made(1, 100, 33)[1])
    assert torch.equal(linear_native.NativeLinear(weight, None, 16, isa=isa).widen(torch.float32), weight.exact())


def test_many_rows_of_4_bits_are_computed_as_few(isa):
    rows = 63 if takes_bytes(isa, 67) else 67  # cut into items, the last of which has few rows, after whole panels
    x, weight, _ = made(rows, 1600, 48)
    linear = linear_native.NativeLinear(Int4Weight.of(weight), None, 8, isa=isa)
    many = linear(x)
    for few in (1, 4):
        assert torch.equal(many, torch.cat([linear(part) for part in x.split(few)]))


@pytest.mark.parametrize(("factor", "fits"), [(1, True), (8, True), (30, False), (100, False)])
def test_weights_beside_an_outlier_are_no_bytes(isa, factor, fits):
    """One unit for 512 channels would be as coarse as the outlier is large."""
    x, weight, _ = made(70, 1024, 48)
    weight[:, 5] *= factor
    quantized = Int4Weight.of(weight)
    assert quantized.fits_bytes == fits
    got = linear_native.NativeLinear(quantized, None, 8, isa=isa)(x)
    want = linear_torch.linear(x, quantized, None, 8, as_bytes=takes_bytes(isa, 70, quantized))
    assert bool(((got - want).abs() <= 3e-4 * want.abs().amax(0)).all())
    added = (quantized.as_bytes() - weight).square().sum() / (quantized.exact() - weight).square().sum() - 1
    assert bool(added <= 0.12) == fits


def test_rows_multiplied_as_bytes_are_the_same_in_any_call(isa):
    x, weight, _ = made(230, 1600, 48)
    linear = linear_native.NativeLinear(Int4Weight.of(weight), None, 8, isa=isa)
    assert torch.equal(linear(x), torch.cat([linear(part) for part in x.split([64, 67, 99])]))


@pytest.mark.parametrize("rows", [2, 40, 70])
def test_steps_of_4_bits_may_be_of_any_size(isa, rows):
    """Groups of 32 whose weights are 1 to 2^-60 times as large, and all of them 0."""
    x, weight, _ = made(rows, 1600, 48)
    weight *= (2.0 ** -torch.arange(50).mul(1.2)).repeat_interleave(32)
    weight[16:32] = weight[16:32].flip(1)
    weight[40] = 0.0
    weight[41] *= 2.0**-30
    quantized = Int4Weight.of(weight)
    got = linear_native.NativeLinear(quantized, None, 8, isa=isa)(x)
    want = linear_torch.linear(x, quantized, None, 8, as_bytes=takes_bytes(isa, rows, quantized))
    assert bool(((got - want).abs() <= 3e-4 * want.abs().amax(0)).all())


@pytest.mark.parametrize("rows", [2, 40, 70])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan], ids=["inf", "nan"])
def test_weights_of_4_bits_that_are_not_numbers_show(isa, rows, bad):
    x, weight, _ = made(rows, 128, 48)
    weight[17, 70] = bad
    got = linear_native.NativeLinear(Int4Weight.of(weight), None, 8, isa=isa)(x)
    assert not bool(got[:, 17].isfinite().any())
    assert bool(got[:, [*range(17), *range(18, 48)]].isfinite().all())


@settings(max_examples=50)
@given(channels=st.integers(1, 40), depth=st.integers(1, 140), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_weights_are_rounded_by_less_than_a_step(channels, depth, scale, seed):
    weight = torch.randn(channels, depth, generator=torch.Generator().manual_seed(seed)) * scale
    eight, four = Int8Weight.of(weight).exact(), Int4Weight.of(weight).exact()
    assert eight.shape == four.shape == weight.shape
    step8 = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((eight - weight).abs() <= 0.501 * step8).all())
    grouped = functional.pad(weight, (0, -depth % 64)).view(channels, -1, 32)
    # The fit may leave the ends of a group outside of its steps; bfloat16 takes up to 2^-8 of the lowest weight.
    step4 = (grouped.amax(2) - grouped.amin(2)) / 15
    error = functional.pad(four - weight, (0, -depth % 64)).view(channels, -1, 32).abs().amax(2)
    assert bool((error <= 1.5 * step4 + 2**-8 * grouped.abs().amax(2)).all())


@pytest.mark.parametrize("rows", [1, 512])
@pytest.mark.parametrize("kind", KINDS)
def test_error_against_the_unquantised_layer(kind, rows):
    x, weight, bias = made(rows, 576, 256)
    layer = nn.Linear(576, 256)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias[:256])
        want = layer(x)
        got = QuantizedLinear(layer, kind)(x[None])[0]
    error = (got - want).square().mean().sqrt() / want.square().mean().sqrt()
    assert error < RELATIVE_ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_without_kernels_torch_computes_the_same(monkeypatch, kind):
    layer = nn.Linear(64, 48)
    x = torch.randn(3, 64)
    fast = QuantizedLinear(layer, kind)(x)
    monkeypatch.setattr(linear_native, "library", lambda: None)
    torch.testing.assert_close(QuantizedLinear(layer, kind)(x), fast, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_model_is_replaced_in_place(tiny_llama, kind, caplog):
    model = copy.deepcopy(tiny_llama)
    known = fingerprint(model)
    with caplog.at_level(logging.INFO, logger="foveate"):
        quantize(model, kind)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 3 * 7 + 1
    assert not [module for module in model.modules() if type(module) is nn.Linear]
    assert model.lm_head.kind == "int8wo"
    spared = "int8wo" if kind.startswith("int4") else kind
    for block in model.model.layers:
        assert {block.self_attn.k_proj.kind, block.self_attn.v_proj.kind} == {spared}
        assert {block.self_attn.q_proj.kind, block.mlp.down_proj.kind} == {kind}
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert "MB of memory instead of" in caplog.text
    assert fingerprint(model) == known
    ids = torch.arange(2, 60)[None]
    with torch.inference_mode():
        want, got = (each(ids, use_cache=False).logits.log_softmax(-1) for each in (tiny_llama, model))
    assert functional.kl_div(got, want, log_target=True, reduction="sum") / ids.numel() < 1e-3


def test_layers_that_choose_experts_stay(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    model.config.num_experts = 96  # what the MLP's inner layers have as outputs here
    quantize(model, "int8")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)


def test_unknown_kind_is_refused(tiny_llama):
    with pytest.raises(QuantizationError, match="no such quantization: 'int3'; there are int8, int8wo, int4, int4wo"):
        quantize(tiny_llama, "int3")


def test_other_devices_are_refused(tiny_llama):
    with pytest.raises(QuantizationError, match="runs on a CPU only, and the model is on meta"):
        quantize(copy.deepcopy(tiny_llama).to("meta"), "int8")


def test_model_without_linear_layers_is_refused(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    quantize(model, "int8")
    with pytest.raises(QuantizationError, match="no linear layers"):
        quantize(model, "int8")
