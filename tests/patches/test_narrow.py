"""Weights held in bfloat16 give what float32 layers give, and only where nothing is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.patches import narrow, products
from foveate.patches.decoder_layer import fused_layers
from foveate.patches.fingerprint import weights_digest
from foveate.patches.narrow import NarrowLinear, NarrowProduct, NarrowWeight
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import library

if library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

ISAS = [isa for isa in library().isas if isa in ("avx2", "avx512")]


def bfloat16_values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16().float()


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=80)
@given(
    rows=st.integers(0, 15) | st.sampled_from([191, 192, 193, 400]),
    depth=st.integers(1, 70) | st.sampled_from([511, 512, 513, 1030]),
    channels=st.integers(1, 90),
    bias=st.booleans(),
    residual=st.booleans(),
    threads=st.integers(1, 3),
)
def test_product_equals_the_reference(isa, rows, depth, channels, bias, residual, threads):
    dense = bfloat16_values(channels, depth)
    weight = NarrowWeight.of(dense, torch.randn(channels) if bias else None)
    assert torch.equal(weight.dense(), dense)
    # rows that are apart, as those of a joint product's halves are
    x, added = torch.randn(rows, depth + 3)[:, :depth], torch.randn(rows, channels + 5)[:, :channels]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = NarrowProduct(weight, isa=isa)(x, added if residual else None)
    finally:
        torch.set_num_threads(before)
    exact = x.double() @ dense.double().t()
    exact += weight.bias[:channels].double() if bias else 0
    exact += added.double() if residual else 0
    assert out.shape == (rows, channels)
    # Sums of 512 in a row: each rounding is 6e-8 of the sum so far.
    assert bool(((out.double() - exact).abs() <= 1e-6 * (1 + x.abs().double() @ dense.abs().double().t())).all())
    torch.testing.assert_close(
        out, narrow.linear(x, weight, added if residual else None), rtol=2e-5, atol=2e-5 * depth**0.5
    )


def test_what_is_not_finite_stays_with_its_row():
    weight = NarrowWeight.of(bfloat16_values(40, 33))
    x = torch.randn(9, 33)
    x[4, 32], x[8, 0] = torch.nan, torch.inf
    out = NarrowProduct(weight)(x)
    assert out[4].isnan().all()
    assert not out[8].isfinite().any()
    assert out[[0, 1, 2, 3, 5, 6, 7]].isfinite().all()


def test_another_width_or_type_is_refused():
    product = NarrowProduct(NarrowWeight.of(bfloat16_values(16, 24)))
    with pytest.raises(TypeError, match=r"float32 \[M, 24\], not of torch.float32 \[2, 23\]"):
        product(torch.randn(2, 23))
    with pytest.raises(TypeError, match="bfloat16"):
        product(torch.randn(2, 24).bfloat16())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_joined_layers_share_their_weights(bias):
    layers = [nn.Linear(48, channels, bias=bias) for channels in (64, 16, 32)]
    for layer in layers:
        layer.weight.data = layer.weight.bfloat16().float()
    parts = [NarrowLinear(layer) for layer in layers]
    assert narrow.joinable(parts)
    product = products.joined(parts)
    x = torch.randn(5, 48)
    torch.testing.assert_close(product(x), torch.cat([layer(x) for layer in layers], 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[1](x[None, None]), layers[1](x)[None, None], rtol=1e-5, atol=1e-5)
    storages = {part.narrow.panels.untyped_storage().data_ptr() for part in parts}
    assert len(storages) == 1


def test_layers_that_end_within_a_panel_are_not_joined():
    assert not narrow.joinable([NarrowLinear(nn.Linear(16, 24)), NarrowLinear(nn.Linear(16, 32))])
    assert not narrow.joinable([NarrowLinear(nn.Linear(16, 32)), NarrowLinear(nn.Linear(16, 32, bias=False))])


@torch.inference_mode()
def test_a_bfloat16_checkpoint_is_narrowed_whole_and_computes_the_same(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    ids = torch.randint(0, model.config.vocab_size, (1, 40))
    expected = model(ids).logits
    tune(model)
    assert [type(part) for part in model.modules() if isinstance(part, nn.Linear)] == []
    assert sum(isinstance(part, NarrowLinear) for part in model.modules()) == 7 * len(model.model.layers) + 1
    assert len(list(fused_layers(model))) == len(model.model.layers)
    assert model.dtype is torch.float32
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_the_digest_tells_every_narrow_weight(tiny_llama):
    """Pages on disk are named by it: those of a model that differs in one weight must not be taken for its own."""
    model = copy.deepcopy(tiny_llama)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    other.model.layers[0].mlp.down_proj.weight[5, 3] += 1
    for each in (model, same, other):
        tune(each)
    assert weights_digest(model) == weights_digest(same) != weights_digest(other)


@torch.inference_mode()
def test_a_weight_that_would_lose_digits_stays(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    assert not narrow.exact(model.model.layers[0].mlp.up_proj.weight)
    tune(model)
    assert not any(isinstance(part, NarrowLinear) for part in model.modules())
