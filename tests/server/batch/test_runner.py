"""The runner over the fake engine: one record a line, a bounded number in work, stops and goes on."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from foveate.server.batch.endpoints import ENDPOINTS, prepare
from foveate.server.batch.errors import BatchError, EngineStopped
from foveate.server.batch.ledger import Ledger
from foveate.server.batch.runner import BatchRunner, Source, open_input
from foveate.server.errors import ApiError
from foveate.server.exceptions import BadLogits, EngineDead, QueueFull, StepFailed
from foveate.server.json_text import json_text
from foveate.server.settings import Settings
from foveate.server.state import ServerState

from .files import chat_line, completion_line, read_records, response_line, write_lines


@pytest.fixture
def batch(engine, tmp_path):
    """Runs lines until the end, or until ``stop_at`` of them are done; returns the records of this and earlier runs."""

    def run(lines=None, stop_at=None, at_once=4, finish=True, **options):
        source, output = tmp_path / "input.jsonl", tmp_path / "output.jsonl"
        if lines is not None:
            write_lines(source, lines)
        state = ServerState(Settings(model="fake-model", **options))
        state.serve(engine)
        ledger = Ledger(tmp_path / "state", output, None, {})

        async def work():
            stop = asyncio.Event()

            def on_done(count):
                if stop_at is not None and ledger.done >= stop_at:
                    stop.set()

            with open_input(source) as file, ThreadPoolExecutor(1) as threads:
                lines = Source(file, ledger, ENDPOINTS.keys(), state.settings.max_body_bytes)
                return await BatchRunner(state, lines, ledger, "", threads, lambda: at_once, on_done).run(stop)

        try:
            assert asyncio.run(work()) == (stop_at is None)
        finally:
            ledger.close()
            state.text.close()
        return {record["custom_id"]: record for record in read_records(output)}

    return run


def test_every_line_has_a_record(batch, engine):
    records = batch([chat_line(str(number)) for number in range(30)] + [completion_line("last", n=2)])
    assert len(records) == 31
    chat, completion = records["0"]["response"], records["last"]["response"]
    assert (chat["status_code"], chat["body"]["object"]) == (200, "chat.completion")
    assert [choice["index"] for choice in completion["body"]["choices"]] == [0, 1]
    assert {record["error"] for record in records.values()} == {None}
    assert len({record["id"] for record in records.values()}) == 31
    assert engine.pages_used == 0


def test_responses(batch, engine):
    lines = [
        response_line("whole", instructions="Be brief."),
        response_line("cut", max_output_tokens=3),
        response_line("refused", previous_response_id="resp_1"),
        response_line("streamed", stream=True),
    ]
    told = {name: record["response"] for name, record in batch(lines).items()}
    assert [told[line["custom_id"]]["status_code"] for line in lines] == [200, 200, 400, 400]
    whole, cut = told["whole"]["body"], told["cut"]["body"]
    assert (whole["object"], whole["status"], cut["status"]) == ("response", "completed", "incomplete")
    assert whole["output"][0]["content"][0]["text"] == engine.script
    assert cut["usage"]["output_tokens"] == 3
    refused = [told[name]["body"]["error"]["param"] for name in ("refused", "streamed")]
    assert refused == ["previous_response_id", "stream"]
    assert engine.pages_used == 0


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"custom_id": "\xff"}', "invalid_json"),
        (b"\x00", "invalid_json"),
        (b"[" * 1500, "invalid_json"),
        (b'{"custom_id": "b", "x": NaN}', "invalid_json"),
        (b'{"custom_id": "b", "x": "' + b"x" * 3000 + b'"}', "line_too_long"),
        ({"method": "POST"}, "invalid_custom_id"),
        (chat_line(5), "invalid_custom_id"),
        (chat_line(""), "invalid_custom_id"),
        (chat_line("x" * 513), "invalid_custom_id"),
        ({**chat_line("b"), "method": "GET"}, "invalid_method"),
        ({**chat_line("b"), "url": "/v1/embeddings"}, "invalid_url"),
        ({**chat_line("b"), "url": "http://127.0.0.1/v1/chat/completions"}, "invalid_url"),
        ({**chat_line("b"), "url": ["/v1/completions"]}, "invalid_url"),
        ({**chat_line("b"), "body": "Hi"}, "invalid_body"),
        (chat_line("a"), "duplicate_custom_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_line_that_is_no_request(batch, line, code):
    records = batch([chat_line("a"), line, chat_line("c")], max_body_bytes=2000)
    assert len(records) == 3
    [(name, record)] = [(name, record) for name, record in records.items() if record["error"]]
    assert (record["response"], record["error"]["code"], record["error"]["line"]) == (None, code, 2)
    assert name == ("b" if code in ("invalid_method", "invalid_url", "invalid_body") else None)


@pytest.mark.parametrize(
    ("line", "status", "code", "param"),
    [
        (chat_line("b", temperature=9), 400, "invalid_value", "temperature"),
        (chat_line("b", messages=[]), 400, "invalid_value", "messages"),
        (chat_line("b", stream=True), 400, "unsupported_parameter", "stream"),
        (chat_line("b", model="other"), 404, "model_not_found", "model"),
        (chat_line("b", attention={"scheme": "none"}), 400, "unknown_scheme", "attention"),
        (completion_line("b", prompt="x" * 5000), 400, "context_length_exceeded", None),
        (completion_line("b", prompt="x" * 50_000), 400, "context_length_exceeded", "prompt"),
        (completion_line("b", prompt=[[1, 2], [300_000]]), 400, None, "prompt"),
        (completion_line("b", n=10_000), 400, "invalid_value", "n"),
    ],
    ids=["field", "messages", "stream", "model", "scheme", "tokens", "bytes", "ids", "n"],
)
def test_a_request_that_is_refused(batch, line, status, code, param):
    records = batch([chat_line("a"), line, chat_line("c")])
    assert [records[name]["response"]["status_code"] for name in "abc"] == [200, status, 200]
    assert records["b"]["error"] is None
    error = records["b"]["response"]["body"]["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_ids_are_found_once_whatever_their_lines_hold(batch):
    bad = {**chat_line("a"), "method": "GET"}
    records = read_all = batch([bad, chat_line("a"), chat_line("a"), chat_line("b")])
    assert records["a"]["error"]["code"] == "invalid_method"
    assert records["b"]["response"]["status_code"] == 200
    assert sorted(map(str, read_all)) == ["None", "a", "b"]


def test_blank_lines_marks_and_endings_are_passed_over(batch):
    lines = [b"\xef\xbb\xbf" + b'{"custom_id": "a"}', b"", b"  \r", b'{"custom_id": "b"}\r']
    records = batch(lines)
    assert {record["error"]["line"]: name for name, record in records.items()} == {1: "a", 4: "b"}


def test_no_more_lines_than_allowed_are_in_work(batch, engine):
    engine.gate.clear()
    seen = []
    submit = engine.submit

    def submitting(*requests):
        submit(*requests)
        seen.append(engine.pages_used)
        if len(seen) == 3:
            engine.gate.set()

    engine.submit = submitting
    engine.script = "xy"
    assert len(batch([chat_line(str(number)) for number in range(20)], at_once=3)) == 20
    assert max(seen) == 3


def test_long_lines_are_fewer_at_once(batch, engine, monkeypatch):
    monkeypatch.setattr("foveate.server.batch.runner.MAX_BYTES_AT_ONCE", 1500)
    seen = []
    submit = engine.submit
    engine.gate.clear()

    def submitting(*requests):
        submit(*requests)
        seen.append(engine.pages_used)
        if len(seen) == 2:
            engine.gate.set()

    engine.submit = submitting
    engine.script = "xy"
    batch([completion_line(str(number), prompt="x" * 900) for number in range(8)], at_once=8)
    assert max(seen) == 2


def test_it_stops_and_goes_on(batch, engine):
    engine.script = "xy"
    lines = [chat_line(str(number)) for number in range(20)]
    engine.step_seconds = 0.001
    first = batch(lines, stop_at=7)
    assert 7 <= len(first) < 20
    assert engine.pages_used == 0
    engine.step_seconds = 0
    asked = len(engine.requests)
    records = batch()
    assert sorted(records, key=int) == [str(number) for number in range(20)]
    assert all(records[name] == record for name, record in first.items())
    assert len(engine.requests) - asked == 20 - len(first)


def test_a_line_has_the_time_that_it_asks_for(batch, engine):
    engine.gate.clear()
    told = batch([completion_line("a", timeout=0.05)])["a"]["response"]
    error = told["body"]["error"]
    assert (told["status_code"], error["code"], error["param"]) == (408, "request_timeout", "timeout")


def test_lines_wait_behind_requests(batch, engine):
    batch([chat_line("a"), chat_line("b", priority=-5), chat_line("c", priority=-(2**31))])
    first, second, third = sorted((request.priority for request in engine.requests), reverse=True)
    assert first - second == 5
    assert third > 2**29


def test_records_are_not_written_on_the_event_loop(batch, monkeypatch):
    threads = set()

    def watched(*given, **options):
        threads.add(threading.current_thread())
        return json_text(*given, **options)

    monkeypatch.setattr("foveate.server.batch.records.json_text", watched)
    batch([chat_line("a", logprobs=True), chat_line("b")])
    assert threads
    assert threading.current_thread() not in threads  # where the loop runs


def test_a_full_queue_is_waited_for(batch, engine, monkeypatch):
    monkeypatch.setattr("foveate.server.batch.runner.QUEUE_SECONDS", 0.001)
    submit, times = engine.submit, iter(range(3))

    def full_at_first(request):
        if next(times, None) is not None:
            raise QueueFull("9 requests", 1)
        submit(request)

    engine.submit = full_at_first
    assert batch([chat_line("a")])["a"]["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("code", "times", "tries", "status"),
    [("grammar_timeout", 2, 3, 200), ("grammar_timeout", 9, 3, 503), ("text_timeout", 2, 1, 503)],
)
def test_a_line_that_found_no_time_is_tried_again(batch, monkeypatch, code, times, tries, status):
    monkeypatch.setattr("foveate.server.batch.runner.QUEUE_SECONDS", 0.001)
    seen = []

    async def busy_at_first(*given):
        seen.append(given)
        if len(seen) <= times:
            raise ApiError(503, "x", code=code)
        return await prepare(*given)

    monkeypatch.setattr("foveate.server.batch.runner.prepare", busy_at_first)
    assert batch([chat_line("a")])["a"]["response"]["status_code"] == status
    assert len(seen) == tries


def test_a_line_is_left_undone_where_no_request_is_taken(batch, engine, monkeypatch):
    monkeypatch.setattr("foveate.server.batch.runner.QUEUE_SECONDS", 0.001)

    tries = []

    async def busy(*given):
        tries.append(given)
        engine.state = "draining"
        raise ApiError(503, "x", code="grammar_timeout")

    with monkeypatch.context() as patch:
        patch.setattr("foveate.server.batch.runner.prepare", busy)
        with pytest.raises(EngineStopped):
            batch([chat_line("a")])
    assert len(tries) == 1
    engine.state = "ready"
    assert batch()["a"]["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("error", "tries", "code"),
    [
        (BadLogits("nan"), 1, "bad_logits"),
        (StepFailed("x"), 3, "step_failed"),
        (RuntimeError("x"), 1, "internal_error"),
    ],
    ids=["logits", "step", "unknown"],
)
def test_a_failure_is_its_lines_own(batch, engine, error, tries, code):
    engine.fail = error
    records = batch([chat_line("a")])
    assert records["a"]["response"]["status_code"] == 500
    assert records["a"]["response"]["body"]["error"]["code"] == code
    assert len(engine.requests) == tries


def test_an_engine_that_stops_leaves_its_lines_undone(batch, engine):
    engine.script = "xy"
    batch([chat_line(str(number)) for number in range(9)], stop_at=3)
    engine.refuse = EngineDead("gone")
    with pytest.raises(EngineStopped):
        batch()
    engine.refuse = None
    records = batch()
    assert [records[str(number)]["response"]["status_code"] for number in range(9)] == [200] * 9


def test_an_input_that_is_no_file(tmp_path):
    with pytest.raises(BatchError, match="not a plain file"):
        open_input(tmp_path)
    with pytest.raises(BatchError, match="No such file"):
        open_input(tmp_path / "none")


def test_an_id_of_a_line_that_is_written_already_is_a_duplicate(batch):
    records = batch([chat_line("a"), chat_line("b"), chat_line("c")], stop_at=1, at_once=1)
    assert set(records) == {"a"}
    records = batch([chat_line("a"), chat_line("b"), chat_line("a")], at_once=1)
    assert records["b"]["response"]["status_code"] == 200
    assert records[None]["error"]["code"] == "duplicate_custom_id"
