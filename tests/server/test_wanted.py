"""Of which tokens a step wants what the last layer makes: those that are answered, and all where a prompt is scored."""

from __future__ import annotations

import pytest

from foveate.server import runner
from foveate.server.llm import LLM
from foveate.server.request import SamplingParams
from foveate.sparse_attn.protocol import StepState

PROMPT = [*range(2, 42)]
DENSE = {"scheme": "dense"}
TAIL = {"scheme": "exact_topk", "budget_tokens": 8, "sink_tokens": 2, "window_tokens": 4, "dense_tail_tokens": 6}


@pytest.fixture
def steps(monkeypatch):
    """Per step, for each of its groups the tokens of it and whether they are wanted."""
    seen: list[list[tuple[int, bool]]] = []

    def look(**facts):
        seen.append([(group.rows.num_queries, group.wanted) for group in facts["groups"]])
        return StepState(**facts)

    monkeypatch.setattr(runner, "StepState", look)
    return seen


def run(model_dir, policy, prompts, **asked):
    with LLM(model_dir, dtype="float32", max_batch_tokens=16, max_running=2) as llm:
        params = SamplingParams(temperature=0, ignore_eos=True, **asked)
        return [one.token_ids for one in llm.generate(prompts, params, policy)]


def test_the_middle_of_a_prompt_is_not_wanted(steps, model_dir):
    run(model_dir, DENSE, [PROMPT], max_tokens=3)
    assert steps == [[(16, False)], [(16, False)], [(8, True)], [(1, True)], [(1, True)]]


def test_of_the_last_chunk_only_the_dense_tail_is_wanted(steps, model_dir):
    run(model_dir, TAIL, [PROMPT], max_tokens=1)
    assert steps == [[(16, False)], [(16, False)], [(2, False), (6, True)]]


def test_all_is_wanted_where_the_prompt_is_scored(steps, model_dir):
    run(model_dir, DENSE, [PROMPT], max_tokens=1, prompt_logprobs=0)
    assert steps == [[(16, True)], [(16, True)], [(8, True)]]


def test_answers_go_on_beside_a_prompt_that_is_not_wanted(steps, model_dir):
    together = run(model_dir, TAIL, [PROMPT[:8], PROMPT], max_tokens=4)
    assert any(len(groups) > 1 and {wanted for _, wanted in groups} == {False, True} for groups in steps)
    assert together == [run(model_dir, TAIL, [prompt], max_tokens=4)[0] for prompt in (PROMPT[:8], PROMPT)]
