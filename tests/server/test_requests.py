"""Requests against the real engine over HTTP: priority, time limits, full queues, clients that leave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import pytest

from foveate.server import generation
from foveate.server.app import create_app
from foveate.server.engine import Engine
from foveate.server.errors import to_api_error
from foveate.server.exceptions import QueueFull
from foveate.server.options import EngineOptions
from foveate.server.settings import Settings
from foveate.server.sse import DONE, PING

from .conftest import LocalClient

COMPLETIONS = "/v1/completions"
CHUNK = 16


class Slowed:
    """Makes every step of an engine take so long, and notes the chunks of each.

    Attributes:
        gate: While it is cleared, the step that has begun does not end.
        aborted_at: Steps that had begun when the engine heard of an abort, for each.
    """

    def __init__(self, engine, seconds):
        self.steps, self.aborted_at = [], []
        self.gate = threading.Event()
        self.gate.set()
        real, abort = engine._stepper.runner.run, engine.abort

        def run(chunks):
            self.steps.append([(chunk.sequence.group.request, chunk.start, chunk.count) for chunk in chunks])
            time.sleep(seconds)
            self.gate.wait()
            return real(chunks)

        def noted(request_id):
            abort(request_id)
            self.aborted_at.append(len(self.steps))

        engine._stepper.runner.run, engine.abort = run, noted


@pytest.fixture
def make(model_dir):
    """An engine with short chunks and slow steps, and an app around it."""
    engines = []

    def make(seconds=0.01, settings=None, **options):
        options = {"max_batch_tokens": CHUNK, "page_size": 16, "kv_cache_gib": 0.02, "prefix_reuse": False, **options}
        engine = Engine.load(EngineOptions(model_dir, dtype="float32", **options))
        engines.append((engine, slowed := Slowed(engine, seconds)))
        return engine, slowed, create_app(engine, Settings(model="m", **(settings or {})))

    yield make
    for engine, slowed in engines:
        slowed.gate.set()
        engine.shutdown(0)


def is_idle(engine):
    snapshot = engine.snapshot()
    return not (snapshot.pages_used or snapshot.running or snapshot.waiting)


SHAPES = {
    "one": {"prompt": [7] * 320},
    "n-3": {"prompt": [7] * 320, "n": 3},
    "two-prompts-n-2": {"prompt": [[7] * 320, [8] * 300], "n": 2},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moment", ["queued", "in-the-prompt", "in-the-answer"])
def test_a_client_that_leaves_costs_at_most_one_more_step(make, exchange, eventually, stream, shape, moment):
    engine, slowed, app = make(max_running=1 if moment == "queued" else 8)
    body = {**SHAPES[shape], "stream": stream, "max_tokens": 100, "ignore_eos": True}

    async def scenario():
        first = None
        if moment == "queued":
            first = exchange(app, COMPLETIONS, {"prompt": [1], "max_tokens": 300, "ignore_eos": True})
            await eventually(lambda: engine.snapshot().running == 1)
        caller = exchange(app, COMPLETIONS, body)
        prompts = 2 if shape.startswith("two") else 1
        if moment == "queued":
            await eventually(lambda: engine.snapshot().waiting == prompts)
        elif moment == "in-the-prompt":
            await eventually(lambda: len(slowed.steps) >= 3)
        else:
            await eventually(lambda: engine.snapshot().generated_tokens > 0)
        caller.leave()
        await caller.task
        mine = [request for request in engine._stepper.groups.values() if len(request.request.prompt_token_ids) > 1]
        await eventually(lambda: not any(item.sequences for item in mine) and not engine.snapshot().waiting)
        # The engine may just have chosen what it computes next.
        heard = slowed.aborted_at[prompts - 1]
        late = [step for step in slowed.steps[heard + 1 :] if any(len(part[0].prompt_token_ids) > 1 for part in step)]
        assert not late
        if first is not None:
            first.leave()
            await first.task
        await eventually(lambda: is_idle(engine))
        return caller

    caller = asyncio.run(scenario())
    assert DONE not in caller.body
    assert engine.state == "ready"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_priority_decides_who_is_next(make, exchange, eventually, stream):
    engine, slowed, app = make(max_running=1)
    slowed.gate.clear()

    async def scenario():
        ended = []

        async def ask(name, priority):
            caller = exchange(
                app, COMPLETIONS, {"prompt": [3], "max_tokens": 2, "priority": priority, "stream": stream}
            )
            await caller.task
            assert caller.status == 200
            ended.append(name)

        running = exchange(app, COMPLETIONS, {"prompt": [1], "max_tokens": 30, "priority": -9, "ignore_eos": True})
        await eventually(lambda: engine.snapshot().running == 1)
        asked = []
        for name, priority in [("later", 5), ("usual", 0), ("first", -5), ("usual too", 0)]:
            asked.append(asyncio.create_task(ask(name, priority)))
            await eventually(lambda: engine.snapshot().waiting == len(asked))
        slowed.gate.set()
        await asyncio.gather(running.task, *asked)
        return ended

    assert asyncio.run(scenario()) == ["first", "usual", "usual too", "later"]


class TestTimeout:
    @pytest.mark.parametrize(
        ("timeout", "settings"), [(0.05, {}), (500, {"request_timeout": 0.05}), (None, {"request_timeout": 0.05})]
    )
    def test_the_smaller_one_counts(self, make, eventually, events_of, timeout, settings):
        engine, _, app = make(settings=settings)
        body = {"prompt": [7] * 300, "max_tokens": 100, "timeout": timeout, "ignore_eos": True}
        with LocalClient(app) as client:
            whole = client.post(COMPLETIONS, json=body)
            status = 408 if timeout == 0.05 else 504  # its own wish is no failure of the server
            assert (whole.status_code, whole.json()["error"]["code"]) == (status, "request_timeout")
            assert "0.05 seconds" in whole.json()["error"]["message"]
            *_, last = events_of(client.post(COMPLETIONS, json={**body, "stream": True}))
            assert last["error"]["code"] == "request_timeout"
            asyncio.run(eventually(lambda: is_idle(engine)))

    @pytest.mark.parametrize("timeout", [0, -1, "5", [1]], ids=repr)
    def test_what_is_no_time_is_refused(self, client, timeout):
        response = client.post(COMPLETIONS, json={"prompt": "a", "timeout": timeout})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "timeout")

    @pytest.mark.parametrize("priority", [1.5, "1", 2**31, -(2**31) - 1, True], ids=repr)
    def test_what_is_no_priority_is_refused(self, client, priority):
        response = client.post(COMPLETIONS, json={"prompt": "a", "priority": priority})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


class TestFullQueue:
    """One request runs, others wait: how many, of how many tokens, and when to come again."""

    def fill(self, make, exchange, eventually, ask, **options):
        engine, slowed, app = make(max_running=1, **options)

        async def scenario():
            first = exchange(app, COMPLETIONS, {"prompt": [1], "max_tokens": 400, "ignore_eos": True})
            await eventually(lambda: engine.snapshot().generated_tokens > 2)
            slowed.gate.clear()
            callers = []
            answers = [await ask(app, callers, engine)]
            slowed.gate.set()
            for caller in [first, *callers]:
                caller.leave()
                await caller.task
            await eventually(lambda: is_idle(engine))
            return answers[0]

        return asyncio.run(scenario())

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
    def test_requests(self, make, exchange, eventually, stream):
        async def ask(app, callers, engine):
            for _ in range(2):
                callers.append(exchange(app, COMPLETIONS, {"prompt": [2], "stream": stream}))
            await eventually(lambda: engine.snapshot().waiting == 2)
            refused = exchange(app, COMPLETIONS, {"prompt": [2], "stream": stream})
            await refused.task
            return refused

        check_full(self.fill(make, exchange, eventually, ask, max_queued_requests=2), "2 of at most 2 requests")

    def test_tokens(self, make, exchange, eventually):
        async def ask(app, callers, engine):
            # Longer than all that may wait: but nothing waits, and it could not come at any other time.
            callers.append(exchange(app, COMPLETIONS, {"prompt": [2] * 150}))
            await eventually(lambda: engine.snapshot().waiting == 1)
            refused = exchange(app, COMPLETIONS, {"prompt": [2]})
            await refused.task
            return refused

        refused = self.fill(make, exchange, eventually, ask, max_queued_tokens=100)
        check_full(refused, "150 of at most 100 prompt tokens")

    def test_what_fits_is_taken(self, make, exchange, eventually):
        async def ask(app, callers, engine):
            for tokens in (50, 30, 20):
                callers.append(exchange(app, COMPLETIONS, {"prompt": [2] * tokens}))
                await eventually(lambda: engine.snapshot().waiting == len(callers))
            refused = exchange(app, COMPLETIONS, {"prompt": [2]})
            await refused.task
            return refused

        refused = self.fill(make, exchange, eventually, ask, max_queued_tokens=100)
        check_full(refused, "100 of at most 100 prompt tokens")

    def test_a_batch_fills_half(self, make):
        engine, _, _ = make()
        engine._options = EngineOptions("m", max_queued_requests=6, max_queued_tokens=1000)
        assert "3 of at most 3 requests" in str(refusal(engine, waiting=[1, 1, 1], tokens=1, priority=1))
        assert "400 of at most 500 prompt tokens" in str(refusal(engine, waiting=[400], tokens=101, priority=1))
        check_queue(engine, [1, 1, 1], [1])
        check_queue(engine, [400], [101])

    def test_prompts_of_one_request_come_together_or_not_at_all(self, make):
        engine, _, _ = make()
        engine._options = EngineOptions("m", max_queued_requests=6)
        check_queue(engine, [1, 1], [1] * 4)
        check_queue(engine, [], [1] * 64)
        with pytest.raises(QueueFull, match="2 of at most 6 requests"):
            check_queue(engine, [1, 1], [1] * 5)

    def test_the_time_to_wait_comes_from_the_measured_rate(self, make):
        engine, _, _ = make()
        pace = engine._stepper.pace
        engine._options = EngineOptions("m", max_queued_tokens=1000)
        for rate, excess, seconds in [(100.0, 250, 3), (100.0, 10, 1), (1.0, 500, 120), (0.0, 500, 1)]:
            pace._tokens, pace._seconds = rate, 1.0
            refused = refusal(engine, waiting=[400, 600 - 1], tokens=excess + 1)
            assert refused.headers["retry-after"] == str(seconds)


def check_queue(engine, waiting, come, priority=0):
    """Prompts of ``come`` tokens come at once when prompts of ``waiting`` tokens wait."""

    def group(count):
        return SimpleNamespace(request=SimpleNamespace(prompt_token_ids=[0] * count, priority=priority))

    engine._admission.check_queue(
        [group(count) for count in come],
        [group(count) for count in waiting],
        engine._stepper.scheduler,
        engine._options,
    )


def refusal(engine, waiting, tokens, priority=0):
    """What a client is told whose prompt of ``tokens`` comes when prompts of ``waiting`` tokens wait."""
    with pytest.raises(QueueFull) as told:
        check_queue(engine, waiting, [tokens], priority)
    return to_api_error(told.value)


def check_full(refused, words):
    assert refused.status == 429
    error = json.loads(refused.body)["error"]
    assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
    assert words in error["message"]
    headers = dict(refused.sent[0]["headers"])
    assert 1 <= int(headers[b"retry-after"]) <= 120


@pytest.mark.parametrize("progress", [False, True], ids=["silent", "with-progress"])
def test_pings_while_a_prompt_is_computed(make, exchange, monkeypatch, progress):
    """Steps that the client does not hear of are no sign of life for the proxies between."""
    monkeypatch.setattr(generation, "PING_SECONDS", 1.0 if progress else 0.05)
    _, _, app = make(0.03)

    async def scenario():
        body = {"prompt": [7] * 480, "max_tokens": 1, "stream": True, "return_progress": progress}
        caller = exchange(app, COMPLETIONS, body)
        await caller.task
        return caller.body

    body = asyncio.run(scenario())
    assert body.endswith(DONE)
    if progress:
        assert body.count(PING) <= 1, "progress events are signs of life, no ping is needed beside them"
    else:
        assert body.count(PING) >= 4


def test_progress_in_the_shape_that_clients_know(make, events_of):
    _, _, app = make(0.001, prefix_reuse=True)
    with LocalClient(app) as client:
        body = {"prompt": [7] * 100, "max_tokens": 1, "stream": True, "return_progress": True}
        for cached in (0, 96):
            events = events_of(client.post(COMPLETIONS, json=body))
            told = [event for event in events if "prompt_progress" in event]
            assert all(event["choices"] == [] for event in told)
            assert all(set(event["prompt_progress"]) == {"total", "cached", "processed", "time_ms"} for event in told)
            processed = [event["prompt_progress"]["processed"] for event in told]
            assert processed == ([*range(CHUNK, 100, CHUNK), 100] if not cached else [100])
            assert {event["prompt_progress"]["total"] for event in told} == {100}
            assert {event["prompt_progress"]["cached"] for event in told} == {cached}
            times = [event["prompt_progress"]["time_ms"] for event in told]
            assert times == sorted(times)
            assert events.index(told[-1]) < events.index(next(event for event in events if event["choices"]))


def test_too_long_a_request_is_told_in_the_words_that_clients_look_for(make):
    _, _, app = make()
    with LocalClient(app) as client:
        for path, body in [
            (COMPLETIONS, {"prompt": [1] * 500, "max_tokens": 100}),
            (COMPLETIONS, {"prompt": [1] * 513}),
            (COMPLETIONS, {"prompt": "a" * 513}),
            (COMPLETIONS, {"prompt": "a" * 10_000}),
            (COMPLETIONS, {"prompt": [1], "max_tokens": 512, "stream": True}),
        ]:
            response = client.post(path, json=body)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
            assert "maximum context length is 512 tokens" in error["message"]
