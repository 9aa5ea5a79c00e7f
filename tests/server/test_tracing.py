"""Traces: one span per request below the client's own, and three per prompt; nothing of it without the setting."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from foveate.server import serve, settings_checks, state, tracing
from foveate.server.app import create_app
from foveate.server.cli import build_parser, read_settings
from foveate.server.settings import Settings
from foveate.server.tracing import Tracing

from .conftest import LocalClient

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
CANARY = "the-secret-of-the-prompt"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def traced(engine, exporter, monkeypatch):
    monkeypatch.setattr(state, "Tracing", lambda endpoint, model: Tracing(endpoint, model, exporter))
    app = create_app(engine, Settings(model="m", otlp_endpoint="http://127.0.0.1:4318"))
    with LocalClient(app, raise_server_exceptions=False) as client:
        yield client


def spans_of(client, exporter):
    state.state_of_app(client.app).tracing._provider.force_flush()
    return exporter.get_finished_spans()


def named(spans, name):
    return [span for span in spans if span.name == name]


def seconds(span):
    return (span.end_time - span.start_time) / 1e9


@pytest.mark.parametrize("stream", [False, True])
def test_spans_of_a_request(traced, exporter, engine, stream):
    engine.step_seconds = 0.005
    body = {"prompt": [CANARY, "Hi"], "max_tokens": 5, "stream": stream}
    headers = {"traceparent": TRACEPARENT, "x-request-id": "mine"}
    assert traced.post("/v1/completions", json=body, headers=headers).status_code == 200
    spans = spans_of(traced, exporter)
    assert sorted(span.name for span in spans) == sorted(["POST /v1/completions"] + ["queue", "prefill", "decode"] * 2)
    (root,) = named(spans, "POST /v1/completions")
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.attributes["http.route"] == "/v1/completions"
    assert root.attributes["http.response.status_code"] == 200
    assert (root.attributes["foveate.request_id"], root.attributes["gen_ai.request.model"]) == ("mine", "m")
    assert root.resource.attributes["service.name"] == "foveate"
    for name in ("queue", "prefill", "decode"):
        for span in named(spans, name):
            assert span.parent.span_id == root.context.span_id
            assert root.start_time - 5e6 <= span.start_time <= span.end_time <= root.end_time + 5e6
            assert span.attributes["foveate.attention.scheme"] == "dense"
            assert span.attributes["foveate.outcome"] == "length"
    assert {span.attributes["gen_ai.usage.input_tokens"] for span in named(spans, "prefill")} == {len(CANARY), 2}
    for span in named(spans, "decode"):
        assert span.attributes["gen_ai.usage.output_tokens"] == 5
        assert span.attributes["foveate.keys_read_fraction"] == 0.5
        assert seconds(span) >= 4 * 0.005
    assert CANARY not in " ".join(span.to_json() for span in spans)


@pytest.mark.parametrize("header", [None, "", "00-0-0-01", "00-" + "0" * 32 + "-" + PARENT + "-01", "é", "x" * 9000])
def test_without_a_good_parent_a_trace_begins_here(traced, exporter, header):
    headers = {} if header is None else {b"traceparent": header.encode("latin-1")}
    assert traced.get("/v1/models", headers=headers).status_code == 200
    (root,) = spans_of(traced, exporter)
    assert root.parent is None


def test_a_client_that_says_it_is_not_sampled(traced, exporter, caplog):
    headers = {"traceparent": TRACEPARENT[:-2] + "00"}
    assert traced.get("/v1/models", headers=headers).status_code == 200
    assert not spans_of(traced, exporter)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    "variables",
    [{"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, {"OTEL_SDK_DISABLED": "true"}],
    ids=["sampled-out", "disabled"],
)
def test_requests_without_a_span_are_answered(engine, exporter, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(state, "Tracing", lambda endpoint, model: Tracing(endpoint, model, exporter))
    settings = Settings(model="m", otlp_endpoint="http://127.0.0.1:4318")
    with LocalClient(create_app(engine, settings)) as client:
        assert client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 2}).status_code == 200
    assert not exporter.get_finished_spans()


def test_failures_and_refusals(traced, exporter, engine):
    engine.fail = RuntimeError("x")
    assert traced.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 5}).status_code == 500
    assert traced.post("/v1/completions", json={"prompt": 5}).status_code == 400
    spans = spans_of(traced, exporter)
    failed, refused = named(spans, "POST /v1/completions")
    assert not failed.status.is_ok
    assert refused.status.is_unset
    assert named(spans, "decode")[0].attributes["foveate.outcome"] == "error"


def test_probes_make_no_traces(traced, exporter):
    for path in ("/health", "/ready", "/metrics"):
        traced.get(path)
    assert not spans_of(traced, exporter)


def test_spans_are_sent(engine):
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        settings = Settings(model="m", otlp_endpoint=f"http://127.0.0.1:{collector.server_port}")
        with LocalClient(create_app(engine, settings)) as client:
            client.get("/v1/models")
        collector.shutdown()
        thread.join()
    assert got[0][0] == "/v1/traces"
    assert b"GET /v1/models" in got[0][1]


def test_a_silent_collector_holds_nothing_up(engine, monkeypatch):
    monkeypatch.setattr(tracing, "_CLOSE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Settings(model="m", otlp_endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with LocalClient(create_app(engine, settings)) as client:
            began = time.monotonic()
            assert client.get("/v1/models").status_code == 200
        assert time.monotonic() - began < 9  # the library alone would wait for 10


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://x", "http://", "x"])
def test_a_wrong_endpoint_is_refused(endpoint, capsys):
    parser = build_parser()
    with pytest.raises(SystemExit):
        read_settings(parser.parse_args(["serve", "m", "--otlp-endpoint", endpoint]), parser)
    assert "--otlp-endpoint: must be an http:// or https:// URL" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"])
def test_a_wrong_variable_of_the_library_is_said_at_the_start(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "-1")
    assert serve.run(Settings(model="m", port=0, otlp_endpoint="http://127.0.0.1:4318")) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("foveate: traces cannot be made as the OTEL_... variables say: ")


def test_a_missing_library_is_said_at_the_start(capsys, monkeypatch):
    real = settings_checks.importlib.util.find_spec
    monkeypatch.setattr(
        settings_checks.importlib.util, "find_spec", lambda name: None if name.endswith("sdk") else real(name)
    )
    parser = build_parser()
    with pytest.raises(SystemExit):
        read_settings(parser.parse_args(["serve", "m", "--otlp-endpoint", "http://x"]), parser)
    assert "pip install 'foveate[otel]'" in capsys.readouterr().err


def test_nothing_is_imported_without_the_setting(engine):
    assert state.state_of_app(create_app(engine, Settings(model="m"))).tracing is None
    code = (
        "import sys; from foveate.server.settings import Settings; import foveate.server.tracing; Settings(model='m'); "
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
