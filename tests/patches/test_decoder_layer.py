"""Fused decoder layers compute what the stock ones do, and make way wherever somebody looks into a layer's parts."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3MLP

import foveate
from foveate.patches import decoder_layer
from foveate.patches.decoder_layer import FusedLayer, fused_layers
from foveate.patches.glu import NativeGlu, glu, name_of
from foveate.patches.native_decoder import NativeDecoder
from foveate.patches.residual import watch_residual
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import library

if library() is None:
    pytest.skip("the native CPU kernels were not built", allow_module_level=True)

# Families whose layers have the parts that are known; the others are served as they are.
FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3")
OTHERS = ("phi3", "gpt_oss", "cohere")
ISAS = tuple(isa for isa in library().isas if isa in ("avx2", "avx512"))


def tuned(model: torch.nn.Module) -> torch.nn.Module:
    copied = copy.deepcopy(model).requires_grad_(False)
    tune(copied)
    return copied


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """With values of bfloat16, whose linear layers are held so, and whose decode steps take a call per layer."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.bfloat16().float()
    return copied


def logits_of(model: torch.nn.Module, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Of a prompt, and of the tokens behind it one by one."""
    with torch.inference_mode():
        out = model(ids[:, :prompt], use_cache=True)
        parts = [out.logits]
        for place in range(prompt, ids.shape[1]):
            out = model(ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    return torch.cat(parts, dim=1)


@pytest.fixture
def calls(monkeypatch):
    """How often each of the two ways was gone."""
    made = {"fused": 0, "prepared": 0}
    compute, run = FusedLayer.compute, foveate.sparse_attn.ops.whole_native.PreparedLayer.run

    def counted(name, function):
        def count(*args):
            made[name] += 1
            return function(*args)

        return count

    monkeypatch.setattr(FusedLayer, "compute", counted("fused", compute))
    monkeypatch.setattr(foveate.sparse_attn.ops.whole_native.PreparedLayer, "run", counted("prepared", run))
    return made


@pytest.mark.parametrize("family", FUSED)
def test_logits_are_those_of_stock_attention(family, tiny, tokens, calls):
    model, ids = tiny(family), tokens(1, 60)
    faster = tuned(model)
    layers = len(list(fused_layers(faster)))
    assert layers == model.config.num_hidden_layers
    expected = logits_of(model, ids, 50)
    before = calls["fused"]
    with foveate.attach(faster):
        got = logits_of(faster, ids, 50)
    assert calls["fused"] - before == 11 * layers
    assert calls["prepared"] == 10 * layers
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OTHERS)
def test_layers_of_other_parts_are_left_alone(family, tiny):
    assert not list(fused_layers(tuned(tiny(family))))


def test_a_layer_that_computes_something_else_is_left_alone(tiny):
    model = copy.deepcopy(tiny("granite")).requires_grad_(False)
    model.model.layers[1].residual_multiplier = 0.5
    tune(model)
    assert [layer._layer for layer in fused_layers(model)] == [model.model.layers[0], model.model.layers[2]]


def test_projections_that_are_clipped_are_left_alone(tiny, tokens):
    """At what one token reaches, and random rows behind a norm do not."""
    assert len(list(fused_layers(tuned(tiny("olmo"))))) == 3
    model, ids = copy.deepcopy(tiny("olmo", clip_qkv=40.0)).requires_grad_(False), tokens(1, 20)
    reached = model.model.layers[0].input_layernorm(model.model.embed_tokens.weight[ids[0, 0]])
    model.model.layers[0].self_attn.v_proj.weight[0] = reached
    assert reached @ reached > 60
    expected = logits_of(model, ids, 12)
    faster = tuned(model)
    assert not list(fused_layers(faster))
    with foveate.attach(faster):
        torch.testing.assert_close(logits_of(faster, ids, 12), expected, rtol=1e-4, atol=1e-4)


class ClippedAttention(Qwen3Attention):
    def forward(self, *args, **kwargs):
        with self.q_norm.register_forward_hook(lambda _, given, output: output.clamp(-40, 40)):
            return super().forward(*args, **kwargs)


class CappedAttention(Qwen3Attention):
    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return 1000 * (output / 1000).tanh(), weights


class ClippedMLP(Qwen3MLP):
    def forward(self, x):
        up = self.up_proj(x).clamp(-40, 40)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


class ClippedLayer(Qwen3DecoderLayer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).clamp(-1000, 1000)


CLIPPED = {ClippedAttention: "self_attn", CappedAttention: "self_attn", ClippedMLP: "mlp", ClippedLayer: ""}


@pytest.mark.parametrize("kind", CLIPPED, ids=lambda kind: kind.__name__)
def test_a_layer_that_clips_is_left_alone(kind, tiny):
    model = copy.deepcopy(tiny("qwen3")).requires_grad_(False)
    model.model.layers[1].get_submodule(CLIPPED[kind]).__class__ = kind
    tune(model)
    assert [layer._layer for layer in fused_layers(model)] == [model.model.layers[0], model.model.layers[2]]


SCHEMES = [
    "dense",
    {"scheme": "streaming", "budget_tokens": 16},
    {"scheme": "quest", "budget_tokens": 16, "sink_tokens": 4, "window_tokens": 8},
    {"scheme": "exact_topk", "budget_tokens": 16, "sink_tokens": 4, "window_tokens": 8},
    {"scheme": "kascade", "uncalibrated": 2, "budget_tokens": 16, "sink_tokens": 4, "window_tokens": 8},
    {"scheme": "moba", "block_tokens": 16, "top_k": 2, "sparse_decode": True},
    {"scheme": "dhsa", "budget_tokens": 16, "sink_tokens": 4, "window_tokens": 8},
]


@pytest.mark.parametrize("whole", [False, True], ids=["in-parts", "whole"])
@pytest.mark.parametrize("policy", SCHEMES, ids=lambda policy: policy if policy == "dense" else policy["scheme"])
def test_schemes_read_the_same_keys(policy, whole, tiny, tokens):
    model, ids = tiny("qwen2"), tokens(1, 90)
    model = rounded(model) if whole else model
    assert all((layer.whole is not None) == whole for layer in fused_layers(tuned(model)))
    results = []
    for one in (copy.deepcopy(model).requires_grad_(False), tuned(model)):
        with foveate.attach(one, policy) as attached:
            results.append((logits_of(one, ids, 80), attached.keys_read_fraction))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    assert results[1][1] == results[0][1]


TOPK = {"scheme": "exact_topk", "budget_tokens": 8, "sink_tokens": 2, "window_tokens": 4, "dense_first_layers": 0}
MOBA = {"scheme": "moba", "block_tokens": 16, "top_k": 2, "dense_last_layers": 0, "sparse_decode": True}
KASCADE = {**TOPK, "scheme": "kascade", "uncalibrated": 1}
KINDS = {"run": "dense", "ranked": TOPK, "carried": KASCADE, "begin-end": MOBA}
POLICIES = pytest.mark.parametrize("policy", KINDS.values(), ids=KINDS)


@POLICIES
@pytest.mark.parametrize("family", FUSED)
def test_a_layer_in_one_or_two_calls_equals_its_parts(family, policy, tiny, tokens, monkeypatch):
    model, ids = rounded(tiny(family)), tokens(1, 40)
    made = []
    for name in ("run", "begin", "end"):
        owner = decoder_layer if name == "run" else NativeDecoder
        function = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, name=name, function=function: (made.append(name), function(*given))[1]
        )
    faster = tuned(model)
    layers = list(fused_layers(faster))
    known = [layer for layer in layers if layer.whole is not None]
    assert len(known) == (0 if family in ("gemma2", "gemma3_text", "olmo2") else len(layers)), "norms before sums"
    with foveate.attach(faster, policy):
        got = logits_of(faster, ids, 32)
        assert bool(made) == bool(known)
        choosing = [layer for layer in known if policy == MOBA and layer._call.spec.band.farthest is None]
        assert ({"begin", "end"} <= set(made)) == bool(choosing), "layers with a window of their own are read whole"
        for layer in layers:
            layer.whole = None
        expected = logits_of(faster, ids, 32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("batches", [(2, 33, 2), (33, 2)], ids=str)
@POLICIES
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_of_few_and_of_many_rows_take_turns(family, policy, batches, tiny, tokens):
    """Above MOST_ROWS a layer is computed in parts, whose rows lie otherwise."""
    model = rounded(tiny(family)).requires_grad_(False)
    with foveate.attach(copy.deepcopy(model), policy, num_pages=80) as attached:
        expected = [logits_of(attached.model, tokens(batch, 24), 20) for batch in batches]
    faster = tuned(model)
    with foveate.attach(faster, policy, num_pages=80):
        for batch, wanted in zip(batches, expected, strict=True):
            got = logits_of(faster, tokens(batch, 24), 20)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_weights_are_held_once_and_modules_still_work(tiny, tokens):
    model, ids = tiny("llama"), tokens(1, 20)
    faster = tuned(model)
    attention = faster.model.layers[0].self_attn
    shared = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(shared) == 1
    with torch.inference_mode():
        torch.testing.assert_close(faster(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    with foveate.attach(faster), torch.inference_mode():
        faster(ids)
    with torch.inference_mode():  # detached: attention is the model's own again
        torch.testing.assert_close(faster(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_hooks_on_the_parts_of_a_layer_see_what_they_saw(tiny, tokens):
    model, ids = tiny("llama"), tokens(1, 20)
    seen = []
    for one in (copy.deepcopy(model).requires_grad_(False), tuned(model)):
        updates = []
        with (
            foveate.attach(one),
            torch.inference_mode(),
            watch_residual(one, lambda layer, residual, update, into=updates: into.append(update.clone())),
        ):
            one(ids)
        seen.append(torch.stack(updates))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


def test_padded_batches_go_the_stock_way(tiny, tokens, calls):
    model, ids = tiny("llama"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    faster = tuned(model)
    before = calls["fused"]
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask).logits
        with foveate.attach(faster):
            got = faster(ids, attention_mask=mask).logits
    assert calls["fused"] == before
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 37), (40, 1536)], ids=str)
def test_glu_equals_its_reference(isa, activation, dtype, shape):
    rows, width = shape
    joint = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(0)) * 8).to(dtype)
    expected = glu(joint[:, :width], joint[:, width:], activation)
    got = NativeGlu(activation, isa=isa)(joint)
    # The reference takes 1 + tanh, which is off by 2^-24 of the product; measured: 2e-7. In bfloat16 a result
    # between two steps may be rounded to either.
    product = (joint[:, :width].float() * joint[:, width:].float()).abs()
    allowed = 5e-7 * product + (2**-7 * expected.float().abs() if dtype is torch.bfloat16 else 0)
    assert bool(((got.float() - expected.float()).abs() <= allowed).all())


def test_glu_of_extremes():
    joint = torch.tensor([[-1e30, -200.0, 200.0, float("nan"), 1.0, 1.0, 1.0, 1.0]])
    for activation in ("silu", "gelu_tanh"):
        small, least, large, odd = NativeGlu(activation)(joint)[0].tolist()
        assert abs(least) < 1e-30
        assert large == 200.0
        assert odd != odd
        assert abs(small) < 1e-6


def test_activations_are_known_by_what_they_compute():
    assert name_of(torch.nn.SiLU()) == "silu"
    assert name_of(torch.nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert name_of(torch.nn.GELU()) is None
    assert name_of(torch.nn.ReLU()) is None
