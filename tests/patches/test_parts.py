"""The watch over a forward pass: what it books where, and that nothing of it stays."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import AttentionInterface

import foveate
from foveate.patches import interface, packed, parts
from foveate.patches.decoder_layer import fused_layers
from foveate.patches.parts import PARTS, PartClock, watch_parts
from foveate.patches.quantize import quantize
from foveate.patches.synthetic import synthetic_model
from foveate.patches.tune import tune
from foveate.sparse_attn import attend
from foveate.sparse_attn.ops.native import library

SIZES = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture
def model():
    return synthetic_model("llama", torch.float32, torch.device("cpu"), **SIZES)


@pytest.fixture
def now(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr(parts.time, "perf_counter", lambda: now[0])
    return now


def test_an_inner_part_stops_the_outer_one(now):
    clock = PartClock(torch.device("cpu"))
    clock.enter("attention")
    now[0] = 1.0
    clock.enter("selection")
    now[0] = 3.0
    clock.leave()
    now[0] = 7.0
    clock.leave()
    now[0] = 100.0
    clock.enter("linear")
    now[0] = 100.5
    clock.leave()
    assert clock.seconds == {"attention": 5.0, "selection": 2.0, "linear": 0.5}


def test_a_function_that_raises_is_booked_and_left(now):
    clock = PartClock(torch.device("cpu"))

    def fail():
        now[0] += 2.0
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clock.timed("linear", fail)()
    now[0] += 5.0
    clock.enter("attention")
    assert clock.seconds["linear"] == 2.0


def slow(function, now, seconds=1.0):
    """The function takes so long by the clock of the test; everything else takes no time."""

    def run(*args, **kwargs):
        now[0] += seconds
        return function(*args, **kwargs)

    return run


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "int8"])
def test_parts_of_a_forward_pass_are_found(model, monkeypatch, now, quantized):
    """Each part is made slow in turn, and the time shows up there and nowhere else."""
    if quantized:
        quantize(model, "int8")
    layers = model.config.num_hidden_layers
    ids = torch.arange(40)[None]
    kinds = {
        "attention": (interface.ops, "write_kv", layers),
        "selection": (attend.budget, "keep", 1),  # the other layers read the same
        "linear": (model.model.layers[0].mlp.down_proj, "forward", 1),
        "rest": (model.model.layers[0].input_layernorm, "forward", 0),
    }
    assert set(kinds) == {*PARTS, "rest"}
    with foveate.attach(model, {"scheme": "streaming", "budget_tokens": 16}), torch.inference_mode():
        for part, (owner, name, times) in kinds.items():
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, slow(getattr(owner, name), now))
                with watch_parts(model) as clock:
                    model(ids)
            assert clock.seconds == {one: times * (one == part) for one in PARTS}


def test_nothing_stays(model):
    choose = attend.segments_of
    with foveate.attach(model, "streaming"), torch.inference_mode():
        with contextlib.suppress(RuntimeError), watch_parts(model):
            assert attend.segments_of is not choose
            assert AttentionInterface()[interface.NAME] is not interface.paged_attention
            raise RuntimeError("stop")
        assert attend.segments_of is choose
        assert AttentionInterface()[interface.NAME] is interface.paged_attention
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in list(model.modules())[1:])


def test_weights_come_from_the_seed(model):
    again = synthetic_model("llama", torch.float32, torch.device("cpu"), **SIZES)
    other = synthetic_model("llama", torch.float32, torch.device("cpu"), seed=1, **SIZES)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert not model.training


class Fused(torch.nn.Module):
    """Computes with its children's weights, and does not call them."""

    def __init__(self, mlp):
        super().__init__()
        self.up, self.down = mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return torch.nn.functional.linear(torch.nn.functional.linear(x, self.up.weight), self.down.weight)


def test_a_fused_mlp_is_linear_and_an_attention_module_is_not(model, now):
    for layer in model.model.layers:
        layer.mlp = Fused(layer.mlp)
        layer.mlp.forward = slow(layer.mlp.forward, now, 3.0)
        layer.self_attn.forward = slow(layer.self_attn.forward, now, 50.0)
    with foveate.attach(model), torch.inference_mode(), watch_parts(model) as clock:
        model(torch.arange(20)[None])
    assert clock.seconds == {"attention": 0, "selection": 0, "linear": 6.0}


def test_a_tuned_mlp_is_linear(now):
    model = synthetic_model("llama", torch.bfloat16, torch.device("cpu"), **SIZES)
    if not packed.supports(model):
        pytest.skip("layers are packed on CPUs with bfloat16 instructions only")
    tune(model)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, packed.GatedMLP)
    mlp.up_proj.times = slow(mlp.up_proj.times, now, 3.0)
    with foveate.attach(model), torch.inference_mode(), watch_parts(model) as clock:
        model(torch.arange(20)[None])
    assert clock.seconds == {"attention": 0, "selection": 0, "linear": 3.0}


@pytest.mark.skipif(library() is None, reason="the native CPU kernels were not built")
@pytest.mark.parametrize("policy", ["dense", {"scheme": "quest", "budget_tokens": 16}])
def test_fused_layers_are_timed_by_their_pieces(model, now, policy):
    tune(model)
    layers = list(fused_layers(model))
    assert len(layers) == model.config.num_hidden_layers
    kept = [layer.finish for layer in layers]
    for layer in layers:
        layer.project, layer.read = slow(layer.project, now, 3.0), slow(layer.read, now, 50.0)
    with foveate.attach(model, policy), torch.inference_mode(), watch_parts(model) as clock:
        model(torch.arange(20)[None])
    seconds = {"attention": 50.0 * len(layers), "selection": 0, "linear": 3.0 * len(layers)}
    assert clock.seconds == seconds
    assert [layer.finish for layer in layers] == kept
