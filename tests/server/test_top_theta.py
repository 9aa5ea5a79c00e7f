"""Top-theta from calibration to answers: in chunks, from reused prefixes, and with the profile that comes along."""

from __future__ import annotations

import pytest

from foveate import LLM
from foveate.server import cli
from foveate.server.calibration_text import prose
from foveate.sparse_attn.profile import Profile

from .scheme_runs import GREEDY, check_the_same, llms, prompts, tokens

_SMALL = {
    "scheme": "top_theta", "budget_tokens": 24, "first_layers_budget_tokens": 0,
    "sink_tokens": 4, "window_tokens": 16, "dense_tail_tokens": 8,
}  # fmt: skip
POLICIES = {
    "thresholds": _SMALL,
    "union-bound": _SMALL | {"gqa": "union", "compensation": "bound", "compensation_scale": 0.2},
    "pure-calibrated": _SMALL | {"sink_tokens": 0, "window_tokens": 0, "dense_tail_tokens": 0}
    | {"compensation": "calibrated"},
    "decode-only": _SMALL | {"sparse_prefill": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def profile_file(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "top_theta.safetensors"
    given = ["--samples", "4", "--tokens", "480", "--dtype", "float32"]
    given += ["--option", "sink_tokens=4", "--option", "window_tokens=16", "--option", "sigma=0.1"]
    assert cli.main(["calibrate", model_dir, "--scheme", "top_theta", "-o", str(path), *given]) == 0
    return path


@pytest.fixture
def make_llm(model_dir, profile_file):
    with llms(model_dir, profile=[str(profile_file)]) as make:
        yield make


def test_a_profile_says_what_it_was_made_from(profile_file):
    profile = Profile.load(profile_file)
    assert profile.options == {
        "sink_tokens": 4, "window_tokens": 16, "sigma": 0.1, "queries_per_length": 4,
        "samples": 4, "sample_tokens": 480, "queries": 4 * 4 * 4,
    }  # fmt: skip
    assert profile.tensors["all.sizes"].tolist() == [128, 192, 256, 384]
    assert profile.tensors["free.sizes"].tolist() == [107, 171, 235, 363]


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_however_it_is_computed(make_llm, name):
    check_the_same(make_llm, POLICIES[name])


def test_a_roomy_budget_answers_as_dense(make_llm):
    llm = make_llm()
    assert tokens(llm, _SMALL | {"budget_tokens": 1000}) == tokens(llm, None)


def test_every_key_is_scored_and_few_values_are_read(make_llm):
    llm = make_llm()
    for name, policy in POLICIES.items():
        (answer,) = llm.generate([prompts()[2]], GREEDY, policy)
        assert answer.usage.scheme == "top_theta"
        fraction = answer.usage.keys_read_fraction
        assert 0.5 < fraction < (1 if name == "decode-only" else 0.8), name


def test_the_profile_that_comes_with_the_demo_model_finds_the_fact(smollm_dir):
    text = prose()[:9000]
    middle = text.index("\n\n", len(text) // 2)
    fact = "\n\nThe secret access code of the north warehouse is 48213."
    prompt = text[:middle] + fact + text[middle:] + "\n\nReminder. The secret access code of the north warehouse is"
    with LLM(str(smollm_dir), kv_cache_gib=0.5) as llm:
        (answer,) = llm.generate(
            [prompt], GREEDY, {"scheme": "top_theta", "budget_tokens": 128, "dense_tail_tokens": 0}
        )
    assert answer.usage.prompt_tokens > 1500
    assert "48213" in answer.text
    assert 0.5 < answer.usage.keys_read_fraction < 0.85
