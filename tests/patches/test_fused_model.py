"""A model's layers in one loop: which models are known, and that they make way wherever somebody looks on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

import foveate
from foveate.patches.fused_model import FusedModel
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import library

if library() is None:
    pytest.skip("the native CPU kernels were not built", allow_module_level=True)


def tuned(model: torch.nn.Module, rounded: bool = False) -> torch.nn.Module:
    copied = copy.deepcopy(model).requires_grad_(False)
    for parameter in copied.parameters() if rounded else ():
        parameter.data = parameter.bfloat16().float()
    tune(copied)
    return copied


@pytest.mark.parametrize("rounded", [False, True], ids=["in-parts", "whole"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "olmo2"])
def test_models_known_by_their_parts_are_fused(family, rounded, tiny):
    assert isinstance(tuned(tiny(family), rounded).model.forward, FusedModel)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("granite", {"embedding_multiplier": 12.0}), ("gemma3_text", {}), ("phi3", {}), ("gpt_oss", {})],
)
def test_models_that_do_more_are_left_alone(family, changes, tiny):
    """Granite scales what it embeds, Gemma 3 rotates its layers differently, and the others' layers are not fused."""
    assert "forward" not in tuned(tiny(family, **changes)).model.__dict__


@pytest.fixture
def computed(monkeypatch):
    """Grows whenever a model goes through its own loop."""
    calls: list[int] = []
    compute = FusedModel.compute
    monkeypatch.setattr(FusedModel, "compute", lambda *given: (calls.append(1), compute(*given))[1])
    return calls


class Other(nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states


def replace_module(model):
    model.model.layers[1] = Other()


def replace_forward(model):
    layer = model.model.layers[1]
    before = layer.forward
    layer.forward = lambda *given, **facts: before(*given, **facts)


def cut(model):
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = 1


def look_on(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def ask_the_config(model):
    model.config.output_hidden_states = model.model.config.output_hidden_states = True


@torch.inference_mode()
@pytest.mark.parametrize("change", [replace_module, replace_forward, cut, look_on, ask_the_config])
def test_it_makes_way_for_whoever_changes_or_looks_on(change, tiny, tokens, computed):
    model, ids = tuned(tiny("llama")), tokens(1, 12)
    positions = torch.arange(12)[None]
    with foveate.attach(model):
        model(ids, position_ids=positions, use_cache=False)
        assert computed, "as it is, the model goes through the loop"
        computed.clear()
        change(model)
        model(ids, position_ids=positions, use_cache=False)
    assert not computed


@torch.inference_mode()
def test_it_makes_way_for_tensors_that_it_does_not_know(tiny, tokens, computed):
    """Models that also see pass some on to their text part."""
    model, ids = tuned(tiny("llama")), tokens(1, 12)
    positions = torch.arange(12)[None]
    with foveate.attach(model):
        want = model(ids, position_ids=positions, use_cache=False).logits
        computed.clear()
        got = model(ids, position_ids=positions, use_cache=False, seen=torch.ones(12, dtype=torch.bool)).logits
    assert not computed
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def experts():
    """A model whose head asks its body for what the experts' router said."""
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    chosen = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **heads, **chosen, **ids)).eval()


@torch.inference_mode()
@pytest.mark.parametrize("asked", [False, True], ids=["unasked", "asked"])
def test_every_field_that_a_head_reads_is_there(asked, experts, tokens, computed):
    model, ids = tuned(experts), tokens(1, 12)
    model.config.output_router_logits = asked
    assert isinstance(model.model.forward, FusedModel)
    with foveate.attach(experts):
        want = experts(ids, use_cache=False)
    computed.clear()  # of what tried the model
    with foveate.attach(model):
        got = model(ids, position_ids=torch.arange(12)[None], use_cache=False)
    assert bool(computed) != asked
    assert (got.router_logits is not None) == asked
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
