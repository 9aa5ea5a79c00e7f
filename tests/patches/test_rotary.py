"""Queries moved to another position are what the model would have made there."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from foveate.patches.errors import UnsupportedRotary
from foveate.patches.rotary import ModelRotary, plain_angles

POSITIONS = torch.tensor([0, 1, 39, 40, 41, 200, 5000, 100_000])
CAP = 40


def rotated(model, query: torch.Tensor, positions: torch.Tensor, layer_type: str | None) -> torch.Tensor:
    """``[T, H, D]`` rotated by the model's own code."""
    embedding = model.model.rotary_emb
    apply = sys.modules[type(embedding).__module__].apply_rotary_pos_emb
    more = () if layer_type is None else (layer_type,)
    cos, sin = embedding(query, positions[None], *more)
    return apply(query.transpose(0, 1)[None], query.transpose(0, 1)[None], cos, sin)[0][0].transpose(0, 1)


@pytest.mark.parametrize(
    ("family", "layer", "layer_type"),
    [
        pytest.param("llama", 0, None, id="llama"),
        pytest.param("qwen3", 1, None, id="qwen3, mixed layers with one rotary embedding"),
        pytest.param("gemma3_text", 0, "sliding_attention", id="gemma3 sliding"),
        pytest.param("gemma3_text", 1, "full_attention", id="gemma3 full"),
        pytest.param("phi3", 2, None, id="phi3, half of the dims rotate"),
        pytest.param("gpt_oss", 0, None, id="gpt_oss, yarn with a factor on cos and sin"),
        pytest.param("smollm3", 2, None, id="smollm3"),
    ],
)
def test_cap_is_rotation_at_the_capped_position(family, layer, layer_type, tiny, config):
    changes = {}
    if family == "gemma3_text":
        rope = {"rope_type": "default"}
        changes["rope_parameters"] = {
            "sliding_attention": {**rope, "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        }
    model = tiny(family, **changes)
    dim = model.model.layers[0].self_attn.head_dim
    query = torch.randn(len(POSITIONS), 3, dim, generator=torch.Generator().manual_seed(1))
    at_own = rotated(model, query, POSITIONS, layer_type)
    want = rotated(model, query, POSITIONS.clamp(max=CAP), layer_type)
    got = ModelRotary(model).cap(at_own, POSITIONS, CAP, layer)
    assert (got - want).abs().max() < 2e-5
    assert (at_own - want).abs().max() > 0.1
    low = ModelRotary(model).cap(at_own.bfloat16(), POSITIONS, CAP, layer)
    assert low.dtype is torch.bfloat16
    assert (low - want).abs().max() < 0.05


def test_nope_layers_are_left_alone(tiny):
    model = tiny("smollm3")
    assert not model.model.layers[1].self_attn.use_rope
    query = torch.randn(len(POSITIONS), 2, 16)
    assert torch.equal(ModelRotary(model).cap(query, POSITIONS, CAP, 1), query)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        pytest.param("cohere", {}, "does not rotate halves", id="interleaved pairs"),
        pytest.param(
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic change with length",
            id="dynamic",
        ),
        pytest.param(
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                    "factor": 4.0,
                }
            },
            "longrope change with length",
            id="longrope",
        ),
    ],
)
def test_unknown_kinds_give_none_and_a_reason(family, changes, reason, tiny, caplog):
    model = tiny(family, **changes)
    with pytest.raises(UnsupportedRotary, match=reason):
        ModelRotary(model)
    with caplog.at_level(logging.WARNING):
        assert ModelRotary.of(model) is None
    assert reason in caplog.text


def test_layers_that_divide_a_head_by_themselves_are_named():
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=2, rope_parameters=rope))
    with pytest.raises(UnsupportedRotary, match=r"^the layers rotate 16 of the 32 channels of a head, which they"):
        ModelRotary(model)


def test_no_rotary_embedding_at_all(config):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config("llama"))
    model.model.rotary_emb = torch.nn.Identity()
    with pytest.raises(UnsupportedRotary, match="found 0"):
        ModelRotary(model)


def test_frequencies_follow_the_model(config):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config("llama"))
    rotary = ModelRotary(model)
    query = torch.randn(2, 1, 16)
    before = rotary.cap(query, torch.tensor([50, 60]), CAP, 0)
    model.model.rotary_emb.inv_freq *= 0.5
    assert not torch.allclose(rotary.cap(query, torch.tensor([50, 60]), CAP, 0), before)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn", "dynamic", "longrope"])
def test_plain_angles_are_those_of_the_model(kind, tiny):
    facts = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "dynamic": {"factor": 4.0},
        "longrope": {
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 64,
        },
    }[kind]
    rotary = tiny("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **facts}).model.rotary_emb
    angles = plain_angles(rotary)
    assert (angles is rotary) == (kind in ("dynamic", "longrope"))  # their frequencies change with length
    for dtype in (torch.float32, torch.bfloat16):
        x, positions = torch.zeros(1, 3, 64, dtype=dtype), torch.tensor([[0, 17, 5000]])
        for got, want in zip(angles(x, positions), rotary(x, positions), strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, want)
