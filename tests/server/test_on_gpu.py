"""The engine on a GPU: the tokens that a CPU gives, whatever the scheme, in chunks, from reused prefixes, preempted."""

from __future__ import annotations

import pytest
import torch

from foveate.server import cli

from . import test_composed, test_dhsa, test_top_theta
from .scheme_runs import check_the_same, llms, tokens

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

_SMALL = {"budget_tokens": 24, "sink_tokens": 2, "window_tokens": 8, "dense_first_layers": 0}
POLICIES = {
    "moba": {"scheme": "moba", "block_tokens": 16, "top_k": 3, "dense_last_layers": 0},
    "kascade": {"scheme": "kascade", "uncalibrated": 1, **_SMALL},
    "exact_topk": {"scheme": "exact_topk", **_SMALL},
    "streaming": {"scheme": "streaming", "budget_tokens": 24},
    **{f"dhsa-{name}": policy for name, policy in test_dhsa.POLICIES.items()},
    **test_composed.POLICIES,
    **{f"top_theta-{name}": policy for name, policy in test_top_theta.POLICIES.items()},
}


@pytest.fixture(scope="module")
def profile_file(model_dir, tmp_path_factory):
    """Thresholds that the GPU measured."""
    path = tmp_path_factory.mktemp("profile") / "top_theta.safetensors"
    given = ["--samples", "4", "--tokens", "480", "--dtype", "float32", "--device", "cuda"]
    given += ["--option", "sink_tokens=4", "--option", "window_tokens=16", "--option", "sigma=0.1"]
    assert cli.main(["calibrate", model_dir, "--scheme", "top_theta", "-o", str(path), *given]) == 0
    return path


@pytest.fixture
def make_llm(model_dir, profile_file):
    with llms(model_dir, profile=[str(profile_file)], device="cuda") as make:
        yield make


@pytest.mark.parametrize("name", POLICIES)
def test_the_tokens_of_a_cpu(make_llm, name):
    assert tokens(make_llm(), POLICIES[name]) == tokens(make_llm(device="cpu"), POLICIES[name])


def test_dense_gives_the_tokens_of_a_cpu(make_llm):
    assert tokens(make_llm(), None) == tokens(make_llm(device="cpu"), None)


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_however_it_is_computed(make_llm, name):
    check_the_same(make_llm, POLICIES[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["dense", *(name for name in POLICIES if not name.startswith("top_theta"))])
def test_sixteen_bits(make_llm, name, dtype):
    """Runs to the end, and most answers begin as in float32: rounding moves tokens of a random model late."""
    policy = POLICIES.get(name)
    got, want = tokens(make_llm(dtype=dtype, profile=[]), policy), tokens(make_llm(), policy)
    assert [len(answer) for answer in got] == [12] * 4
    assert sum(a[0] == b[0] for a, b in zip(got, want, strict=True)) >= 3
