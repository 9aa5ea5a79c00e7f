"""Packed linear layers, fused MLPs and compiled norms compute what they replace, and leave alone what they cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Gemma3TextConfig, GptOssConfig, GptOssForCausalLM, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from foveate.patches import packed
from foveate.patches.fingerprint import fingerprint, weights_digest
from foveate.patches.norm_native import NativeNorm, replace_norms
from foveate.patches.packed import GatedMLP, PackedLinear, _activation_of, supports
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import Library, library

needs_kernels = pytest.mark.skipif(library() is None, reason="the native CPU kernels were not built")
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU"
)
ISAS = ("avx2",) if library() is None else tuple(isa for isa in library().isas if isa in ("avx2", "avx512"))
ROUNDING = 2**-8  # of bfloat16, relative


def exact_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, from_one: bool) -> torch.Tensor:
    """The definition in float64, nothing rounded."""
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight + from_one)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 130),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    from_one=st.booleans(),
    magnitude=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_norm_equals_its_definition(isa, rows, width, dtype, from_one, magnitude):
    x = (torch.randn(rows, width) * magnitude).to(dtype)
    weight = torch.randn(width).to(dtype)
    out = NativeNorm(weight, 1e-6, from_one, isa=isa)(x)
    exact = exact_norm(x, weight, 1e-6, from_one)
    assert out.dtype is dtype
    # Two roundings to bfloat16; in float32 the sum's own error comes on top.
    allowed = 2.02 * ROUNDING if dtype is torch.bfloat16 else 2e-6
    assert bool(((out.double() - exact).abs() <= allowed * exact.abs() + 1e-30).all())


@needs_kernels
def test_norm_reads_rows_that_are_apart_and_any_leading_shape():
    weight = torch.randn(24)
    wide = torch.randn(2, 3, 48)
    norm = NativeNorm(weight, 1e-5, False)
    torch.testing.assert_close(norm(wide[..., :24]), norm(wide[..., :24].contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(norm(wide[..., ::2]), norm(wide[..., ::2].contiguous()), rtol=0, atol=0)


@needs_kernels
def test_norm_passes_on_what_is_not_finite():
    x = torch.ones(3, 20)
    x[1, 7] = torch.nan
    out = NativeNorm(torch.ones(20), 1e-6, False)(x)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@needs_kernels
def test_norm_refuses_another_width_or_type():
    norm = NativeNorm(torch.ones(16), 1e-6, False)
    with pytest.raises(TypeError, match="a norm of 16"):
        norm(torch.ones(2, 17))
    with pytest.raises(TypeError, match="bfloat16"):
        norm(torch.ones(2, 16).bfloat16())


@needs_kernels
def test_norms_are_replaced_by_what_they_compute():
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) / 2

    model = nn.ModuleDict({"llama": LlamaRMSNorm(32), "gemma": Gemma3RMSNorm(32), "halved": HalfRMSNorm(32)})
    for norm in model.values():
        nn.init.normal_(norm.weight)
    model.device, model.dtype = torch.device("cpu"), torch.float32
    x = torch.randn(5, 32)
    before = {name: norm(x) for name, norm in model.items()}
    replace_norms(model)
    assert {name for name, norm in model.items() if isinstance(norm, NativeNorm)} == {"llama", "gemma"}
    for name, norm in model.items():
        torch.testing.assert_close(norm(x), before[name], rtol=2e-6, atol=1e-7)


@needs_kernels
def test_norms_that_a_checkpoint_keeps_in_float32_are_left_alone(tmp_path):
    """Of gpt-oss in float16, whose norms get and give float16."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    config = GptOssConfig(vocab_size=101, hidden_size=64, intermediate_size=64, pad_token_id=0, **heads, **experts)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    model = GptOssForCausalLM.from_pretrained(tmp_path, dtype=torch.float16).eval().requires_grad_(False)
    assert model.dtype is torch.float16
    assert model.model.norm.weight.dtype is torch.float32
    ids = torch.arange(1, 31)[None]
    expected = model(ids).logits
    tune(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 3, 64, 600])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_packed_linear_equals_the_linear(rows, bias):
    linear = nn.Linear(72, 40, bias=bias).bfloat16()
    x = torch.randn(2, rows, 72).bfloat16()
    with torch.inference_mode():
        out = PackedLinear(linear)(x)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    # The sum of 72 products in float32, rounded once.
    assert bool(((out.double() - exact).abs() <= 1.01 * ROUNDING * exact.abs() + 1e-5).all())


MLPS = {
    "silu": lambda: LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=80, hidden_act="silu")),
    "gelu_tanh": lambda: Gemma3MLP(
        Gemma3TextConfig(hidden_size=64, intermediate_size=80, hidden_activation="gelu_pytorch_tanh")
    ),
    "gelu": lambda: LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=80, hidden_act="gelu")),
}


def packed_mlp(name: str) -> tuple[nn.Module, nn.Module]:
    mlp = MLPS[name]().bfloat16().requires_grad_(False)
    copied = copy.deepcopy(mlp)
    for part in ("gate_proj", "up_proj", "down_proj"):
        setattr(copied, part, PackedLinear(getattr(mlp, part)))
    return mlp, copied


@needs_bfloat16
@pytest.mark.parametrize("name", MLPS)
def test_gated_mlp_is_as_close_to_the_exact_one(name):
    mlp, copied = packed_mlp(name)
    x = torch.randn(1, 9, 64).bfloat16() * 3
    with torch.inference_mode():
        # Tanh and exact GELU lie closer together than bfloat16 resolves: either may be found.
        assert _activation_of(copied) in ({"silu"} if name == "silu" else {"gelu", "gelu_tanh"})
        fused = GatedMLP(copied, name)(x).float()
        exact = copy.deepcopy(mlp).float()(x.float())
        error, stock_error = (fused - exact).norm(), (mlp(x).float() - exact).norm()
    assert error <= 1.2 * stock_error


@needs_bfloat16
def test_an_mlp_of_another_kind_is_left_alone():
    _, copied = packed_mlp("silu")
    copied.act_fn = nn.ReLU()
    with torch.inference_mode():
        assert _activation_of(copied) is None


class ClippedMLP(LlamaMLP):
    limit = float("inf")

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x)).clamp(max=self.limit)
        return self.down_proj(gate * self.up_proj(x).clamp(min=-self.limit, max=self.limit))


@pytest.fixture
def plain_products(monkeypatch):
    """What oneDNN's products compute, on any CPU."""
    acts = {
        "none": lambda x, _: x,
        "swish": lambda x, _: nn.functional.silu(x),
        "gelu": lambda x, kind: nn.functional.gelu(x, approximate=kind),
    }

    def product(x, weight, bias, activation, scalars, algorithm):
        return acts[activation](nn.functional.linear(x, weight, bias), algorithm)

    def times_or_plus(x, other, weight, bias, what):
        out = nn.functional.linear(x, weight, bias)
        return out * other if what == "mul" else out + other

    product.binary = times_or_plus
    monkeypatch.setattr(packed, "_linear", product)
    monkeypatch.setattr(packed, "_pack", lambda weight, rows: weight)


@torch.inference_mode()
def test_an_mlp_that_clips_is_left_alone(plain_products, tiny_llama):
    """Also where it is of one class with others that do not, and at what random rows never reach."""
    model = copy.deepcopy(tiny_llama).bfloat16()
    for layer in model.model.layers:
        layer.mlp.__class__ = ClippedMLP
    model.model.layers[1].mlp.limit = 50.0
    packed.pack(model)
    assert [type(layer.mlp) for layer in model.model.layers] == [GatedMLP, ClippedMLP, GatedMLP]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, tiny_llama):
    if request.param is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    return copy.deepcopy(tiny_llama).to(request.param).requires_grad_(False)


def test_a_tuned_model_computes_the_same(model):
    ids = torch.randint(0, 256, (1, 40))
    stock, known = copy.deepcopy(model), fingerprint(model)
    tune(model)
    with torch.inference_mode():
        ours, theirs = model(ids).logits.float(), stock(ids).logits.float()
        exact = copy.deepcopy(stock).float()(ids).logits
    assert fingerprint(model) == known
    if model.dtype is torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert supports(model)
        assert isinstance(model.model.layers[0].mlp, GatedMLP)
        assert isinstance(model.get_output_embeddings(), PackedLinear)
        assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


@needs_kernels
@pytest.mark.parametrize(("family", "keeps"), [("llama", True), ("phi3", False)], ids=["fused", "its-own-code"])
def test_kernels_keep_threads_of_their_own_where_they_compute_whole_layers(family, keeps, tiny, monkeypatch):
    kept = []
    monkeypatch.setattr(Library, "keep_threads", lambda self: kept.append(self))
    tune(copy.deepcopy(tiny(family)).requires_grad_(False))
    assert kept == [library()] * keeps


def test_the_digest_of_a_tuned_model_tells_its_weights(model):
    other = copy.deepcopy(model)
    other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    same = copy.deepcopy(model)
    for each in (model, other, same):
        tune(each)
    assert weights_digest(model) == weights_digest(same) != weights_digest(other)
