"""Decoder layers with quantised weights in one or two calls compute what their parts do."""

from __future__ import annotations

import copy

import pytest
import torch

import foveate
from foveate.patches import decoder_layer
from foveate.patches.decoder_layer import fused_layers
from foveate.patches.native_decoder import NativeDecoder
from foveate.patches.quantize import KINDS, QuantizedLinear, quantize
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import library
from foveate.sparse_attn.schemes.streaming import Streaming

if library() is None or library().linear_isa is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

FAMILIES = ("qwen2", "qwen3", "smollm3")
TOPK = {"scheme": "exact_topk", "budget_tokens": 8, "sink_tokens": 2, "window_tokens": 4, "dense_first_layers": 0}
MOBA = {"scheme": "moba", "block_tokens": 16, "top_k": 2, "dense_last_layers": 0, "sparse_decode": True}
KASCADE = {**TOPK, "scheme": "kascade", "uncalibrated": 1}
CALLS = {"run": "dense", "ranked": TOPK, "carried": KASCADE, "begin-end": MOBA}
POLICIES = pytest.mark.parametrize("policy", CALLS.values(), ids=CALLS)


@torch.inference_mode()
def quantized(model: torch.nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    copied = copy.deepcopy(model).requires_grad_(False).to(dtype)
    quantize(copied, kind)
    tune(copied)
    return copied


@torch.inference_mode()
def steps_of(model: torch.nn.Module, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the tokens behind a prompt, one by one."""
    out = model(ids[:, :prompt], use_cache=True)
    parts = []
    for place in range(prompt, ids.shape[1]):
        out = model(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


def in_parts(model: torch.nn.Module) -> None:
    for layer in fused_layers(model):
        layer.whole = None


@POLICIES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_their_parts(family, kind, policy, tiny, tokens, monkeypatch):
    made = set()
    for name in ("run", "begin", "end"):
        owner = decoder_layer if name == "run" else NativeDecoder
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, name=name, function=function: (made.add(name), function(*given))[1]
        )
    model, ids = quantized(tiny(family), kind), tokens(1, 40)
    assert [layer.whole is not None for layer in fused_layers(model)] == [True] * model.config.num_hidden_layers
    with foveate.attach(model, policy):
        got = steps_of(model, ids, 32)
        assert {"begin", "end"} <= made if policy == MOBA else made == {"run"}
        in_parts(model)
        torch.testing.assert_close(got, steps_of(model, ids, 32), rtol=0, atol=0)


@POLICIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_layer_in_parts_may_stand_between_them(dtype, policy, tiny, tokens):
    if policy == KASCADE and dtype is torch.bfloat16:
        pytest.skip("rounding lets an anchor choose other keys, and all layers read them")
    model, ids = quantized(tiny("qwen2"), "int8wo", dtype), tokens(1, 40)
    layers = list(fused_layers(model))
    results = []
    for odd in (None, *layers):
        wholes = [layer.whole for layer in layers]
        if odd is not None:
            odd.whole = None
        with foveate.attach(model, policy):
            results.append(steps_of(model, ids, 32).float())
        for layer, whole in zip(layers, wholes, strict=True):
            layer.whole = whole
    for other in results[1:]:
        error = float((other - results[0]).norm() / results[0].norm())
        assert error <= (0 if dtype is torch.float32 else 0.1)


@POLICIES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_they_are_as_near_to_float32_as_their_parts(family, kind, policy, tiny, tokens):
    ids = tokens(1, 64)
    rounded = copy.deepcopy(tiny(family)).bfloat16()
    exact, model = quantized(rounded, kind), quantized(rounded, kind, torch.bfloat16)
    assert all(layer.whole is not None for layer in fused_layers(model))
    with foveate.attach(exact, policy):
        expected = steps_of(exact, ids, 32)
    with foveate.attach(model, policy):
        whole = steps_of(model, ids, 32)
        in_parts(model)
        parts = steps_of(model, ids, 32)
    assert whole.dtype is torch.bfloat16

    def error(got: torch.Tensor) -> float:
        return float((got.float() - expected).norm() / expected.norm())

    assert 0 < error(whole) < 0.2
    if policy == "dense":  # otherwise another key is chosen here or there, by both
        assert error(whole) < 1.25 * error(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_few_and_of_many_rows_take_turns(kind, tiny, tokens):
    """From 16 rows on weights of 4 bits are widened, and above 32 all layers are computed in parts."""
    model, in_turns = quantized(tiny("qwen2"), kind), quantized(tiny("qwen2"), kind)
    in_parts(in_turns)
    for batch in (2, 15, 16, 33, 2):
        ids = tokens(batch, 12)
        results = []
        for one in (model, in_turns):
            with foveate.attach(one, TOPK, num_pages=80):
                results.append(steps_of(one, ids, 8))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_joint_weights_are_held_once_and_modules_still_work(kind, tiny):
    plain = copy.deepcopy(tiny("qwen2")).requires_grad_(False)
    quantize(plain, kind)
    model = quantized(tiny("qwen2"), kind)
    for before, after in zip(plain.model.layers, model.model.layers, strict=True):
        x = torch.randn(3, before.mlp.gate_proj.in_features)
        for name, part in before.named_modules():
            if isinstance(part, QuantizedLinear) and part.in_features == x.shape[1]:
                assert torch.equal(after.get_submodule(name)(x), part(x)), name
        gate, up = after.mlp.gate_proj.quantized.values, after.mlp.up_proj.quantized.values
        assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()
        assert gate.untyped_storage().nbytes() == gate.nbytes + up.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_computes_something_else_is_left_alone(kind, dtype, tiny):
    """Also where it adds little to rows of common size."""
    model = copy.deepcopy(tiny("granite"))
    model.model.layers[1].residual_multiplier = 0.5
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data *= 0.02
    model = quantized(model, kind, dtype)
    assert [layer._layer for layer in fused_layers(model)] == [model.model.layers[0], model.model.layers[2]]


def test_what_one_layer_chose_for_all_is_chosen_once(tiny, tokens, monkeypatch):
    chosen = []
    choose = Streaming.select_decode
    monkeypatch.setattr(Streaming, "select_decode", lambda *given: (chosen.append(given[-1].index), choose(*given))[1])
    model = quantized(tiny("qwen2"), "int8")
    with foveate.attach(model, {"scheme": "streaming", "budget_tokens": 16}):
        steps_of(model, tokens(1, 40), 32)
    assert chosen == [0] * 8
