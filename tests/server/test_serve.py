"""The server on a loopback port, asked by the OpenAI client and by raw sockets; loading and stopping."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import pytest

from foveate.server import engine as engine_module
from foveate.server import serve
from foveate.server.app import create_app
from foveate.server.serve import FoveateServer, address_of, listen, server_config
from foveate.server.settings import Settings
from foveate.server.state import state_of_app

ANSWER = "Grüße, 世界! 🦊 data: [DONE]\n\ndata: x"
HI = [{"role": "user", "content": "Hi"}]


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


class Running:
    """A server in a thread."""

    def __init__(self, **options):
        settings = Settings(model="fake-model", port=0, **options)
        listener = listen(settings.host, settings.port)
        self.url = address_of(listener)
        self.port = listener.getsockname()[1]
        self.listener = listener
        app = create_app(None, settings)
        self.server = FoveateServer(server_config(app, settings), state_of_app(app), listener)
        self._loader = threading.Thread(target=self.server.load)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self._loader.start()
        self._thread.start()

    def health(self):
        return httpx.get(self.url + "/health").status_code

    def join(self):
        self._thread.join(60)
        self._loader.join(60)
        assert not self._thread.is_alive()
        assert not self._loader.is_alive()

    def raw(self, data, timeout=60.0):
        """Everything that the server says to ``data`` until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.sendall(data)
            said = b""
            try:
                while part := connection.recv(65536):
                    said += part
            except ConnectionResetError:
                pass
            return said


@pytest.fixture
def running(engine, monkeypatch):
    """Starts a server around the fake engine; the block's end stops it."""

    @contextmanager
    def start(load=lambda settings: engine, **options):
        monkeypatch.setattr(engine_module.Engine, "load", staticmethod(load))
        server = Running(**options)
        try:
            yield server
        finally:
            server.server.should_exit = True
            server.join()

    return start


@pytest.fixture
def ready(running):
    with running() as server:
        wait_for(lambda: server.health() == 200)
        yield server


@pytest.fixture
def client(ready):
    with openai.OpenAI(base_url=ready.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_completions(client):
    answer = client.completions.create(model="fake-model", prompt="Hi", max_tokens=100, logprobs=1)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert answer.usage.total_tokens == 2 + len(ANSWER.encode())
    assert answer.usage.model_extra["attention"]["keys_read_fraction"] == 0.5
    assert answer.choices[0].logprobs.token_logprobs[0] == -0.5

    chunks = list(client.completions.create(model="fake-model", prompt="Hi", max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_openai_client_chat(client):
    answer = client.chat.completions.create(model="fake-model", messages=HI, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == ANSWER
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2

    stream = client.chat.completions.create(
        model="fake-model",
        messages=HI,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"attention": {"scheme": "streaming"}, "return_progress": True, "top_k": 5},
    )
    text, progress, usage = "", [], None
    for chunk in stream:
        progress += [chunk.model_extra["prompt_progress"]] if "prompt_progress" in chunk.model_extra else []
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == ANSWER
    assert progress[-1]["processed"] == progress[-1]["total"]
    assert usage.model_extra["attention"]["scheme"] == "streaming"


def test_openai_client_errors(client, engine):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="fake-model", prompt="Hi", temperature=9)
    assert (refused.value.param, refused.value.code) == ("temperature", "invalid_value")
    assert refused.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="Hi")
    engine.fail = RuntimeError("x")
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="fake-model", prompt="Hi")
    with pytest.raises(openai.APIError, match="The server failed"):
        list(client.completions.create(model="fake-model", prompt="Hi", stream=True))


def test_openai_client_models(client):
    assert [model.id for model in client.models.list()] == ["fake-model"]
    assert client.models.retrieve("fake-model").model_extra["max_model_len"] == 4096


def test_a_broken_connection_frees_its_request(client, engine):
    engine.hold_after = 3
    with client.completions.create(model="fake-model", prompt="Hi", max_tokens=40, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: engine.pages_used == 0)
    assert len(engine.aborts) == 1
    assert engine.generated < 40


def test_a_broken_connection_before_the_first_token(ready, engine):
    engine.gate.clear()
    body = json.dumps({"prompt": "Hi"}).encode()
    with socket.create_connection(("127.0.0.1", ready.port)) as connection:
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: engine.pages_used == 1)
    wait_for(lambda: engine.pages_used == 0)
    assert len(engine.aborts) == 1


def test_a_peer_that_stops_reading_is_cut_off(running, engine):
    engine.script = "x" * 4000
    engine.step_seconds = 0.001
    with running(write_seconds=0.2) as server:
        wait_for(lambda: server.health() == 200)
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = json.dumps({"prompt": "Hi", "max_tokens": 4000, "stream": True}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: engine.aborts)
            wait_for(lambda: not server.server.server_state.connections)
    assert engine.pages_used == 0


def test_a_large_body_gets_its_answer(ready):
    response = httpx.post(ready.url + "/v1/completions", content=b"a" * 20 * 2**20)
    assert response.status_code == 413
    assert response.headers["connection"] == "close"


def test_an_endless_header_is_refused_while_it_comes(ready):
    assert ready.raw(b"GET /health HTTP/1.1\r\nx: " + b"a" * 100_000).startswith(b"HTTP/1.1 431 ")


def test_a_large_complete_header_is_refused(ready):
    said = ready.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 40_000 + b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "framing",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"transfer-encoding: chunked\r\n\r\n2\r\nabXX0\r\n\r\n",
        b"content-length: -1\r\n\r\n",
    ],
    ids=["two-lengths", "different-lengths", "bad-chunk-end", "negative"],
)
def test_ambiguous_framing_gets_one_refusal(ready, framing):
    said = ready.raw(HEAD + b"connection: close\r\n" + framing)
    assert len(re.findall(rb"HTTP/1\.1 \d+", said)) == 1
    assert said.startswith(b"HTTP/1.1 400 ")


def test_slow_headers_and_bodies_are_cut_off(running):
    with running(read_seconds=0.5) as server:
        wait_for(lambda: server.health() == 200)
        assert server.raw(b"GET /health HT").startswith(b"HTTP/1.1 408 ")
        assert server.raw(b"") == b"", "nothing was asked"
        said = server.raw(HEAD + b"content-length: 9\r\n\r\nabc")
        assert said.startswith(b"HTTP/1.1 408 ")


def test_chunk_overhead_is_counted(running):
    with running(max_body_bytes=1024, max_header_bytes=1024) as server:
        wait_for(lambda: server.health() == 200)
        said = server.raw(HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + b"e" * 8000 + b"\r\na\r\n")
        assert b"HTTP/1.1 200" not in said


def test_one_port_is_open_and_only_on_loopback(ready):
    with pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", ready.port)
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", ready.port))


def test_any_address_of_ipv6_takes_ipv4_too():
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family) as client:
                client.connect((host, port))


def test_an_address_keeps_its_scope(monkeypatch):
    made = []
    monkeypatch.setattr(serve.socket, "create_server", lambda address, **options: made.append(address))
    _, name = socket.if_nameindex()[0]
    listen(f"fe80::1%{name}", 0)
    assert made == [("fe80::1", 0, 0, socket.if_nametoindex(name))]


def test_health_while_loading_then_ready(running, engine, capsys):
    loaded = threading.Event()

    def load(settings):
        loaded.wait(60)
        return engine

    with running(load) as server:
        wait_for(lambda: server.server.started)
        assert server.health() == 503
        assert httpx.get(server.url + "/v1/models").json()["error"]["code"] == "loading"
        assert capsys.readouterr().out == ""
        loaded.set()
        wait_for(lambda: server.health() == 200)
        wait_for(lambda: capsys.readouterr().out == f"foveate is ready on {server.url}\n")


def test_a_server_that_was_told_to_stop_while_loading_is_never_ready(running, engine, capsys, monkeypatch):
    failed, loaded = [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", failed.append)

    def load(settings):
        loaded.wait(60)
        return engine

    with running(load) as server:
        wait_for(lambda: server.server.started)
        server.server.handle_exit(signal.SIGTERM, None)
        server._thread.join(60)
        server.listener.close()
        loaded.set()
        server.join()
    assert capsys.readouterr().out == ""
    assert not failed


def test_a_model_that_does_not_load_ends_the_server(running, capsys):
    def load(settings):
        raise ValueError("no such model")

    with running(load) as server:
        server.join()
        assert server.server.status == 1
    assert "cannot serve fake-model: no such model" in capsys.readouterr().err


def test_a_dead_engine_ends_the_server(ready, engine):
    engine.state = "dead"
    ready.join()
    assert ready.server.status == 1


def test_stopping_lets_answers_end(ready, engine):
    engine.hold_after = 4
    with (
        httpx.Client(base_url=ready.url) as http,
        http.stream("POST", "/v1/completions", json={"prompt": "Hi", "max_tokens": 60, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        ready.server.handle_exit(signal.SIGTERM, None)
        assert ready.health() == 503
        refused = httpx.post(ready.url + "/v1/completions", json={"prompt": "Hi"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        engine.gate.set()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"stop"' in rest[-2]
    ready.join()
    assert ready.server.status == 0


def test_stopping_tells_answers_that_take_too_long(running, engine):
    engine.hold_after = 4
    with running(drain_seconds=0.1) as server:
        wait_for(lambda: server.health() == 200)
        body = {"prompt": "Hi", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "aborted"
        server.join()
        assert server.server.status == 0


class Unserved:
    """Stands in for the server that ``run`` makes."""

    loading, status = False, 0

    def __init__(self, *args):
        pass

    def load(self):
        pass

    def run(self, sockets):
        sockets[0].close()


@pytest.mark.parametrize("keyed", [True, False], ids=["key-file", "no-key"])
def test_a_port_that_is_open_to_all_is_told(monkeypatch, capsys, tmp_path, keyed):
    (tmp_path / "keys").write_text("alice secret\n")
    monkeypatch.setattr(serve, "FoveateServer", Unserved)
    monkeypatch.setattr(serve, "_stuck", lambda: False)  # other tests have threads in this process
    options = {"api_key_file": tmp_path / "keys"} if keyed else {}
    assert serve.run(Settings(model="m", host="0.0.0.0", port=0, **options)) == 0
    assert ("without an API key" in capsys.readouterr().err) is not keyed


STUB = """
import signal, sys, time, types
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, sys.argv[1])
from conftest import FakeEngine, make_tokenizer

class Engine:
    @staticmethod
    def load(settings):
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # loading begins beside the server's own start
            time.sleep(0.01)
        print("loading", flush=True)
        time.sleep(LOAD_SECONDS)
        ThreadPoolExecutor(1, thread_name_prefix="foveate-cache-read").submit(time.sleep, DISK_SECONDS)
        engine = FakeEngine(make_tokenizer())
        if HOLD:
            engine.gate.clear()
            engine.shutdown = time.sleep
        return engine

sys.modules["foveate.server.engine"] = types.SimpleNamespace(Engine=Engine)
from foveate.server.cli import main
sys.exit(main(["serve", "m", "--port", "0", "--log-level", "warning"]))
"""


@contextmanager
def process(moment, load_seconds=0, disk_seconds=0, hold=False):
    """A server of its own, when its output has come to ``moment``; and the last line of that."""
    code = textwrap.dedent(STUB)
    for name, value in {"LOAD_SECONDS": load_seconds, "DISK_SECONDS": disk_seconds, "HOLD": hold}.items():
        code = code.replace(name, str(value))
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        line = ""
        while moment not in line:
            line = started.stdout.readline()
            assert line, "the process ended before its time"
        try:
            yield started, line
        finally:
            started.kill()


@pytest.mark.parametrize(
    ("number", "load_seconds", "disk_seconds", "moment"),
    [(signal.SIGTERM, 300, 0, "loading"), (signal.SIGINT, 0, 0, "ready on"), (signal.SIGTERM, 0, 300, "ready on")],
    ids=["term-while-loading", "interrupt-when-ready", "term-while-a-disk-hangs"],
)
def test_a_signal_ends_the_process_with_zero(number, load_seconds, disk_seconds, moment):
    with process(moment, load_seconds, disk_seconds) as (started, _):
        os.kill(started.pid, number)
        assert started.wait(60) == 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "one-piece"])
def test_a_second_signal_cuts_answers_off(stream):
    with process("ready on", hold=True) as (started, line):
        url = line.split()[-1]
        body = json.dumps({"prompt": "Hi", "max_tokens": 60, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as connection:
            connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: "foveate_requests_running 1" in httpx.get(url + "/metrics").text)
            os.kill(started.pid, signal.SIGTERM)
            wait_for(lambda: httpx.get(url + "/health").json()["error"]["code"] == "draining")
            os.kill(started.pid, signal.SIGTERM)
            said = b""
            with suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    said += part
        assert started.wait(60) == 0
        assert b"Internal Server Error" not in said
        assert started.stderr.read() == "", "nothing is blamed"
