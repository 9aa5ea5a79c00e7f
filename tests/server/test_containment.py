"""Faults at every seam of the engine: whom they end, and that the engine is as before."""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from dataclasses import replace

import pytest
import torch

from foveate.kv_cache.errors import CacheError
from foveate.server import containment, sampling
from foveate.server.app import create_app
from foveate.server.engine import Engine
from foveate.server.exceptions import BadLogits, EngineDead, EngineError, NoTokenLeft, RequestFailed, StepFailed
from foveate.server.options import EngineOptions
from foveate.server.request import Delta, Failed, Finished, GenerationRequest, Progress, SamplingParams
from foveate.server.settings import Settings

from .conftest import LocalClient

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, seed=3, max_tokens=6, ignore_eos=True)
INJECTED = RuntimeError("injected")
GOOD, BAD = list(range(40, 80)), list(range(100, 150))


class Panic(BaseException):
    """As a tokenizer written in Rust raises it."""


@pytest.fixture(scope="module")
def shared(model_dir):
    engine = Engine.load(EngineOptions(model_dir, dtype="float32", page_size=16, kv_cache_gib=0.02))
    yield engine
    engine.shutdown(0)


@pytest.fixture
def engine(shared, monkeypatch):
    """One engine for the module; after each test it must be idle, whole, and as good as new."""
    shared.cache.reset_prefix()
    want = {name: run(shared, GOOD, params) for name, params in (("greedy", GREEDY), ("seeded", SEEDED))}
    yield shared
    monkeypatch.undo()
    assert shared.state == "ready"
    deadline = time.monotonic() + 60
    while shared.snapshot().pages_used or shared.snapshot().running or shared.snapshot().waiting:
        assert time.monotonic() < deadline, shared.snapshot()
        time.sleep(0.005)
    allocator = shared.cache.allocator
    assert allocator.num_free + allocator.num_cached == allocator.num_pages
    assert not shared._stepper.groups
    assert run(shared, GOOD, GREEDY) == want["greedy"]
    assert run(shared, GOOD, SEEDED) == want["seeded"]


@pytest.fixture
def dying(model_dir):
    """An engine that the test may kill."""
    engine = Engine.load(EngineOptions(model_dir, dtype="float32", page_size=16, kv_cache_gib=0.02))
    yield engine
    engine.shutdown(0)


def submit(engine, prompt, params=GREEDY, on_event=None):
    events = queue.SimpleQueue()
    engine.submit(
        GenerationRequest(uuid.uuid4().hex, prompt, params, engine.build_scheme(None), on_event or events.put)
    )
    return events


def collect(events):
    seen = []
    while not seen or not isinstance(seen[-1], Finished | Failed):
        seen.append(events.get(timeout=60))
    return seen


def tokens(seen):
    assert isinstance(seen[-1], Finished), seen[-1]
    return [token for event in seen if isinstance(event, Delta) for token in event.token_ids]


def run(engine, prompt, params=GREEDY):
    return tokens(collect(submit(engine, prompt, params)))


def error_of(events):
    last = collect(events)[-1]
    assert isinstance(last, Failed), last
    assert isinstance(last.error, EngineError)
    return last.error


def is_bad(sequence):
    return sequence.group.request.prompt_token_ids == BAD


def raising(real, when, error=INJECTED):
    """``real``, but raising where ``when`` says so of its arguments."""

    def call(*args, **kwargs):
        if when(*args, **kwargs):
            raise error
        return real(*args, **kwargs)

    return call


def once(when=lambda *args, **kwargs: True):
    """True the first time that ``when`` is."""
    left = [True]

    def check(*args, **kwargs):
        return left[0] and when(*args, **kwargs) and not left.clear() and not left.append(False)

    return check


def both(engine, params=GREEDY, bad_params=None):
    """A good and a bad request in the same steps."""
    engine._stepper.scheduler.max_batch_tokens = 64
    engine._stepper.scheduler._oldest_first = True  # the first turn is the shortest's
    with engine._wake:  # the step loop sees both at once
        return submit(engine, GOOD, params), submit(engine, BAD, bad_params or params)


# Where the fault concerns one sequence: (what to replace, who raises).
ONE_SEQUENCE = {
    "find-prefix": ("cache.find", lambda tokens, namespace: tokens[: len(BAD)] == BAD),
    "open-table": ("cache.open", lambda tokens, *rest: tokens[: len(BAD)] == BAD),
    "fork": ("cache.fork", lambda table: table.num_tokens == len(BAD)),
    "choices": ("_stepper._admission.sequence", lambda group, index: index and group.request.prompt_token_ids == BAD),
    "reserve-first": ("cache.reserve", lambda table, count: count == len(BAD)),
    "reserve-later": ("cache.reserve", lambda table, count: count == len(BAD) + 2),
    "text": ("_stepper.outbox.delta", lambda sequence, *rest: is_bad(sequence)),
    "text-later": ("_stepper.outbox.delta", lambda sequence, *rest: is_bad(sequence) and sequence.num_generated > 2),
    "usage": ("_stepper.outbox.usage", lambda group: group.request.prompt_token_ids == BAD),
    "page-statistics": ("cache.pool.declare", once()),
}


def replace_at(monkeypatch, engine, path, when, error=INJECTED):
    *owners, name = path.split(".")
    owner = engine
    for part in owners:
        owner = getattr(owner, part)
    monkeypatch.setattr(owner, name, raising(getattr(owner, name), when, error))


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("seam", [name for name in ONE_SEQUENCE if name != "page-statistics"])
def test_a_fault_at_one_request_ends_it_alone(engine, monkeypatch, seam, params):
    want = run(engine, GOOD, params)
    replace_at(monkeypatch, engine, *ONE_SEQUENCE[seam])
    bad_params = replace(params, n=2) if seam in ("fork", "choices") else params
    good, bad = both(engine, params, bad_params)
    error = error_of(bad)
    assert isinstance(error, RequestFailed | StepFailed)
    assert "injected" not in str(error)
    assert tokens(collect(good)) == want


def test_statistics_that_find_no_memory_end_one_request(engine, monkeypatch):
    replace_at(monkeypatch, engine, *ONE_SEQUENCE["page-statistics"])
    assert isinstance(error_of(submit(engine, BAD)), StepFailed)


@pytest.mark.parametrize("seam", ["text", "choices"])
def test_a_panic_of_native_code_ends_one_request(engine, monkeypatch, seam):
    replace_at(monkeypatch, engine, *ONE_SEQUENCE[seam], Panic("panicked"))
    good, bad = both(engine, bad_params=replace(GREEDY, n=2))
    assert isinstance(error_of(bad), RequestFailed)
    assert len(tokens(collect(good))) == 6


class TestSampling:
    @pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
    @pytest.mark.parametrize("function", ["edit_logits", "probabilities", "_log_probabilities"])
    @pytest.mark.parametrize("error", [RuntimeError("injected"), Panic("injected")], ids=["exception", "panic"])
    def test_a_row_that_raises_ends_its_request_alone(self, engine, monkeypatch, params, function, error):
        """Also after the good row has drawn: its random stream goes on as if nothing had been."""
        params = replace(params, logprobs=1)
        want = run(engine, GOOD, params)
        real = containment.sample

        def sample(logits, rows):
            drawn = real(logits, rows) if function != "edit_logits" else None
            if any(row.prompt_token_ids == BAD for row in rows):
                raise error
            return drawn or real(logits, rows)

        monkeypatch.setattr(containment, "sample", sample)
        good, bad = both(engine, params)
        assert isinstance(error_of(bad), RequestFailed)
        assert tokens(collect(good)) == want

    def test_a_logits_processor_of_one_row(self, engine, monkeypatch):
        want = run(engine, GOOD, SEEDED)
        real = sampling.edit_logits

        def edit(logits, rows):
            if any(row.prompt_token_ids == BAD and len(row.output_token_ids) == 3 for row in rows):
                raise ValueError("a grammar without a state")
            return real(logits, rows)

        monkeypatch.setattr(sampling, "edit_logits", edit)
        good, bad = both(engine, SEEDED)
        seen = collect(bad)
        assert isinstance(seen[-1].error, RequestFailed)
        assert sum(isinstance(event, Delta) for event in seen) == 3
        assert tokens(collect(good)) == want

    def test_a_batch_that_fails_once_loses_nobody(self, engine, monkeypatch):
        want = run(engine, GOOD, SEEDED)
        monkeypatch.setattr(containment, "sample", raising(containment.sample, once()))
        good, bad = both(engine, SEEDED)
        assert tokens(collect(good)) == want
        assert len(tokens(collect(bad))) == 6

    def test_no_token_left(self, engine):
        params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4, stop_token_ids=tuple(range(16)))
        assert len(tokens(collect(submit(engine, BAD, params)))) == 4
        rows = [sampling.SamplerRow(replace(params, stop_token_ids=tuple(range(8))), BAD, [], [])]
        assert isinstance(sampling.sample(torch.zeros(1, 8), rows)[0].error, NoTokenLeft)


class TestBadLogits:
    def poison(self, engine, monkeypatch, value, after=0):
        real = engine._stepper.runner.run

        def poisoned(chunks):
            result = real(chunks)
            logits = result.logits.clone()
            ending = [chunk.sequence for chunk in chunks if chunk.ends_sequence]
            for row, sequence in enumerate(ending):
                if is_bad(sequence) and sequence.num_generated >= after:
                    logits[row] = value
            return replace(result, logits=logits)

        monkeypatch.setattr(engine._stepper.runner, "run", poisoned)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "all-minus-inf"])
    @pytest.mark.parametrize("after", [0, 3], ids=["first-token", "later"])
    @pytest.mark.parametrize("n", [1, 3], ids="n-{}".format)
    def test_they_end_one_request_alone(self, engine, monkeypatch, value, after, n):
        want = run(engine, GOOD, SEEDED)
        before = engine.snapshot().bad_logits
        self.poison(engine, monkeypatch, value, after)
        good, bad = both(engine, SEEDED, replace(SEEDED, n=n))
        assert isinstance(error_of(bad), BadLogits)
        assert tokens(collect(good)) == want
        assert engine.snapshot().bad_logits == before + 1

    def test_their_pages_are_not_found_again(self, engine, monkeypatch):
        run(engine, BAD)
        assert collect(submit(engine, BAD))[-1].usage.cached_tokens == 48
        self.poison(engine, monkeypatch, float("nan"))
        assert isinstance(error_of(submit(engine, BAD)), BadLogits)
        monkeypatch.undo()
        assert collect(submit(engine, BAD))[-1].usage.cached_tokens == 0
        assert collect(submit(engine, BAD))[-1].usage.cached_tokens == 48


def fail_in_commit(engine, monkeypatch):
    replace_at(monkeypatch, engine, "cache.commit", once(lambda table, ids, count: ids[: len(BAD)] == BAD))


def fail_in_forward(engine, monkeypatch):
    real = engine._loaded.model.forward
    monkeypatch.setattr(engine._loaded.model, "forward", raising(real, once(lambda *args, **kwargs: True)))


def fail_in_layer(engine, monkeypatch):
    layer = engine._loaded.model.model.layers[1]
    monkeypatch.setattr(layer, "forward", raising(layer.forward, once()))


def fail_in_pack(engine, monkeypatch):
    replace_at(monkeypatch, engine, "_stepper.runner._pack", once())


def fail_in_slots(engine, monkeypatch):
    replace_at(monkeypatch, engine, "cache.slots", once(lambda *args: args[2] == len(BAD)))


def fail_in_count(engine, monkeypatch):
    replace_at(monkeypatch, engine, "_stepper.outbox.count_step", once())


def fail_in_schedule(engine, monkeypatch):
    replace_at(monkeypatch, engine, "_stepper.scheduler._prompts", once(lambda: engine._stepper.scheduler.waiting))


def fail_in_draw(engine, monkeypatch):
    replace_at(monkeypatch, engine, "_stepper._draw", once())


@pytest.mark.parametrize(
    "inject",
    [
        fail_in_pack, fail_in_slots, fail_in_forward, fail_in_layer, fail_in_commit, fail_in_count, fail_in_schedule,
        fail_in_draw,
    ],
    ids=lambda inject: inject.__name__.removeprefix("fail_in_"),
)  # fmt: skip
@pytest.mark.parametrize("n", [1, 3], ids="n-{}".format)
def test_a_fault_of_a_step_ends_who_took_part(engine, monkeypatch, inject, n):
    inject(engine, monkeypatch)
    waiting = both(engine, replace(GREEDY, n=n))
    errors = [error_of(events) for events in waiting]
    assert all(isinstance(error, StepFailed) for error in errors), errors
    assert not any("injected" in str(error) for error in errors)
    assert len(run(engine, BAD)) == 6


def test_a_fault_of_a_step_spares_who_waits(engine, monkeypatch):
    monkeypatch.setattr(engine._stepper.scheduler, "max_running", 1)
    fail_in_layer(engine, monkeypatch)
    first, second = both(engine)
    assert isinstance(error_of(first), StepFailed)
    assert len(tokens(collect(second))) == 6


def test_a_fault_in_the_middle_of_a_prompt_leaves_its_whole_pages_good(engine, monkeypatch):
    want = run(engine, BAD)
    engine.cache.reset_prefix()
    engine._stepper.scheduler.max_batch_tokens = 16
    steps = []
    replace_at(monkeypatch, engine, "_stepper.runner._pack", lambda *_: steps.append(1) or len(steps) == 3)
    assert isinstance(error_of(submit(engine, BAD)), StepFailed)
    engine._stepper.scheduler.max_batch_tokens = 64
    seen = collect(submit(engine, BAD))
    assert seen[-1].usage.cached_tokens == 32
    assert tokens(seen) == want


def test_work_that_cannot_be_done_is_ended_and_not_left(engine, monkeypatch):
    """No page for the only request there is: a stalled queue with a green light is the worst of faults."""
    monkeypatch.setattr(engine._stepper.scheduler, "_come_in", lambda sequence, chunks: False)
    assert isinstance(error_of(submit(engine, BAD)), StepFailed)


@pytest.mark.parametrize("kind", [Progress, Delta, Finished], ids=lambda kind: kind.__name__.lower())
def test_a_caller_that_raises_loses_its_own_request(engine, kind):
    want = run(engine, GOOD)
    calls = []

    def sink(event):
        calls.append(event)
        if isinstance(event, kind):
            raise RuntimeError("the caller is gone")

    engine._stepper.scheduler.max_batch_tokens = 64
    submit(engine, BAD, on_event=sink)
    assert tokens(collect(submit(engine, GOOD))) == want
    deadline = time.monotonic() + 60
    while engine._stepper.groups:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert isinstance(calls[-1], kind)
    assert not any(isinstance(call, kind) for call in calls[:-1])


class TestDeath:
    def kill(self, engine, monkeypatch, path, when, error):
        replace_at(monkeypatch, engine, path, when, error)
        return error_of(submit(engine, BAD))

    def health(self, engine):
        with LocalClient(create_app(engine, Settings(model="m")), raise_server_exceptions=False) as client:
            completion = client.post("/v1/completions", json={"prompt": [1]})
            return client.get("/health").status_code, completion.status_code

    @pytest.mark.parametrize(
        ("path", "error"),
        [
            ("_stepper.runner.run", SystemExit("killed")),
            ("_stepper.outbox.delta", SystemExit("killed")),
            ("cache.free", CacheError("the ledger does not add up")),
        ],
        ids=["exit-in-the-step", "exit-in-the-text", "broken-ledger"],
    )
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_everybody_is_told_and_health_is_red(self, dying, monkeypatch, path, error):
        assert self.health(dying) == (200, 200)
        told = self.kill(dying, monkeypatch, path, lambda *args: True, error)
        assert isinstance(told, EngineDead)
        dying._thread.join(60)
        assert dying.state == "dead"
        assert self.health(dying) == (503, 503)
        with pytest.raises(EngineDead):
            submit(dying, GOOD)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_device_that_computes_no_more(self, dying, monkeypatch):
        """After some faults of a GPU each later call fails: such an engine must not look healthy."""
        from foveate.server import stepper

        def broken(device):
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(stepper, "check_device", broken)
        told = self.kill(dying, monkeypatch, "_stepper.runner.run", lambda chunks: True, RuntimeError("illegal"))
        assert isinstance(told, StepFailed)
        dying._thread.join(60)
        assert dying.state == "dead"
        assert self.health(dying)[0] == 503

    def test_a_loop_that_does_not_turn(self, engine, monkeypatch):
        entered, held, pack = threading.Event(), threading.Event(), engine._stepper.runner._pack

        def hang(*arguments):
            entered.set()
            held.wait(60)
            return pack(*arguments)

        monkeypatch.setattr(engine._stepper.runner, "_pack", hang)
        app = create_app(engine, Settings(model="m", stall_seconds=2))
        with LocalClient(app, raise_server_exceptions=False) as client:
            events = submit(engine, BAD)
            assert entered.wait(60)
            time.sleep(2.1)
            response = client.get("/health")
            assert (response.status_code, response.json()["error"]["code"]) == (503, "stalled")
            held.set()
            assert isinstance(collect(events)[-1], Finished)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL)
