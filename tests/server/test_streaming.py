"""Streams: framing, usage and progress events, errors inside, clients that leave or stop reading."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.server import generation
from foveate.server.app import create_app
from foveate.server.exceptions import BadLogits, StepFailed
from foveate.server.settings import Settings
from foveate.server.sse import DONE, PING, frame
from foveate.server.streaming import QUEUED_EVENTS

from .conftest import CHUNK

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT = {"prompt": "Hi", "max_tokens": 1000}
ENDPOINTS = [
    pytest.param("/v1/completions", TEXT, id="completions"),
    pytest.param("/v1/chat/completions", CHAT, id="chat"),
]


@given(st.text())
def test_a_frame_is_one_line_of_ascii(text):
    data = frame({"text": text})
    line = data.removesuffix(b"\n\n")
    assert line.isascii()
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line.removeprefix(b"data: ")) == {"text": text}


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_usage_comes_last_and_only_when_asked(client, events_of, path, body):
    plain = events_of(client.post(path, json={**body, "stream": True}))
    asked = events_of(client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert all(event["choices"] and "usage" not in event for event in plain)
    assert len(asked) == len(plain) + 1
    assert all(event["usage"] is None for event in asked[:-1])
    assert asked[-1]["choices"] == []
    whole = client.post(path, json=body).json()["usage"]
    assert asked[-1]["usage"] == whole


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_progress_only_when_asked(client, events_of, path, body):
    events = events_of(client.post(path, json={**body, "stream": True, "return_progress": True}))
    progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert progress
    assert all(not event["choices"] for event in events if "prompt_progress" in event)
    assert progress[-1]["processed"] == progress[-1]["total"]
    assert progress[-1]["time_ms"] == 250
    assert not any("prompt_progress" in e for e in events_of(client.post(path, json={**body, "stream": True})))


def test_progress_over_several_prompts(client, events_of):
    body = {"prompt": ["a" * 100, "b" * 200], "stream": True, "return_progress": True}
    progress = [
        e["prompt_progress"] for e in events_of(client.post("/v1/completions", json=body)) if "prompt_progress" in e
    ]
    assert {step["total"] for step in progress} == {300}
    processed = [step["processed"] for step in progress]
    assert processed == sorted(processed)
    assert processed[-1] == 300


FAILURES = [
    pytest.param(StepFailed("at 0x7f3a in foo.py"), 500, "step_failed", id="step"),
    pytest.param(BadLogits("row 5"), 500, "bad_logits", id="logits"),
    pytest.param(RuntimeError('File "secret.py", 0x7f3a'), 500, "internal_error", id="unexpected"),
]


@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_failure_before_the_answer_is_complete(client, engine, path, body, failure, status, code):
    engine.fail = failure
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert str(failure) not in response.text
    assert engine.pages_used == 0


@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_failure_inside_a_stream(client, engine, events_of, path, body, failure, status, code):
    engine.fail = failure
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200
    *chunks, last = events_of(response)
    assert chunks
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert last["error"]["code"] == code
    assert str(failure) not in response.text


def test_one_failed_prompt_ends_the_others(client, engine):
    engine.fail = StepFailed("x")
    assert client.post("/v1/completions", json={"prompt": ["a", "b", "c"]}).status_code == 500
    assert engine.pages_used == 0


def test_one_refused_prompt_takes_back_the_others(client, engine):
    response = client.post("/v1/completions", json={"prompt": [[1], [1] * 4090]})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert [request.request_id for request in engine.requests] == engine.aborts
    assert engine.pages_used == 0


def test_shutdown_ends_a_stream_with_an_error(engine, settings, exchange, eventually):
    async def scenario():
        engine.hold_after = 4
        caller = exchange(create_app(engine, settings), "/v1/completions", {**TEXT, "stream": True})
        await eventually(lambda: len(caller.sent) > 3)
        await asyncio.to_thread(engine.shutdown, 0)
        await caller.task
        return caller.body

    body = asyncio.run(scenario())
    assert body.endswith(DONE)
    assert json.loads(body.split(b"\n\n")[-3].removeprefix(b"data: "))["error"]["code"] == "aborted"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("moment", ["before-prefill", "between-chunks", "while-writing"])
@pytest.mark.parametrize("shape", [{"prompt": "x" * 640}, {"prompt": ["x" * 640, "y" * 640], "n": 2}], ids=["1", "4"])
def test_a_client_that_leaves_frees_its_requests(engine, settings, exchange, eventually, stream, moment, shape):
    async def scenario():
        engine.gate.clear()
        caller = exchange(create_app(engine, settings), "/v1/completions", {**TEXT, **shape, "stream": stream})
        prompts = 1 if isinstance(shape["prompt"], str) else 2
        await eventually(lambda: len(engine.requests) == prompts)
        if moment != "before-prefill":
            chunks = 640 // CHUNK
            engine.hold_after = prompts * (chunks // 2 if moment == "between-chunks" else chunks + 3)
            engine.gate.set()
            await eventually(lambda: not engine.gate.is_set())
        assert (engine.generated > 0) == (moment == "while-writing")
        caller.leave()
        await eventually(lambda: engine.pages_used == 0)
        await caller.task
        return caller

    caller = asyncio.run(scenario())
    assert set(engine.aborts) == {request.request_id for request in engine.requests}
    assert DONE not in caller.body


LONG_ANSWER = {"prompt": "Hi", "max_tokens": 8 * QUEUED_EVENTS, "stream": True}


def test_a_burst_is_no_reason_to_cut_off(client, engine, events_of):
    engine.script = "x" * 8 * QUEUED_EVENTS
    events = events_of(client.post("/v1/completions", json=LONG_ANSWER))
    assert "".join(event["choices"][0]["text"] for event in events) == engine.script


def test_a_client_that_stops_reading_is_cut_off(engine, exchange, eventually):
    async def scenario():
        engine.script = "x" * 8 * QUEUED_EVENTS
        engine.step_seconds = 0.001
        app = create_app(engine, Settings(model="fake-model", write_seconds=0.1))
        caller = exchange(app, "/v1/completions", LONG_ANSWER)
        await eventually(lambda: len(caller.sent) > 1)
        caller.reading.clear()
        await eventually(lambda: engine.pages_used == 0)
        await caller.task
        return caller

    caller = asyncio.run(scenario())
    assert caller.cut
    assert len(engine.aborts) == 1
    assert engine.generated < 8 * QUEUED_EVENTS


def test_a_client_that_reads_too_slowly_is_told(engine, exchange, eventually):
    async def scenario():
        engine.script = "x" * 8 * QUEUED_EVENTS
        engine.hold_after = 2 * QUEUED_EVENTS
        app = create_app(engine, Settings(model="fake-model", write_seconds=0.1))
        caller = exchange(app, "/v1/completions", LONG_ANSWER)
        caller.seconds_per_read = 0.02
        await eventually(lambda: not engine.gate.is_set())
        await asyncio.sleep(0.2)  # more than the queue holds waits for longer than it may
        engine.gate.set()
        await caller.task
        return caller

    caller = asyncio.run(scenario())
    assert not caller.cut
    assert caller.body.endswith(DONE)
    assert json.loads(caller.body.split(b"\n\n")[-3].removeprefix(b"data: "))["error"]["code"] == "slow_reader"
    assert len(engine.aborts) == 1
    assert engine.pages_used == 0


def test_pings_while_nothing_comes(engine, settings, exchange, eventually, monkeypatch):
    monkeypatch.setattr(generation, "PING_SECONDS", 0.01)

    async def scenario():
        engine.gate.clear()
        caller = exchange(create_app(engine, settings), "/v1/chat/completions", {**CHAT, "stream": True})
        await eventually(lambda: caller.body.count(PING) >= 3)
        engine.gate.set()
        await caller.task
        return caller.body

    body = asyncio.run(scenario())
    assert body.startswith(PING)
    assert body.endswith(DONE)


def test_total_time_is_limited(client_of, engine, events_of):
    engine.gate.clear()
    client = client_of(request_timeout=0.05)
    whole = client.post("/v1/completions", json=TEXT)
    assert (whole.status_code, whole.json()["error"]["code"]) == (504, "request_timeout")
    assert whole.headers["x-should-retry"] == "false"
    [event] = events_of(client.post("/v1/completions", json={**TEXT, "stream": True}))
    assert event["error"]["code"] == "request_timeout"
    assert len(engine.aborts) == 2
    assert engine.pages_used == 0


def test_time_is_up_while_events_wait_to_be_read(engine, exchange):
    """A client that always has something left to read would have no limit otherwise."""

    async def scenario():
        engine.script = "x" * 1000
        engine.hold_after = 200
        app = create_app(engine, Settings(model="fake-model", request_timeout=0.3))
        caller = exchange(app, "/v1/completions", {**TEXT, "stream": True})
        caller.seconds_per_read = 0.02
        await caller.task
        return caller.body

    events = asyncio.run(scenario()).split(b"\n\n")
    assert json.loads(events[-3].removeprefix(b"data: "))["error"]["code"] == "request_timeout"
    assert len(events) < 100
    assert len(engine.aborts) == 1


def test_many_streams_a_third_cut_off(engine, settings, exchange, eventually):
    """What remains is complete, and nothing is left in use."""

    async def scenario():
        engine.gate.clear()
        app = create_app(engine, settings)
        callers = [exchange(app, "/v1/chat/completions", {**CHAT, "stream": True}) for _ in range(60)]
        await eventually(lambda: len(engine.requests) == 60)
        engine.hold_after = 300
        engine.gate.set()
        await eventually(lambda: not engine.gate.is_set())
        assert engine.generated > 0
        for caller in callers[::3]:
            caller.leave()
        await eventually(lambda: len(engine.aborts) == 20)
        engine.gate.set()
        await asyncio.gather(*(caller.task for caller in callers))
        return callers

    callers = asyncio.run(scenario())
    kept = [caller for number, caller in enumerate(callers) if number % 3]
    assert all(caller.body.endswith(DONE) and b'"finish_reason":"stop"' in caller.body for caller in kept)
    assert engine.pages_used == 0
