"""Log-probabilities of the prompt: against stock ``transformers``, in chunks, beside a warm cache, after preemption."""

from __future__ import annotations

import queue
import random
import uuid

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from foveate.patches.errors import UnsupportedModel
from foveate.patches.logit_rows import LogitRows
from foveate.server import prompt_scores
from foveate.server.engine import Engine
from foveate.server.exceptions import BadLogits
from foveate.server.options import EngineOptions
from foveate.server.request import Delta, Failed, Finished, GenerationRequest, PromptLogprobs, SamplingParams

SCORE = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=3)
TOLERANCE = 1e-4  # measured: 6e-6


@pytest.fixture
def make_engine(model_dir):
    engines = []

    def make(**options):
        options = {"dtype": "float32", "page_size": 16, "kv_cache_gib": 0.02, **options}
        engines.append(Engine.load(EngineOptions(model_dir, **options)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown(0)


def prompt_of(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def submit(engine, prompt, sampling=SCORE, attention=None):
    return submit_at_once(engine, [prompt], sampling, attention)[0]


def submit_at_once(engine, prompts, sampling=SCORE, attention=None):
    waiting = [queue.SimpleQueue() for _ in prompts]
    scheme = engine.build_scheme(attention)
    engine.submit(
        *(
            GenerationRequest(uuid.uuid4().hex, prompt, sampling, scheme, events.put, "")
            for prompt, events in zip(prompts, waiting, strict=True)
        )
    )
    return waiting


def collect(events):
    seen = []
    while not seen or not isinstance(seen[-1], Finished | Failed):
        seen.append(events.get(timeout=60))
    return seen


def scores_of(seen):
    assert isinstance(seen[-1], Finished), seen[-1]
    return [entry for event in seen if isinstance(event, PromptLogprobs) for entry in event.entries]


def stock(model_dir, prompt):
    """``[T - 1, vocab]``: stock log-probabilities for the prompt's tokens from the second on."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)


def check(entries, expected, prompt):
    assert [entry.token_id for entry in entries] == prompt[1:]
    for entry, row, token in zip(entries, expected, prompt[1:], strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        best = row.topk(3)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("chunk", [512, 33], ids=["one-step", "chunks"])
def test_as_stock_transformers_says(make_engine, model_dir, chunk):
    prompt = prompt_of(200)
    seen = collect(submit(make_engine(max_batch_tokens=chunk), prompt))
    check(scores_of(seen), stock(model_dir, prompt), prompt)
    assert sum(isinstance(event, PromptLogprobs) for event in seen) == -(-200 // chunk)


def test_few_rows_at_a_time(make_engine, model_dir, monkeypatch):
    """``[prompt, vocab]`` never stands in memory as a whole."""
    taken = []
    real = LogitRows.of
    monkeypatch.setattr(LogitRows, "of", lambda self, rows: taken.append(len(rows)) or real(self, rows))
    monkeypatch.setattr(prompt_scores, "BLOCK_ELEMENTS", 260 * 7)
    prompt = prompt_of(100)
    check(scores_of(collect(submit(make_engine(), prompt))), stock(model_dir, prompt), prompt)
    assert taken == [7] * 14 + [1]


def test_nothing_is_drawn(make_engine):
    seen = collect(submit(make_engine(), prompt_of(20), SamplingParams(max_tokens=0, prompt_logprobs=0, n=2)))
    deltas = [event for event in seen if isinstance(event, Delta)]
    assert [(delta.index, delta.text, delta.token_ids, delta.finish_reason) for delta in deltas] == [
        (0, "", (), "length"),
        (1, "", (), "length"),
    ]
    usage = seen[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.pages) == (20, 0, 2)


def test_a_prompt_may_fill_the_context(make_engine):
    engine = make_engine()
    assert len(scores_of(collect(submit(engine, prompt_of(engine.context_length))))) == engine.context_length - 1


def test_a_prompt_of_one_token_has_none(make_engine):
    assert scores_of(collect(submit(make_engine(), [5]))) == []


def test_cached_pages_are_computed_again(make_engine):
    engine, prompt = make_engine(), prompt_of(100)
    cold = collect(submit(engine, prompt))
    warm = collect(submit(engine, prompt))
    assert scores_of(warm) == scores_of(cold)
    assert warm[-1].usage.cached_tokens == 0
    plain = collect(submit(engine, prompt, SamplingParams(temperature=0, max_tokens=2)))
    assert plain[-1].usage.cached_tokens == 96, "others find the pages that it wrote"
    assert engine.snapshot().pages_used == 0


def test_an_answer_follows_as_without(make_engine):
    engine, prompt = make_engine(), prompt_of(50)
    both = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=1, n=2)
    seen = collect(submit(engine, prompt, both))
    plain = collect(submit(engine, prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)))

    def tokens(events, index):
        return [
            token for event in events if isinstance(event, Delta) and event.index == index for token in event.token_ids
        ]

    assert tokens(seen, 0) == tokens(seen, 1) == tokens(plain, 0)
    first = next(i for i, event in enumerate(seen) if isinstance(event, Delta))
    assert not any(isinstance(event, PromptLogprobs) for event in seen[first:])


def test_beside_others_and_under_pressure(make_engine, model_dir):
    """A pool too small for all of them: whoever is preempted is told each token once."""
    engine = make_engine(kv_cache_gib=40 * 16 * 2 * 2 * 2 * 16 * 4 / 2**30, max_batch_tokens=48, step_seconds=1e3)
    prompts = [prompt_of(150, seed) for seed in range(4)]
    answer = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, prompt_logprobs=3)
    waiting = submit_at_once(engine, prompts, answer)
    for prompt, events in zip(prompts, waiting, strict=True):
        check(scores_of(collect(events)), stock(model_dir, prompt), prompt)
    assert engine.snapshot().preemptions > 0
    assert engine.snapshot().pages_used == 0


def test_preempted_within_its_prompt(make_engine, model_dir):
    """It goes on where it was told last: its tokens before that may come from the cache."""
    engine, prompt = make_engine(max_batch_tokens=32), prompt_of(200)
    real, done = engine._stepper._tell_scores, []

    def tell(sequence, scores):
        real(sequence, scores)
        if len(done) < 2 and sequence.group.num_scored > 60 * (len(done) + 1):
            done.append(sequence.group.num_scored)
            scheduler = engine._stepper.scheduler
            scheduler._preempt(sequence, [])

    engine._stepper._tell_scores = tell
    check(scores_of(collect(submit(engine, prompt))), stock(model_dir, prompt), prompt)
    assert len(done) == 2


def test_a_sparse_scheme_scores_by_what_it_reads(make_engine):
    engine, prompt = make_engine(), prompt_of(200)
    streaming = {"scheme": "streaming", "budget_tokens": 32, "sink_tokens": 4, "dense_tail_tokens": 0}
    dense = scores_of(collect(submit(engine, prompt)))
    sparse = scores_of(collect(submit(engine, prompt, attention=streaming)))
    assert [entry.token_id for entry in sparse] == prompt[1:]
    assert sparse[:20] == dense[:20]
    assert sparse[-20:] != dense[-20:]


def test_logits_that_are_not_finite_end_the_request_alone(make_engine, monkeypatch):
    engine = make_engine()
    real = LogitRows.of
    monkeypatch.setattr(LogitRows, "of", lambda self, rows: real(self, rows) * torch.nan)
    assert isinstance(collect(submit(engine, prompt_of(20)))[-1].error, BadLogits)
    seen = collect(submit(engine, prompt_of(20), SamplingParams(temperature=0, max_tokens=2)))
    assert isinstance(seen[-1], Finished)
    assert engine.snapshot().pages_used == 0


class TestLogitRows:
    def test_the_soft_cap_of_the_head_is_applied(self):
        config = Gemma2Config(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5,
        )  # fmt: skip
        model = Gemma2ForCausalLM(config).eval()
        ids = torch.tensor([[3, 1, 4, 1, 5]])
        with torch.inference_mode(), LogitRows(model) as more:
            model(input_ids=ids, logits_to_keep=1)
            rows = more.of(torch.tensor([0, 3]))
        with torch.inference_mode():
            torch.testing.assert_close(rows, model(input_ids=ids).logits[0, [0, 3]])
        assert rows.abs().max() <= 0.5
        assert "forward" not in model.model.__dict__
        assert not model.model._forward_hooks

    def test_a_model_without_a_body_is_refused(self, tiny_llama):
        with pytest.raises(UnsupportedModel, match="no body"):
            LogitRows(tiny_llama.model)
