"""Answers of one scheme, however the engine comes to compute them; not collected by pytest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from foveate import LLM, SamplingParams
from foveate.server.engine import Engine
from foveate.server.options import EngineOptions

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
Make = Callable[..., LLM]


@contextmanager
def llms(model_dir, **common) -> Iterator[Make]:
    """Makes engines over one model; all of them are closed at the end."""
    made: list[LLM] = []

    def make(**options) -> LLM:
        options = {"dtype": "float32", "page_size": 16, "kv_cache_gib": 0.02, **common, **options}
        made.append(LLM.over(Engine.load(EngineOptions(model_dir, **options))))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def prompts():
    rng = random.Random(0)
    return [[rng.randrange(256) for _ in range(length)] for length in (30, 130, 300, 257)]


def tokens(llm, attention):
    return [answer.token_ids for answer in llm.generate(prompts(), GREEDY, attention)]


def check_the_same(make_llm: Make, policy) -> None:
    """A warm prefix cache, chunks and preemption change no token, and the policy is not dense in disguise."""
    llm = make_llm(max_batch_tokens=512)
    want = tokens(llm, policy)
    assert tokens(llm, policy) == want, "from a warm prefix cache"
    assert llm.engine.snapshot().cached_tokens > 0
    assert tokens(make_llm(max_batch_tokens=70), policy) == want, "in chunks"
    assert tokens(llm, None) != want
    # Three of the prompts fit to the page, so that their answers push each other out.
    pages = llm.engine.cache.pool.geometry.bytes_per_page * 30.5 / 2**30
    # Steps as long as they like: how fast the machine is decides neither who comes in nor who is pushed out.
    tight = make_llm(max_batch_tokens=512, kv_cache_gib=pages, prefix_reuse=False, step_seconds=1000.0)
    assert tokens(tight, policy) == want, "preempted"
    assert tight.engine.snapshot().preemptions > 0
