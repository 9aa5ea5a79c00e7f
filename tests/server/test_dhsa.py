"""DHSA in the engine: chunks of prompt, reused prefixes, token ids for delimiters, the prompt's length in decode."""

from __future__ import annotations

import pytest

from .scheme_runs import GREEDY, check_the_same, llms, prompts, tokens

_BARE = {"sink_tokens": 0, "window_tokens": 16, "dense_tail_tokens": 8}
_DHSA = {"scheme": "dhsa", "budget_tokens": 32, "block_tokens": 32, "chunk_tokens": 16, "segment_tokens": 64, **_BARE}
_BLOCK = {"scheme": "dhsa_block", "query_block_tokens": 32, "key_block_tokens": 16, **_BARE}
POLICIES = {
    "fixed": _DHSA,
    "key-cos": _DHSA | {"boundaries": "key_cos"},
    "delimiter": _DHSA | {"boundaries": "delimiter", "delimiter_ids": [10, 46, 59, 100, 200]},
    "block": _BLOCK | {"density": 0.1, "variant": "a"},
    "block-sparse-decode": _BLOCK | {"budget_tokens": 32, "sparse_decode": True},
}


@pytest.fixture
def make_llm(model_dir):
    with llms(model_dir) as make:
        yield make


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_however_it_is_computed(make_llm, name):
    check_the_same(make_llm, POLICIES[name])


@pytest.mark.parametrize(
    "options",
    [{"boundaries": "attn_ratio"}, {"boundaries": "key_cos", "segment_tokens": 0}, {"share_heads": "none"}],
    ids=str,
)
def test_a_roomy_budget_answers_as_dense(make_llm, options):
    llm = make_llm()
    assert tokens(llm, _DHSA | options | {"budget_tokens": 1000}) == tokens(llm, None)


def test_fewer_keys_are_read(make_llm):
    llm = make_llm()
    for name, policy in POLICIES.items():
        (answer,) = llm.generate([prompts()[2]], GREEDY, policy)
        assert answer.usage.scheme == policy["scheme"]
        assert 0.2 < answer.usage.keys_read_fraction < 0.7, name
