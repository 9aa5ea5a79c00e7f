"""``foveate bench serve``: a client against servers that behave in every way, and the command on a real socket."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time

import httpx
import pytest
import uvicorn

from foveate.server import cli
from foveate.server.app import create_app
from foveate.server.bench import serve
from foveate.server.bench.arrivals import poisson
from foveate.server.bench.client import Client, ServerError
from foveate.server.serve import address_of, listen, server_config
from foveate.server.settings import Settings


@pytest.fixture
def url(engine):
    """A server around the fake engine, on a free port."""
    settings = Settings(model="fake-model", port=0)
    listener = listen(settings.host, 0)
    server = uvicorn.Server(server_config(create_app(engine, settings), settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    yield address_of(listener)
    server.should_exit = True
    thread.join(10)
    listener.close()


def bench(url, tmp_path, *arguments):
    return cli.main(["bench", "serve", "--url", url, "-o", str(tmp_path), *arguments])


FEW = ("--requests", "6", "--lengths", "20,40", "--new-tokens", "5", "--rate", "200,400")


def test_a_run_reports_each_rate_and_policy(url, engine, tmp_path, capsys):
    engine.step_seconds = 0.002
    status = bench(url, tmp_path, *FEW, "--scheme", "dense,streaming", "--repeats", "2", "--slo-ttft", "30")
    assert status == 0
    report = json.loads((tmp_path / "serve.json").read_text())
    assert [(cell["rate"], cell["label"]) for cell in report["cells"]] == list(
        itertools.product((200.0, 400.0), ("dense", "streaming"))
    )
    for cell in report["cells"]:
        assert (cell["requests"], cell["completed"], cell["errors"], cell["good_share"]) == (6, 6, {}, 1)
        assert 0 < cell["ttft_seconds"]["p50"] <= cell["ttft_seconds"]["p99"]
        assert cell["itl_seconds"]["p50"] > 0
        assert len(cell["runs"]) == 2
        rates = [run["goodput"] for run in cell["runs"]]
        assert rates == [pytest.approx(6 / run["seconds"]) for run in cell["runs"]]
        assert min(rates) <= cell["goodput"] <= max(rates)
    assert report["server"]["id"] == "fake-model"
    assert report["options"]["rate"] == [200.0, 400.0]
    assert "cores" in report["machine"]
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "6 of 6" in printed
    sent = [len(request.prompt_token_ids) for request in engine.requests]
    assert sent.count(20) == sent.count(40) + 2, "two policies were warmed up with the first length"
    prompts = {tuple(request.prompt_token_ids) for request in engine.requests}
    assert len(prompts) >= 2 * 2 * 2 * 6, "every prompt is another, or a prefix cache would help"
    assert {request.scheme.name for request in engine.requests} == {"dense", "streaming"}


def test_a_second_run_sends_other_prompts_at_the_same_moments(url, engine, tmp_path, monkeypatch):
    moments, nonces, beginnings = [], set(), []
    monkeypatch.setattr(serve, "poisson", lambda *given: moments.append(poisson(*given)) or moments[-1])
    for name in ("first", "second"):
        engine.requests.clear()
        assert bench(url, tmp_path / name, *FEW) == 0
        nonces.add(json.loads((tmp_path / name / "serve.json").read_text())["nonce"])
        beginnings.append({tuple(request.prompt_token_ids[:16]) for request in engine.requests})
    assert moments[:2] == moments[2:]
    assert len(nonces) == 2
    assert beginnings[0].isdisjoint(beginnings[1]), "a server would answer the second run from its prefix cache"


def test_the_load_is_open_and_slow_answers_are_not_good(url, engine, tmp_path):
    engine.gate.clear()

    def release():
        """Answers nobody before everybody has arrived; a client that waits for answers would never get there."""
        give_up = time.monotonic() + 60
        while len(engine.requests) < 8 and time.monotonic() < give_up:
            time.sleep(0.01)
        waiting.append(len(engine.requests))
        time.sleep(0.5)
        engine.gate.set()

    waiting = []
    threading.Thread(target=release).start()
    arguments = ("--requests", "8", "--lengths", "10", "--new-tokens", "2", "--rate", "100", "--warmup", "0")
    assert bench(url, tmp_path, *arguments, "--slo-ttft", "0.2") == 0
    [cell] = json.loads((tmp_path / "serve.json").read_text())["cells"]
    assert waiting == [8]
    assert (cell["completed"], cell["goodput"]) == (8, 0)
    assert cell["ttft_seconds"]["p50"] > 0.5


def test_a_policy_that_the_server_refuses_is_left_out(url, tmp_path, capsys):
    policy = '{"scheme": "streaming", "nosuch_tokens": 1}'
    assert bench(url, tmp_path, *FEW, "--rate", "300", "--policy", policy, "--scheme", "dense") == 0
    report = json.loads((tmp_path / "serve.json").read_text())
    assert [cell["label"] for cell in report["cells"]] == ["dense"]
    assert "nosuch_tokens" in report["unavailable"][0]["reason"]
    assert "not run: streaming" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("http://127.0.0.1:9", "127.0.0.1:9/v1/models"),
        ("no url", "/v1/models"),
        ("ftp://127.0.0.1:9", "/v1/models"),
        ("http://host:abc", "host:abc"),
    ],
)
def test_a_server_that_is_not_there(tmp_path, capsys, where, said):
    assert bench(where, tmp_path) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_server_does_not_have(url, tmp_path, capsys):
    assert bench(url, tmp_path, "--model", "other") == 1
    assert "it has: fake-model" in capsys.readouterr().err


# The client, one answer at a time


def answer_of(handler, timeout=5.0):
    async def ask():
        client = Client("http://test/v1/", "secret", timeout, httpx.MockTransport(handler))
        start = time.perf_counter()
        try:
            return await client.complete({"prompt": [1]}, 0.0, lambda: time.perf_counter() - start)
        finally:
            await client.close()

    return asyncio.run(ask())


def chunk(text="x", reason=None):
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def stream(*events, done=True):
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    return httpx.Response(200, text=": ping\n\n" + "".join(lines) + ("data: [DONE]\n\n" if done else ""))


def test_a_chunk_without_text_is_no_piece():
    answer = answer_of(lambda request: stream(chunk(), chunk("y"), chunk("", "length")))
    assert (answer.error, len(answer.pieces), answer.tokens) == (None, 2, 2)
    assert answer.last > answer.pieces[-1], "the last token, which had no text, took its time too"


def test_a_whole_answer_counts_the_servers_tokens():
    seen = []

    def handler(request):
        seen.append(request)
        return stream(chunk(), chunk("y", "length"), {"choices": [], "usage": {"completion_tokens": 7}})

    answer = answer_of(handler)
    assert (answer.error, answer.tokens, len(answer.pieces)) == (None, 7, 2)
    assert str(seen[0].url) == "http://test/v1/completions"
    assert seen[0].headers["authorization"] == "Bearer secret"
    body = json.loads(seen[0].content)
    assert body == {"prompt": [1], "stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (httpx.Response(429, json={"error": {"message": "later"}}), "429"),
        (httpx.Response(500, text="<html>"), "500"),
        (stream(chunk(), {"error": {"message": "boom"}}), "error in the stream"),
        (stream(chunk(), done=False), "cut off"),
        (stream(), "cut off"),
        (stream("{broken"), "not a stream of completions"),
        (stream("[1]"), "not a stream of completions"),
        (stream({"choices": [7]}), "not a stream of completions"),
    ],
    ids=["full", "broken", "error-event", "no-end", "empty", "no-json", "list", "no-choice"],
)
def test_an_answer_that_goes_wrong_is_an_error_and_no_exception(response, error):
    assert answer_of(lambda request: response).error == error


def test_a_connection_that_breaks():
    def handler(request):
        raise httpx.ReadError("reset")

    assert answer_of(handler).error == "connection"


def test_an_answer_that_takes_too_long():
    async def handler(request):
        await asyncio.sleep(5)

    answer = answer_of(handler, timeout=0.05)
    assert answer.error == "timeout"
    assert answer.end < 2


def test_a_list_of_models_that_is_none():
    async def ask():
        client = Client("http://test", None, 1.0, httpx.MockTransport(lambda request: httpx.Response(200, json=[1])))
        try:
            await client.model(None)
        finally:
            await client.close()

    with pytest.raises(ServerError, match="/v1/models"):
        asyncio.run(ask())
