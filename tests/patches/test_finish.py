"""What follows attention in one call computes what its five parts do."""

from __future__ import annotations

import copy

import pytest
import torch

from foveate.patches.decoder_layer import fused_layers
from foveate.patches.finish import NativeFinish
from foveate.patches.glu import NativeGlu
from foveate.patches.narrow import NarrowProduct, NarrowWeight
from foveate.patches.native_product import MOST_ROWS
from foveate.patches.norm_native import NativeNorm
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import library

if library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

WIDTH, HEADS, INNER = 40, 48, 72


def product(channels: int, depth: int, bias: bool = False) -> NarrowProduct:
    weight = torch.randn(channels, depth) / depth**0.5
    return NarrowProduct(NarrowWeight.of(weight.bfloat16().float(), torch.randn(channels) if bias else None))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 32])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_one_call_equals_its_parts(activation, rows, bias):
    output, gates, down = (product(*shape, bias) for shape in ((WIDTH, HEADS), (2 * INNER, WIDTH), (WIDTH, INNER)))
    norm, glu = NativeNorm(torch.rand(WIDTH) + 0.5, 1e-5, False), NativeGlu(activation)
    attended, x = torch.randn(rows, HEADS), torch.randn(rows, WIDTH)
    kept = x.clone()
    out = NativeFinish(output, norm, gates, glu, down)(attended, x)
    through = output(attended, x)
    expected = down(glu(gates(norm(through))), through)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert torch.equal(x, kept)


def test_parts_that_do_not_follow_on_each_other_are_refused():
    norm, glu = NativeNorm(torch.ones(WIDTH), 1e-5, False), NativeGlu("silu")
    with pytest.raises(ValueError, match="do not follow"):
        NativeFinish(product(WIDTH, HEADS), norm, product(INNER, WIDTH), glu, product(WIDTH, INNER))


@torch.inference_mode()
def test_layers_of_a_bfloat16_checkpoint_take_it_for_few_rows(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    for parameter in model.parameters():
        parameter.data = parameter.bfloat16().float()
    tune(model)
    layers = list(fused_layers(model))
    assert len(layers) == len(model.model.layers)
    config = model.config
    attended = torch.randn(MOST_ROWS + 1, config.num_attention_heads * config.head_dim)
    x = torch.randn(MOST_ROWS + 1, config.hidden_size)
    for layer in layers:
        assert layer._finish_few is not None
        few = torch.cat([layer.finish(attended[:8], x[:8]), layer.finish(attended[8:], x[8:])])
        torch.testing.assert_close(few, layer.finish(attended, x), rtol=1e-5, atol=1e-6)
