"""The engine on a tiny random model: exactness, isolation, pages given back."""

from __future__ import annotations

import queue
import random
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from foveate.server import engine as engine_module
from foveate.server.engine import Engine
from foveate.server.exceptions import (
    BadLogits,
    ContextOverflow,
    EngineDead,
    InvalidRequest,
    PoolTooSmall,
    QueueFull,
    RequestAborted,
    StepFailed,
)
from foveate.server.llm import LLM
from foveate.server.options import EngineOptions
from foveate.server.request import Delta, Failed, Finished, GenerationRequest, Progress, SamplingParams
from foveate.sparse_attn.errors import SchemeConfigError, UnknownScheme

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


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


def test_the_computing_thread_is_on_the_models_device(make_engine, monkeypatch):
    """Streams and events that name no device are those of the thread's GPU."""
    seen = []

    @contextmanager
    def on_device(device):
        seen.append((device, threading.current_thread().name))
        yield
        seen.append("left")

    monkeypatch.setattr(engine_module, "on_device", on_device)
    engine = make_engine()
    assert LLM.over(engine).generate([[1, 2, 3]], GREEDY)
    assert seen == [(torch.device("cpu"), "foveate-engine")]


def prompts_of(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


def asked(engine, prompt, sampling=GREEDY, attention=None, on_event=None, salt=""):
    events = queue.SimpleQueue()
    scheme = engine.build_scheme(attention)
    return GenerationRequest(uuid.uuid4().hex, prompt, sampling, scheme, on_event or events.put, salt), events


def submit(engine, prompt, *options, **more):
    request, events = asked(engine, prompt, *options, **more)
    engine.submit(request)
    return request.request_id, events


def submit_at_once(engine, *pairs):
    engine.submit(*(request for request, _ in pairs))
    return [events for _, events in pairs]


def collect(events):
    """All events of a request, the last one included."""
    seen = []
    while not seen or not isinstance(seen[-1], Finished | Failed):
        seen.append(events.get(timeout=60))
    return seen


def tokens_of(seen, index=0):
    assert isinstance(seen[-1], Finished), seen[-1]
    return [token for event in seen if isinstance(event, Delta) and event.index == index for token in event.token_ids]


def run(engine, prompts, sampling=GREEDY, attention=None):
    """Greedy tokens of all prompts, submitted at once."""
    waiting = submit_at_once(engine, *(asked(engine, prompt, sampling, attention) for prompt in prompts))
    return [tokens_of(collect(events)) for events in waiting]


@pytest.fixture(scope="module")
def stock(model_dir):
    """Greedy tokens of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()

    def generate(prompts):
        with torch.inference_mode():
            outputs = [
                model.generate(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
                )
                for prompt in prompts
            ]  # fmt: skip
        return [output[0, len(prompt) :].tolist() for output, prompt in zip(outputs, prompts, strict=True)]

    return generate


PROMPTS = prompts_of(1, 2, 15, 16, 17, 63, 130, 200)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 7},
        {"max_batch_tokens": 64, "page_size": 32},
        {"prefix_reuse": False, "max_running": 2},
        {"kv_cache_gib": 0.00025, "step_seconds": 1e3},
    ],
    ids=["plain", "chunks-of-7", "pages-of-32", "two-at-once", "preempting"],
)
def test_greedy_equals_transformers(make_engine, stock, options):
    engine = make_engine(**options)
    want = stock(PROMPTS)
    assert [run(engine, [prompt])[0] for prompt in PROMPTS] == want, "alone"
    assert run(engine, PROMPTS) == want, "batched, over a warm prefix cache"
    if options.get("kv_cache_gib"):
        many = PROMPTS[3:] * 4
        assert run(engine, many) == want[3:] * 4
        assert engine.snapshot().preemptions > 0
    if engine.snapshot().cached_tokens == 0:
        assert options.get("prefix_reuse") is False
    assert engine.snapshot().pages_used == 0


def test_streaming_scheme_is_the_same_however_it_is_computed(make_engine):
    policy = {"scheme": "streaming", "budget_tokens": 40, "dense_tail_tokens": 10}
    prompts = prompts_of(30, 130, 300, 90)
    want = run(make_engine(max_batch_tokens=512), prompts, attention=policy)
    assert run(make_engine(max_batch_tokens=13), prompts, attention=policy) == want
    assert run(make_engine(kv_cache_gib=0.0004, max_batch_tokens=50), prompts, attention=policy) == want
    assert want != run(make_engine(), prompts)


def test_policies_of_one_batch_do_not_touch_each_other(make_engine):
    engine = make_engine(max_batch_tokens=40)
    prompts = prompts_of(150, 151, 152, 153)
    policies = [None, {"scheme": "streaming", "budget_tokens": 32}, {"scheme": "streaming", "budget_tokens": 64}, None]
    alone = [run(engine, [prompt], attention=policy)[0] for prompt, policy in zip(prompts, policies, strict=True)]
    engine.cache.reset_prefix()
    pairs = zip(prompts, policies, strict=True)
    waiting = submit_at_once(engine, *(asked(engine, prompt, attention=policy) for prompt, policy in pairs))
    assert [tokens_of(collect(events)) for events in waiting] == alone


def test_prefix_pages_are_not_shared_across_policies_and_salts(make_engine):
    engine = make_engine()
    prompt = prompts_of(200)[0]
    for policy, salt in [(None, ""), ({"scheme": "streaming", "budget_tokens": 32}, ""), (None, "tenant")]:
        usage = collect(submit(engine, prompt, attention=policy, salt=salt)[1])[-1].usage
        assert usage.cached_tokens == 0
    assert collect(submit(engine, prompt)[1])[-1].usage.cached_tokens == 192


def test_keys_read_fraction(make_engine):
    engine = make_engine()
    prompt = prompts_of(200)[0]
    assert collect(submit(engine, prompt)[1])[-1].usage.keys_read_fraction == 1.0
    policy = {"scheme": "streaming", "budget_tokens": 20, "sink_tokens": 4}
    usage = collect(submit(engine, prompt, attention=policy)[1])[-1].usage
    contexts = range(1, 200 + GREEDY.max_tokens)  # the last token is drawn, not computed
    assert usage.keys_read_fraction == pytest.approx(sum(min(n, 20) for n in contexts) / sum(contexts))
    assert usage.scheme == "streaming"
    assert usage.pages == -(-211 // 16)


def test_choices_share_the_prompt_and_differ_by_seed(make_engine):
    engine = make_engine()
    prompt = prompts_of(100)[0]
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=3, n=4, ignore_eos=True)
    seen = collect(submit(engine, prompt, params)[1])
    choices = [tokens_of(seen, index) for index in range(4)]
    assert len({tuple(choice) for choice in choices}) == 4
    for index in range(4):
        one = SamplingParams(temperature=1.0, max_tokens=12, seed=3 + index, ignore_eos=True)
        assert tokens_of(collect(submit(engine, prompt, one)[1])) == choices[index]
    assert seen[-1].usage.prompt_tokens == 100
    assert seen[-1].usage.completion_tokens == 48
    assert engine.snapshot().pages_used == 0


def test_seeded_sampling_survives_preemption(make_engine):
    params = SamplingParams(temperature=1.0, max_tokens=40, seed=5, ignore_eos=True, presence_penalty=0.5)
    prompts = prompts_of(60, 61, 62, 63, 64)
    want = run(make_engine(), prompts, params)
    engine = make_engine(kv_cache_gib=0.0002, step_seconds=1e3)
    assert run(engine, prompts, params) == want
    assert engine.snapshot().preemptions > 0


def test_progress_grows_to_the_whole_prompt(make_engine):
    engine = make_engine(max_batch_tokens=50)
    seen = collect(submit(engine, prompts_of(180)[0])[1])
    progress = [(event.processed, event.total) for event in seen if isinstance(event, Progress)]
    assert progress == [(50, 180), (100, 180), (150, 180), (180, 180)]


def test_stop_ids_stop_strings_and_lengths(make_engine):
    engine = make_engine()
    prompt = prompts_of(40)[0]
    tokens = run(engine, [prompt])[0]
    cut = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(tokens[5],), ignore_eos=True)
    seen = collect(submit(engine, prompt, cut)[1])
    assert tokens_of(seen) == tokens[: tokens.index(tokens[5])]
    assert [event.finish_reason for event in seen if isinstance(event, Delta)][-1] == "stop"
    text = "".join(event.text for event in collect(submit(engine, prompt)[1]) if isinstance(event, Delta))
    stopping = SamplingParams(temperature=0, max_tokens=12, stop=(text[3:5],), ignore_eos=True)
    got = collect(submit(engine, prompt, stopping)[1])
    assert "".join(event.text for event in got if isinstance(event, Delta)) == text[: text.index(text[3:5])]


def test_context_is_filled_when_no_length_is_given(make_engine):
    engine = make_engine(max_context=50)
    seen = collect(submit(engine, prompts_of(40)[0], SamplingParams(max_tokens=None, ignore_eos=True))[1])
    assert len(tokens_of(seen)) == 10
    assert seen[-2].finish_reason == "length"


def test_the_pool_is_filled_where_it_holds_less_than_the_context(make_engine):
    engine = make_engine(kv_cache_gib=0.0002)
    capacity = engine.cache.capacity_tokens
    assert capacity < engine.context_length
    seen = collect(submit(engine, [1] * (capacity - 5), SamplingParams(max_tokens=None, ignore_eos=True))[1])
    assert len(tokens_of(seen)) == 5


def test_requests_that_come_together_are_taken_together(make_engine):
    engine = make_engine(max_queued_requests=2)
    with pytest.raises(InvalidRequest):
        submit_at_once(engine, asked(engine, [1, 2]), asked(engine, []))
    assert engine.snapshot().prompt_tokens == 0
    for events in submit_at_once(engine, *(asked(engine, [1, 2]) for _ in range(5))):  # nothing waits: more than may
        assert tokens_of(collect(events))


def test_a_list_of_prompts_longer_than_the_queue_is_answered(make_engine):
    """What finds no room when a place is free waits for the next."""
    engine = make_engine(max_queued_requests=1, max_running=4, kv_cache_gib=0.0002)
    prompts = prompts_of(*[60] * 12)
    answers = LLM.over(engine).generate(prompts, GREEDY)
    assert [list(answer.token_ids) for answer in answers] == [run(engine, [prompt])[0] for prompt in prompts]


def test_answers_leave_half_of_a_step_to_prompts(make_engine):
    engine = make_engine(max_batch_tokens=8)
    assert engine.max_running == 4
    long = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, n=2)
    running = [submit(engine, [1, 2, number], long)[0] for number in range(6)]
    while engine.snapshot().generated_tokens < 200:
        time.sleep(0.01)
    assert engine.snapshot().running == 4
    for request_id in running:
        engine.abort(request_id)


def test_what_cannot_run_is_refused_at_once(make_engine):
    engine = make_engine(kv_cache_gib=0.0002, step_seconds=1e3)
    for prompt, params, error in [
        ([], GREEDY, InvalidRequest),
        ([260], GREEDY, InvalidRequest),
        ([-1], GREEDY, InvalidRequest),
        ([1] * 512, GREEDY, ContextOverflow),
        ([1] * 490, GREEDY, PoolTooSmall),
        ([1], SamplingParams(temperature=-1), InvalidRequest),
    ]:
        with pytest.raises(error):
            submit(engine, prompt, params)
    with pytest.raises(UnknownScheme, match="dense, streaming"):
        engine.build_scheme({"scheme": "none"})
    with pytest.raises(SchemeConfigError, match="budget_tokens"):
        engine.build_scheme({"scheme": "streaming", "budget": 3})
    with pytest.raises(SchemeConfigError, match="budget_tokens"):
        engine.build_scheme({"scheme": "streaming", "budget_tokens": [3]})
    assert run(engine, [[1, 2, 3]])


def test_full_queue_is_refused(make_engine):
    engine = make_engine(max_queued_requests=2, max_running=1)
    gate, events = threading.Event(), []

    def hold(event):
        events.append(event)
        gate.wait(30)

    submit(engine, [1, 2], on_event=hold)
    while not events:
        threading.Event().wait(0.01)
    waiting = [submit(engine, [3])[1] for _ in range(2)]
    with pytest.raises(QueueFull):
        submit(engine, [4])
    gate.set()
    for one in waiting:
        assert tokens_of(collect(one))


def test_abort_gives_pages_back_and_spares_others(make_engine):
    engine = make_engine(max_batch_tokens=16)
    long = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    prompts = prompts_of(100, 101, 102)
    want = run(engine, prompts[2:])
    running = [submit(engine, prompt, long) for prompt in prompts[:2]]
    survivor = submit(engine, prompts[2])[1]
    for request_id, events in running:
        events.get(timeout=30)
        engine.abort(request_id)
        assert isinstance(collect(events)[-1].error, RequestAborted)
    engine.abort("unknown")
    assert tokens_of(collect(survivor)) == want[0]
    assert engine.snapshot().pages_used == 0
    assert engine.snapshot().aborted == 2


def test_bad_logits_end_one_request_alone(make_engine, monkeypatch):
    engine = make_engine()
    good, bad = prompts_of(20, 21)
    want = run(engine, [good])
    real = engine._stepper.runner.run

    def poisoned(chunks):
        result = real(chunks)
        logits = result.logits.clone()
        for row, chunk in enumerate(chunk for chunk in chunks if chunk.ends_sequence):
            if chunk.sequence.group.request.prompt_token_ids == bad:
                logits[row] = float("nan")
        return replace(result, logits=logits)

    monkeypatch.setattr(engine._stepper.runner, "run", poisoned)
    events = [submit(engine, prompt)[1] for prompt in (good, bad)]
    assert tokens_of(collect(events[0])) == want[0]
    assert isinstance(collect(events[1])[-1].error, BadLogits)
    assert engine.snapshot().pages_used == 0


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(make_engine, monkeypatch):
    engine = make_engine()
    real, calls = engine._stepper.runner.run, []

    def broken(chunks):
        calls.append(chunks)
        if len(calls) == 1:
            raise RuntimeError("broken")
        return real(chunks)

    monkeypatch.setattr(engine._stepper.runner, "run", broken)
    assert isinstance(collect(submit(engine, [1, 2, 3])[1])[-1].error, StepFailed)
    assert run(engine, [[1, 2, 3]])
    assert engine.state == "ready"
    assert engine.snapshot().pages_used == 0


def test_a_caller_that_raises_loses_only_its_own_request(make_engine):
    engine = make_engine()

    def bad(event):
        raise RuntimeError("no")

    submit(engine, prompts_of(50)[0], on_event=bad)
    assert run(engine, [[1, 2, 3]])
    assert engine.snapshot().pages_used == 0


def test_shutdown_drains_then_fails_the_rest(make_engine):
    engine = make_engine()
    done = submit(engine, [1, 2, 3])[1]
    engine.shutdown(30)
    assert tokens_of(collect(done))
    with pytest.raises(EngineDead):
        submit(engine, [1])
    engine = make_engine()
    cut = submit(engine, [1, 2, 3], SamplingParams(max_tokens=400, ignore_eos=True))[1]
    engine.shutdown(0)
    assert isinstance(collect(cut)[-1].error, EngineDead)


def test_offline_generation(model_dir, stock):
    with LLM(model_dir, dtype="float32", kv_cache_gib=0.02, max_running=3) as llm:
        seen = []
        done = llm.generate(PROMPTS, GREEDY, on_event=lambda index, event: seen.append(index))
        assert [list(completion.token_ids) for completion in done] == stock(PROMPTS)
        assert set(seen) == set(range(len(PROMPTS)))
        assert len(llm.generate(["hello"], SamplingParams(max_tokens=3, n=2))) == 2
        with pytest.raises(ContextOverflow):
            llm.generate(["a", "b" * 600])

        def stumble(index, event):
            if isinstance(event, Finished):
                raise LookupError("of the caller")

        with pytest.raises(LookupError, match="of the caller"):
            llm.generate(["hello"], GREEDY, on_event=stumble)
        assert llm.engine.snapshot().pages_used == 0


@pytest.fixture
def answer(make_engine):
    """An engine, a prompt, and the deltas of its greedy answer: token ids and the text that each adds."""
    engine = make_engine()
    prompt = prompts_of(40)[0]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    seen = [event for event in collect(submit(engine, prompt, params)[1]) if isinstance(event, Delta)]
    return engine, prompt, [event.token_ids[0] for event in seen], [event.text for event in seen]


def ask(engine, prompt, **params):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **params)
    seen = [event for event in collect(submit(engine, prompt, params)[1]) if isinstance(event, Delta)]
    return "".join(event.text for event in seen), sum(len(event.token_ids) for event in seen), seen[-1].finish_reason


def test_what_a_stop_string_held_back_comes_out_when_a_stop_id_ends_the_text(answer):
    engine, prompt, tokens, texts = answer
    place = next(i for i in range(2, 12) if texts[i - 1].strip() and tokens[i] not in tokens[:i])
    text = "".join(texts[:place])
    begun = text[-1] + "\0"  # the text may go on to it, until it ends
    assert ask(engine, prompt, stop=(begun,), stop_token_ids=(tokens[place],)) == (text, place, "stop")


def test_a_stop_string_that_the_least_token_completes_ends_the_text(answer):
    engine, prompt, _, texts = answer
    place = next(i for i in range(2, 11) if texts[i].strip() and texts[i] not in "".join(texts[:i]))
    before, word = "".join(texts[:place]), texts[place]
    for least in (0, place, place + 1):
        assert ask(engine, prompt, stop=(word,), min_tokens=least) == (before, place + 1, "stop"), least
    assert ask(engine, prompt, stop=(word,), min_tokens=place + 2)[1] > place + 1
