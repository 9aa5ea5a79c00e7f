"""A model's layers in one loop: which models are known, and that they make way wherever somebody looks on."""

from __future__ import annotations

import copy

import pytest
import torch

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


@torch.inference_mode()
def test_whoever_looks_on_sees_the_layers(tiny, tokens):
    model, ids = tuned(tiny("llama")), tokens(1, 12)
    seen = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(seen) == len(model.model.layers) + 1
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert any(model.model.forward._hooks)
    model(ids)
    assert calls


@torch.inference_mode()
def test_a_layer_that_somebody_replaced_is_called(tiny, tokens):
    model, ids = tuned(tiny("llama")), tokens(1, 12)
    layer, calls = model.model.layers[1], []
    before = layer.forward
    layer.forward = lambda *given, **facts: (calls.append(1), before(*given, **facts))[1]
    with foveate.attach(model):
        model(ids, use_cache=False)
    assert calls
