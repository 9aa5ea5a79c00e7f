"""The log: a line per record, JSON or text, with request ids, without prompts; nobody can forge a line."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
import threading
import warnings

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.server import logs
from foveate.server.current_request import CURRENT, CurrentRequest

CANARY = "the-secret-of-the-prompt"
EVIL = ["\n", "\r", "\x1b[31m", "\x85", "\u2028", "\x00", "\x7f", "\t"]


def record(message, *arguments, **extra):
    made = logging.LogRecord("foveate.test", logging.INFO, "f.py", 1, message, arguments, None)
    made.__dict__.update(extra)
    return made


@pytest.fixture
def log_to(monkeypatch):
    """Configures the root logger onto a buffer, and puts everything back after the test."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    # The test's own client speaks in the same process.
    for client in ("httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        monkeypatch.setattr(logging.getLogger(client), "disabled", True)
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)

    def start(form, level="debug"):
        stream = io.StringIO()
        logs.configure(level, form, stream)
        return stream

    yield start
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(level)


@given(st.text(), st.text(min_size=1), st.text())
def test_json_is_one_line_that_says_it_all(message, label, value):
    token = CURRENT.set(CurrentRequest(label))
    try:
        line = logs.JsonFormatter().format(record("%s", message, fields={"status": 200, "given": value}))
    finally:
        CURRENT.reset(token)
    assert line.isprintable()
    entry = json.loads(line)
    assert (entry["message"], entry["request_id"], entry["given"]) == (message, label, value)
    assert (entry["level"], entry["logger"], entry["status"]) == ("info", "foveate.test", 200)


def test_time_is_utc():
    made = record("x")
    made.created, made.msecs = 1_700_000_000.25, 250.0
    assert json.loads(logs.JsonFormatter().format(made))["time"] == "2023-11-14T22:13:20.250Z"


@given(st.text(), st.text())
def test_text_is_one_line_too(message, value):
    line = logs.TextFormatter().format(record("%s", message, fields={"given": value}))
    assert len(line.splitlines()) == 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in line)


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
@pytest.mark.parametrize("form", [logs.JsonFormatter(), logs.TextFormatter()], ids=["json", "text"])
def test_an_exception_cannot_forge_a_line(form, evil):
    try:
        raise ValueError(f"a{evil}ERROR foveate: forged")
    except ValueError as error:
        made = record("it failed")
        made.exc_info = (type(error), error, error.__traceback__)
    lines = form.format(made).splitlines()
    assert "forged" in " ".join(lines)
    assert not any(line.startswith("ERROR") for line in lines)
    assert "\x1b" not in "".join(lines)
    if isinstance(form, logs.JsonFormatter):
        assert "ValueError" in json.loads(lines[0])["exception"]


def test_a_value_cannot_pass_for_two():
    line = logs.TextFormatter().format(record("x", fields={"request_id": "a status=500", "n": 3}))
    assert line == 'INFO foveate.test: x request_id="a status=500" n=3'


def test_warnings_and_libraries_speak_json_too(log_to):
    stream = log_to("json")
    library = logging.getLogger("transformers")
    handlers, propagate = library.handlers[:], library.propagate
    library.addHandler(logging.StreamHandler(stream))
    try:
        logs.adopt_libraries()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("two\nlines", stacklevel=1)
        library.warning("from a library")
    finally:
        library.handlers[:], library.propagate = handlers, propagate
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [entry["logger"] for entry in entries] == ["py.warnings", "transformers"]


def test_what_ends_the_process_is_json_too():
    code = "from foveate.server import logs; logs.configure('info', 'json'); raise ValueError('two\\nlines')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    entry = json.loads(line)
    assert (done.returncode, entry["level"], entry["message"]) == (1, "critical", "an exception ended the process")
    assert "ValueError: two\nlines" in entry["exception"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_requests_are_told_without_what_they_hold(log_to, client, form):
    stream = log_to(form)
    key = {"authorization": f"Bearer {CANARY}-key", "x-request-id": "mine"}
    for stop in (False, True):
        body = {"prompt": f"{CANARY} Hi", "max_tokens": 3, "stream": stop, "user": CANARY}
        assert client.post(f"/v1/completions?q={CANARY}", json=body, headers=key).status_code == 200
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": CANARY}], "max_tokens": 1})
    client.post("/v1/completions", json={"prompt": CANARY, "temperature": "hot"})
    client.post("/v1/completions", content=CANARY.encode())
    text = stream.getvalue()
    assert CANARY not in text
    if form == "json":
        entries = [json.loads(line) for line in text.splitlines()]
        told = [entry for entry in entries if entry["logger"] == "foveate.server.access"]
        assert [entry["status"] for entry in told] == [200, 200, 200, 400, 415]
        assert told[0]["message"] == "POST /v1/completions"
        assert told[0]["request_id"] == "mine"
        assert (told[0]["prompt_tokens"], told[0]["completion_tokens"]) == (len(CANARY) + 3, 3)
        assert told[0]["scheme"] == "dense"
        assert told[0]["duration_ms"] > 0
        assert len({entry["request_id"] for entry in told[2:]}) == 3, "those without an id of their own get one"


def test_an_error_is_told_with_its_request(log_to, client, engine):
    stream = log_to("json", "error")
    engine.refuse = RuntimeError("wrong in here")
    client.post("/v1/completions", json={"prompt": CANARY}, headers={"x-request-id": "lost"})
    entry, *rest = (json.loads(line) for line in stream.getvalue().splitlines())
    assert "wrong in here" in entry["exception"]
    assert entry["request_id"] == "lost"
    assert not rest


def test_a_line_after_a_request_is_not_about_it(log_to, client):
    stream = log_to("json", "info")
    background = logging.getLogger("foveate.test")

    async def ask_and_go_on():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://localhost") as http:
            assert (await http.get("/v1/models", headers={"x-request-id": "mine"})).status_code == 200
        background.info("something else")

    asyncio.run(ask_and_go_on())
    during, after = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (during["message"], during["request_id"]) == ("GET /v1/models", "mine")
    assert after["message"] == "something else"
    assert "request_id" not in after


def test_probes_are_quiet(log_to, client):
    stream = log_to("json", "info")
    for path in ("/health", "/ready", "/metrics"):
        client.get(path)
    client.get("/nosuch")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["GET /nosuch"]


@pytest.mark.parametrize("path", ["/a%0aERROR%20foveate:%20forged", "/%1b[31m", "/a%0d%0ab", "/" + "x" * 5000])
def test_a_path_cannot_forge_a_line(log_to, client, path):
    stream = log_to("text", "info")
    assert client.get(path).status_code == 404
    line, *rest = stream.getvalue().splitlines()
    assert not rest
    assert line.startswith("INFO foveate.server.access: GET /")
    assert len(line) < 500
    assert "\x1b" not in line
