"""Quest, XAttention and both together, in the engine and over HTTP."""

from __future__ import annotations

import threading

import pytest

from .scheme_runs import GREEDY, check_the_same, llms, prompts, tokens

_BARE = {"sink_tokens": 0, "window_tokens": 16, "dense_tail_tokens": 8}
PROMPT = {"scheme": "xattention", "block_tokens": 32, "stride_tokens": 4, "tau": 0.3, **_BARE}
ANSWER = {"scheme": "quest", "budget_tokens": 32, "min_pages": 1, "dense_first_layers": 0, **_BARE}
POLICIES = {
    "quest": ANSWER,
    "quest-sparse-prompt": ANSWER | {"sparse_prefill": True, "tile_tokens": 32},
    "xattention": PROMPT,
    "composed": {"scheme": "composed", "prefill": PROMPT, "decode": ANSWER},
}


@pytest.fixture
def make_llm(model_dir):
    with llms(model_dir) as make:
        yield make


@pytest.mark.parametrize("name", POLICIES)
def test_the_same_however_it_is_computed(make_llm, name):
    check_the_same(make_llm, POLICIES[name])


def test_policies_share_a_batch(make_llm):
    llm = make_llm(max_batch_tokens=64)
    policies = [None, *POLICIES.values()]
    alone = [tokens(llm, policy)[2] for policy in policies]
    llm.engine.cache.reset_prefix()
    prompt, done = prompts()[2], {}

    def ask(index, policy):
        done[index] = llm.generate([prompt], GREEDY, policy)[0].token_ids

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(policies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done[index] for index in range(len(policies))] == alone


def test_fewer_keys_are_read_in_both_phases(make_llm):
    llm = make_llm()
    read = {}
    for name in ("quest", "xattention", "composed"):
        (answer,) = llm.generate([prompts()[2]], GREEDY, POLICIES[name])
        read[name] = answer.usage.keys_read_fraction
        assert answer.usage.scheme == POLICIES[name]["scheme"]
    assert read["composed"] < min(read["quest"], read["xattention"])
    assert max(read.values()) < 1


def test_http(client, engine):
    policy = {"scheme": "composed", "prefill": {"scheme": "xattention", "tau": 0.8}, "decode": "quest"}
    answer = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2, "attention": policy})
    assert answer.status_code == 200
    assert answer.json()["usage"]["attention"]["scheme"] == "composed"
    assert engine.requests[0].scheme.options.prefill == policy["prefill"]
    for part, said in [
        ({"scheme": "xattention", "tau": 8}, "prefill: tau must be a number from 0 to 1, got 8"),
        ({"scheme": "nosuch"}, "prefill: unknown attention scheme 'nosuch'; there are: dense"),
    ]:
        body = {"prompt": "Hi", "attention": {"scheme": "composed", "prefill": part}}
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]
