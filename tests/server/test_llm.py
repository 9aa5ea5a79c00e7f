"""The offline API: what it takes, what it says, and that it ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from foveate.server.exceptions import ContextOverflow, EngineDead, InvalidRequest
from foveate.server.llm import LLM
from foveate.server.request import PromptLogprobs, SamplingParams
from foveate.sparse_attn.errors import UnknownScheme

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
SMALL = {"dtype": "float32", "page_size": 16, "kv_cache_gib": 0.02}


@pytest.fixture(scope="module")
def llm(model_dir):
    with LLM(Path(model_dir), **SMALL) as llm:
        yield llm


def tokens(completions):
    return [completion.token_ids for completion in completions]


def test_one_text_is_one_prompt(llm):
    assert tokens(llm.generate("The capital", GREEDY)) == tokens(llm.generate(["The capital"], GREEDY))


def test_one_list_of_ids_is_one_prompt(llm):
    assert tokens(llm.generate([1, 2, 3], GREEDY)) == tokens(llm.generate([[1, 2, 3]], GREEDY))
    assert llm.generate([], GREEDY) == []


def test_a_scheme_by_its_name(llm):
    (completion,) = llm.generate("The capital", GREEDY, "streaming")
    assert completion.usage.scheme == "streaming"
    with pytest.raises(UnknownScheme, match="'nosuch'"):
        llm.generate("The capital", GREEDY, "nosuch")


@pytest.mark.parametrize(
    ("prompt", "error", "words"),
    [
        pytest.param([10**9], InvalidRequest, "token ids must be from 0 to 259", id="no such token"),
        pytest.param([], InvalidRequest, "holds no token", id="empty"),
        pytest.param([5] * 600, ContextOverflow, "600 in the prompt", id="too long"),
        pytest.param("a\ud800b", InvalidRequest, "half of a surrogate pair at character 1", id="half a character"),
    ],
)
def test_a_refusal_says_which_prompt_it_is_about(prompt, error, words, llm):
    with pytest.raises(error, match=f"^prompt 2: .*{words}"):
        llm.generate(["one", "two", prompt, "four"], GREEDY)
    with pytest.raises(error, match=f"^(?!prompt 0).*{words}"):
        llm.generate([prompt], GREEDY)


def test_logprobs_are_those_of_the_events(llm):
    seen = []
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1, n=2)
    completions = llm.generate(["abcdef", "xyz"], params, on_event=lambda number, event: seen.append((number, event)))
    for index, completion in enumerate(completions):
        scored = [entry for number, event in seen if number == index // 2 and isinstance(event, PromptLogprobs)
                  for entry in event.entries]  # fmt: skip
        assert completion.prompt_logprobs == tuple(scored)
        assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
        assert all(len(entry.top) == 2 for entry in completion.logprobs)
    assert [len(completion.prompt_logprobs) for completion in completions] == [5, 5, 2, 2]
    (plain,) = llm.generate("abcdef", GREEDY)
    assert (plain.logprobs, plain.prompt_logprobs) == (None, None)


def test_calls_of_several_threads_wait_for_each_other(model_dir):
    """Though each has more prompts than may wait."""
    with LLM(model_dir, **SMALL, max_running=4, max_queued_requests=2) as llm:
        prompts = [[1 + number, 2, 3] for number in range(10)]
        want = tokens(llm.generate(prompts, GREEDY))
        found = {}

        def ask(name):
            try:
                found[name] = tokens(llm.generate(prompts, GREEDY))
            except Exception as error:
                found[name] = error

        threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == dict.fromkeys(range(4), want)


def test_closing_lets_go_of_model_and_cache(model_dir):
    llm = LLM(model_dir, **SMALL)
    llm.generate("The capital", GREEDY, "streaming")
    model, pool = weakref.ref(llm.engine._loaded.model), weakref.ref(llm.engine.cache.pool)
    llm.close()
    assert (model(), pool()) == (None, None)
    llm.close()
    for prompts in ("The capital", []):
        with pytest.raises(EngineDead, match="this LLM is closed"):
            llm.generate(prompts, GREEDY)


AT_WORK = """
import atexit, sys, threading
from foveate import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", kv_cache_gib=0.02)
begun = threading.Event()
long = SamplingParams(max_tokens=400, ignore_eos=True)
ask = lambda: llm.generate([[1, 2, 3]] * 4, long, on_event=lambda number, event: begun.set())
threading.Thread(target=ask, daemon=True).start()
assert begun.wait(60)
engine = llm.engine
atexit._run_exitfuncs()
print("thread is alive:", engine._thread.is_alive())
"""


def test_what_is_open_at_the_end_of_the_interpreter_is_closed(model_dir):
    done = subprocess.run([sys.executable, "-c", AT_WORK, model_dir], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "thread is alive: False\n"), done.stderr
