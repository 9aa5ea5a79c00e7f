"""A causal LM's pass around its fused body: which models are known, and that it makes way for whoever looks on."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import foveate
from foveate.patches.attach import attach_engine
from foveate.patches.fused_causal import FusedCausal
from foveate.patches.interface import PackedStep
from foveate.patches.logit_rows import LogitRows
from foveate.patches.step import build_step
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import library

if library() is None:
    pytest.skip("the native CPU kernels were not built", allow_module_level=True)

ROWS = torch.tensor([3, 11])


def tuned(model):
    copied = copy.deepcopy(model).requires_grad_(False)
    tune(copied)
    return copied


@pytest.fixture
def served(tiny, manager_for):
    """A tuned model on our attention, and what makes the arguments of a pass."""

    def make(family, **changes):
        model = tuned(tiny(family, **changes))
        attach_engine(model)
        manager = manager_for(model)

        def given():
            step = PackedStep(build_step(manager, [(manager.open([], b""), 12)], None))
            return {
                "position_ids": torch.arange(12)[None],
                "use_cache": False,
                "logits_to_keep": ROWS,
                "foveate_step": step,
            }

        return model, given

    return make


@pytest.fixture
def computed(monkeypatch):
    """Grows whenever a model's logits are made here."""
    calls: list[int] = []
    logits = FusedCausal.logits
    monkeypatch.setattr(FusedCausal, "logits", lambda *given: (calls.append(1), logits(*given))[1])
    return calls


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_are_those_of_the_model(family, served, tokens, computed):
    (model, given), ids = served(family), tokens(1, 12)
    assert isinstance(model.forward, FusedCausal)
    computed.clear()  # of what tried the model
    got = model(ids, **given()).logits
    assert len(computed) == 1
    want = type(model).forward(model, ids, **given()).logits
    assert got.shape == (1, 2, model.config.vocab_size)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gemma2", {"final_logit_softcapping": 30.0}), ("gemma3_text", {}), ("phi3", {}), ("gpt_oss", {})],
    ids=["soft-cap", "gemma3", "phi3", "gpt_oss"],
)
def test_models_that_do_more_are_left_alone(family, changes, tiny):
    """Gemma 2 caps its logits, and the bodies of the others are not fused."""
    assert "forward" not in tuned(tiny(family, **changes)).__dict__


def look_at_the_body(model, given):
    model.model.register_forward_hook(lambda *_: None)


def look_at_the_head(model, given):
    model.lm_head.register_forward_pre_hook(lambda *_: None)


def look_at_a_layer(model, given):
    model.model.layers[0].register_forward_hook(lambda *_: None)


def replace_the_body(model, given):
    model.model.forward = type(model.model).forward.__get__(model.model)


class Around(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.embed_tokens = body, body.embed_tokens

    def forward(self, *args, **kwargs):
        return self.body(*args, **kwargs)


def wrap_the_body(model, given):
    model.model = Around(model.model)


def replace_the_head(model, given):
    head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight.data = model.lm_head.weight.data.clone()
    model.set_output_embeddings(head)


def want_one_row(model, given):
    given["logits_to_keep"] = 1


def want_everything(model, given):
    given["logits_to_keep"] = 0


def want_hidden_states(model, given):
    given["output_hidden_states"] = True


def mask(model, given):
    given["attention_mask"] = torch.ones(1, 12, dtype=torch.int64)


CHANGES = [
    look_at_the_body,
    look_at_the_head,
    look_at_a_layer,
    replace_the_body,
    wrap_the_body,
    replace_the_head,
    want_one_row,
    want_everything,
    want_hidden_states,
    mask,
]


@torch.inference_mode()
@pytest.mark.parametrize("change", CHANGES)
def test_it_makes_way(change, served, tokens, computed):
    (model, given), ids = served("llama"), tokens(1, 12)
    computed.clear()
    want = model(ids, **given()).logits
    assert computed, "as it is, the model goes this way"
    computed.clear()
    changed = given()
    change(model, changed)
    got = model(ids, **changed).logits
    assert not computed
    rows = {12: ROWS, 2: slice(None)}.get(got.shape[1])
    expected = want if rows is not None else want[:, 1:]  # the last of ROWS is the last of all
    torch.testing.assert_close(got if rows is None else got[:, rows], expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_rows_may_be_counted_from_the_end(served, tokens, computed):
    (model, given), ids = served("llama"), tokens(1, 12)
    computed.clear()
    got, want = (model(ids, **{**given(), "logits_to_keep": torch.tensor([row])}).logits for row in (-1, 11))
    assert len(computed) == 2
    assert torch.equal(got, want)


@torch.inference_mode()
def test_arguments_may_be_given_by_place(tiny, tokens):
    """The hook of an attached model tells by the signature what they are."""
    model, ids = tuned(tiny("llama")), tokens(1, 12)
    assert inspect.signature(model.forward) == inspect.signature(tiny("llama").forward)
    with foveate.attach(model):
        first = model(ids[:, :8], use_cache=True)
        by_place = model(ids[:, 8:], None, None, first.past_key_values).logits
        first = model(ids[:, :8], use_cache=True)
        by_name = model(ids[:, 8:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(by_place, by_name, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_further_rows_of_a_pass_are_made_by_the_model(served, tokens):
    (model, given), ids = served("llama"), tokens(1, 12)
    every = model(ids, **{**given(), "logits_to_keep": 0}).logits[0]
    with LogitRows(model) as more:
        model(ids, **given())
        got = more.of(torch.tensor([0, 5, 7]))
    torch.testing.assert_close(got, every[[0, 5, 7]], rtol=1e-5, atol=1e-5)
