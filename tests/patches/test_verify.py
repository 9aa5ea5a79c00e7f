"""The check at load lets sound families in and keeps broken ones out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import foveate.patches.interface as interface
from foveate.patches.attach import attach
from foveate.patches.errors import AttachError, UnsupportedModel
from foveate.patches.families import VERIFIED
from foveate.patches.verify import try_pass, verify

WAYS = ["one-shot prefill", "chunked prefill", "decode", "two packed sequences"]


@pytest.fixture
def broken(monkeypatch):
    """Registers an attention function with one argument changed."""

    def install(**changes):
        real = interface.paged_attention
        monkeypatch.setattr(interface, "paged_attention", lambda *args, **kw: real(*args, **{**kw, **changes}))

    yield install
    monkeypatch.undo()
    interface.register()


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
def test_sound_families_pass(family, tiny):
    model = tiny(family)
    report = verify(model)
    report.raise_on_failure()
    assert report.passed
    assert list(report.differences) == WAYS
    assert 0 < report.largest < 1e-5
    assert (family in VERIFIED) == (family == "gemma2")
    assert "passed" in str(report)
    assert model.config._attn_implementation == "eager"


def test_bfloat16_passes_at_its_own_tolerance(config):
    from transformers import GraniteForCausalLM

    torch.manual_seed(0)
    report = verify(GraniteForCausalLM(config("granite")).bfloat16())
    assert report.passed
    assert report.dtype is torch.bfloat16
    assert 1e-4 < report.largest < report.tolerance


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("granite", {"scaling": 0.25}, id="wrong scale"),
        pytest.param("mistral", {"sliding_window": None}, id="window lost"),
        pytest.param("gpt_oss", {"s_aux": None}, id="sinks lost"),
        pytest.param("gemma2", {"softcap": None}, id="soft cap lost"),
    ],
)
def test_broken_attention_is_refused(family, changes, tiny, broken, monkeypatch):
    monkeypatch.setattr(interface, "check_window", lambda *_: None)  # which would refuse it first
    broken(**changes)
    report = verify(tiny(family))
    assert not report.passed
    assert report.largest > report.tolerance
    with pytest.raises(UnsupportedModel, match="does not give the same logits"):
        report.raise_on_failure()


def test_what_is_raised_under_our_attention_is_the_report(tiny, broken):
    broken(foveate_step=None)
    report = verify(tiny("granite"))
    assert "needs a step" in report.error
    with pytest.raises(UnsupportedModel, match="needs a step"):
        report.raise_on_failure()
    assert tiny("granite").config._attn_implementation == "eager"


def test_long_windows_are_said_to_be_untested(config):
    from transformers import MistralForCausalLM

    report = verify(MistralForCausalLM(config("mistral", sliding_window=4096)))
    assert report.passed
    assert report.untested_window == 4096
    assert "4096 tokens: longer than the test" in str(report)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("phimoe", {"num_local_experts": 4}),
        ("qwen2_moe", {"num_experts": 4, "use_sliding_window": True, "max_window_layers": 1}),
    ],
    ids=["phimoe", "qwen2_moe"],
)
def test_a_long_window_in_the_mask_alone_is_refused(family, more, tokens):
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = AutoConfig.for_model(family, **sizes, **heads, **ids, sliding_window=4096, **more)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    report = verify(model)
    assert not report.passed
    assert "a sliding window of None in layer" in report.error
    with attach(model), pytest.raises(UnsupportedModel, match=r"sliding window of None in layer \d .* names 4096"):
        model(tokens(1, 8))


def test_nan_fails(config):
    from transformers import GraniteForCausalLM

    model = GraniteForCausalLM(config("granite")).eval()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    report = verify(model)
    assert not report.passed
    assert set(report.differences.values()) == {math.inf}


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_what_is_changed_is_compared_with_what_it_was(factor, tiny):
    """Also what stock and paged attention have in common."""
    model = copy.deepcopy(tiny("granite")).requires_grad_(False)

    def change(given):
        assert given is model
        given.model.layers[1].mlp.up_proj.weight *= factor

    report = verify(model, change)
    assert report.passed == (factor == 1.0)
    assert (report.largest > 1e-3) == (factor != 1.0)


def test_training_mode_comes_back(config):
    from transformers import GraniteForCausalLM

    model = GraniteForCausalLM(config("granite", attention_dropout=0.5)).train()
    assert verify(model).passed
    assert model.training


@pytest.mark.parametrize("check", [verify, try_pass])
def test_an_attached_model_is_refused(check, tiny):
    with attach(tiny("granite")), pytest.raises(AttachError):
        check(tiny("granite"))


def test_a_pass_is_tried(tiny, broken):
    model = tiny("granite")
    try_pass(model)
    assert model.config._attn_implementation == "eager"
    broken(foveate_step=None)
    with pytest.raises(UnsupportedModel, match=r"granite does not run on paged attention: .*needs a step"):
        try_pass(model)
    assert model.config._attn_implementation == "eager"
