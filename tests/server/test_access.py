"""Browsers, TLS, readiness, HTTP counts, and the process as its operator sees it."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import trustme

from foveate.server import engine as engine_module
from foveate.server.app import create_app
from foveate.server.cli import build_parser, read_settings
from foveate.server.serve import FoveateServer, address_of, listen, server_config
from foveate.server.settings import Settings
from foveate.server.state import state_of_app

ORIGIN = "https://app.example.org"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization",
}


def parse(*arguments):
    parser = build_parser()
    return read_settings(parser.parse_args(["serve", "m", *arguments]), parser)


class TestBrowsers:
    def test_off_by_default(self, client):
        response = client.get("/v1/models", headers={"origin": ORIGIN})
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert client.options("/v1/models", headers=PREFLIGHT).status_code == 405

    def test_an_origin_that_is_let_in(self, client_of):
        client = client_of(cors_origin=(ORIGIN, "http://localhost:3000"), api_key=["k"])
        answer = client.options("/v1/completions", headers=PREFLIGHT)
        assert answer.status_code == 200, "a browser asks this without the key"
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers
        refused = client.get("/v1/models", headers={"origin": ORIGIN})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN, "a page must be able to read its error"
        good = client.get("/v1/models", headers={"origin": ORIGIN, "authorization": "Bearer k"})
        assert (good.status_code, good.headers["access-control-allow-origin"]) == (200, ORIGIN)

    @pytest.mark.parametrize("origin", ["https://evil.example", "https://app.example.org.evil.example", "null"])
    def test_others(self, client_of, origin):
        client = client_of(cors_origin=(ORIGIN,))
        for response in (
            client.options("/v1/completions", headers={**PREFLIGHT, "origin": origin}),
            client.get("/v1/models", headers={"origin": origin}),
        ):
            assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize("origin", [ORIGIN, "null", "http://localhost:81", "https://localhost", "http://test", ""])
    def test_a_page_may_not_send_what_a_browser_sends_unasked(self, client_of, tmp_path, origin):
        client = client_of(batch_dir=tmp_path / "batches")
        form = {"files": {"file": ("a", b"{}")}, "data": {"purpose": "batch"}}
        response = client.post("/v1/files", headers={"origin": origin}, **form)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_refused")
        assert "--cors-origin" in response.json()["error"]["message"]
        assert response.headers["x-request-id"]
        assert client.get("/v1/files", headers={"origin": origin}).json()["data"] == []
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert client.request(method, "/v1/files/x", headers={"origin": origin}).status_code == 403
        for method in ("GET", "HEAD", "OPTIONS"):
            assert client.request(method, "/v1/files/x", headers={"origin": origin}).status_code in (404, 405)

    @pytest.mark.parametrize(
        ("allowed", "origin"),
        [
            ((), None),
            ((), "http://localhost"),
            ((ORIGIN,), ORIGIN),
            ((ORIGIN,), "http://localhost"),
            (("*",), "null"),
        ],
    )
    def test_its_own_pages_and_those_let_in_may(self, client_of, tmp_path, allowed, origin):
        client = client_of(batch_dir=tmp_path / "batches", cors_origin=allowed)
        headers = {} if origin is None else {"origin": origin}
        form = {"files": {"file": ("a", b"{}")}, "data": {"purpose": "batch"}}
        assert client.post("/v1/files", headers=headers, **form).status_code == 200
        assert client.post("/v1/completions", headers=headers, json={"prompt": "Hi"}).status_code == 200

    def test_one_good_origin_of_two_is_not_enough(self, client_of):
        client = client_of(cors_origin=(ORIGIN,))
        headers = [("origin", ORIGIN), ("origin", "https://evil.example")]
        assert client.post("/v1/completions", headers=headers, json={"prompt": "Hi"}).status_code == 403

    @pytest.mark.parametrize(
        "origin",
        [
            "app.example.org",
            "https://a.example/",
            "https://a.example/x",
            "javascript:x",
            "a b",
            "https://",
            "https://:443",
            "https://a..example",
            "https://a.example:",
            "https://a.example:65536",
            "https://a:1:2",
            "https://[::1",
            "https://[1:2]",
            "https://[a.example]",
            "https://-",
            "https://a[",
            "null",
        ],
    )
    def test_what_is_no_origin(self, origin, capsys):
        with pytest.raises(SystemExit):
            parse("--cors-origin", origin)
        assert "--cors-origin: " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            ("https://App.Example.org", ORIGIN),
            ("HTTPS://app.example.org:443", ORIGIN),
            ("http://app.example.org:080", "http://app.example.org"),
            ("http://app.example.org:443", "http://app.example.org:443"),
            ("https://[0:0::1]:443", "https://[::1]"),
            ("http://my_machine:3000", "http://my_machine:3000"),
        ],
    )
    def test_an_origin_is_kept_as_browsers_write_it(self, client_of, given, sent):
        assert parse("--cors-origin", given).cors_origin == (sent,)
        client = client_of(cors_origin=(given,))
        response = client.post("/v1/completions", headers={"origin": sent}, json={"prompt": "Hi"})
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, sent)


# Such a page has a name of its own point to this machine: a browser then takes the server for the page's own.
REBOUND = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:8000", "machine", ""]


class TestNames:
    @pytest.mark.parametrize("host", REBOUND)
    @pytest.mark.parametrize("listening", ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1", "localhost"])
    def test_a_server_without_keys_is_asked_by_this_machines_own(self, client_of, engine, host, listening):
        client = client_of(host=listening)
        for headers in ({"host": host}, {"host": host, "origin": f"http://{host}"}):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions")):
                response = client.request(method, path, headers=headers, json={"prompt": "Hi"})
                assert (response.status_code, response.json()["error"]["code"]) == (403, "host_refused")
                assert "--cors-origin" in response.json()["error"]["message"]
        assert not engine.requests

    @pytest.mark.parametrize(
        "host",
        [
            *("localhost", "LocalHost:8000", "localhost.:8000", "app.localhost", "host.docker.internal:8000"),
            *("127.0.0.1:8000", "127.8.9.1", "[::1]", "[::1]:8000"),
        ],
    )
    def test_these_are(self, client, host):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize("host", [".localhost", "evil.example/.localhost", "[localhost]", "[::1%a.evil.example]"])
    def test_what_is_no_name_is_not_one_of_them(self, client, host):
        assert client.get("/v1/models", headers={"host": host}).status_code == 403

    @pytest.mark.parametrize("host", ["192.168.7.7:8000", "[fe80::1]:80"])
    def test_an_address_is_no_name_that_could_be_turned(self, client, host):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize("options", [{"api_key": ["k"]}, {"host": "0.0.0.0"}, {"cors_origin": ("*",)}], ids=str)
    def test_others_are_asked_by_any(self, client_of, options):
        headers = {"host": "evil.example", "authorization": "Bearer k"}
        assert client_of(**options).get("/v1/models", headers=headers).status_code == 200

    def test_a_proxy_may_pass_on_the_name_of_an_origin_that_is_let_in(self, client_of):
        client = client_of(cors_origin=("https://App.example.org:8443",))
        for host in ("app.example.org", "app.example.org:8443", "app.example.org:80", "localhost"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


class TestReadiness:
    def test_as_health(self, client, engine, settings):
        assert client.get("/ready").json() == {"status": "ready"}
        engine.heartbeat_age = settings.stall_seconds + 1
        assert client.get("/ready").json()["error"]["code"] == "stalled"
        engine.heartbeat_age, engine.state = 0.0, "draining"
        assert client.get("/ready").status_code == 503

    def test_a_full_queue_is_healthy_and_not_ready(self, client, engine, settings, monkeypatch):
        from dataclasses import replace

        now = engine.snapshot()
        monkeypatch.setattr(engine, "snapshot", lambda: replace(now, waiting=settings.max_queued_requests))
        assert client.get("/health").status_code == 200
        response = client.get("/ready")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        monkeypatch.setattr(engine, "snapshot", lambda: replace(now, waiting=settings.max_queued_requests - 1))
        assert client.get("/ready").status_code == 200

    def test_it_needs_no_key(self, client_of):
        assert client_of(api_key=["k"]).get("/ready").status_code == 200


def test_http_counts_have_routes_and_not_paths(client):
    client.get("/v1/models/nosuch")
    client.get("/v1/models/other")
    client.get("/some/thing")
    client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1})
    text = client.get("/metrics").text
    assert 'foveate_http_requests_total{route="/v1/models/{model:path}",status="404"} 2.0' in text
    assert 'foveate_http_requests_total{route="none",status="404"} 1.0' in text
    assert 'foveate_http_requests_total{route="/v1/completions",status="200"} 1.0' in text
    assert "nosuch" not in text


def test_a_head_counts_at_its_route(client):
    assert client.head("/v1/models/nosuch").status_code == 404
    assert client.head("/health").status_code == 200
    assert client.head("/v1/completions").status_code == 405
    text = client.get("/metrics").text
    for route, status in (("/v1/models/{model:path}", 404), ("/health", 200), ("/v1/completions", 405)):
        assert f'foveate_http_requests_total{{route="{route}",status="{status}"}} 1.0' in text
    assert 'route="none"' not in text


def test_sizes_and_times_of_requests(client):
    client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
    text = client.get("/metrics").text
    for line in (
        "foveate_queue_seconds_count 1.0",
        "foveate_prefill_seconds_count 1.0",
        "foveate_request_prompt_tokens_sum 5.0",
        "foveate_request_generated_tokens_sum 3.0",
        'foveate_keys_read_fraction_sum{scheme="dense"} 0.5',
        'foveate_prefix_cache_lookups_total{result="miss"} 1.0',
        'foveate_build_info{dtype="torch.float32",model="fake-model"',
        "process_resident_memory_bytes ",
    ):
        assert line in text


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    made.private_key_pem.write_to_path(folder / "key.pem")
    authority.issue_cert("localhost").private_key_pem.write_to_path(folder / "other.pem")
    made.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    return folder


class TestTls:
    @pytest.mark.parametrize("files", [("cert.pem", "key.pem"), ("both.pem", None)], ids=["two-files", "one-file"])
    def test_it_is_spoken_and_nothing_else(self, engine, certificate, monkeypatch, files):
        cert, key = (name and certificate / name for name in files)
        monkeypatch.setattr(engine_module.Engine, "load", staticmethod(lambda settings: engine))
        settings = Settings(model="fake-model", port=0, tls_cert=cert, tls_key=key)
        listener = listen(settings.host, settings.port)
        app = create_app(None, settings)
        server = FoveateServer(server_config(app, settings), state_of_app(app), listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        server.load()
        try:
            url = address_of(listener, tls=True)
            assert url.startswith("https://")
            trust = ssl.create_default_context(cafile=str(certificate / "ca.pem"))
            with httpx.Client(verify=trust) as client:
                assert client.get(url + "/health").status_code == 200
                body = {"prompt": "Hi", "max_tokens": 3, "stream": True}
                assert client.post(url + "/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
            with pytest.raises(httpx.HTTPError):
                httpx.get(url.replace("https", "http") + "/health")
            with pytest.raises(httpx.ConnectError):
                httpx.get(url + "/health")
        finally:
            server.should_exit = True
            thread.join(10)
        assert not thread.is_alive()

    @pytest.mark.parametrize(
        ("cert", "key", "words"),
        [
            ("cert.pem", "other.pem", "no certificate and its key"),
            ("cert.pem", None, "no certificate and its key"),
            ("key.pem", "cert.pem", "no certificate and its key"),
            ("nosuch.pem", "key.pem", "cannot read"),
            ("cert.pem", "nosuch.pem", "cannot read"),
            (None, "key.pem", "--tls-key needs --tls-cert"),
        ],
    )
    def test_wrong_files_are_said_at_the_start(self, certificate, capsys, cert, key, words):
        flags = [f"--tls-cert={certificate / cert}"] if cert else []
        flags += [f"--tls-key={certificate / key}"] if key else []
        with pytest.raises(SystemExit) as end:
            parse(*flags)
        assert end.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert words in line
        assert line.startswith("foveate: error: ")


PROCESS = """
import logging, sys, threading, types, warnings
sys.path.insert(0, sys.argv.pop(1))
from conftest import FakeEngine, make_tokenizer

def fail():
    raise ValueError("of a\\nthread")

class Engine:
    @staticmethod
    def load(settings):
        warnings.warn("careful\\nnow")
        logging.getLogger("transformers").warning("of a library")
        thread = threading.Thread(target=fail, name="failing")
        thread.start()
        thread.join()
        return FakeEngine(make_tokenizer())

def imported(name):  # as transformers does when it comes with the engine
    if name != "Engine":
        raise AttributeError(name)
    logging.getLogger("transformers").addHandler(logging.StreamHandler())
    return Engine

sys.modules["foveate.server.engine"] = module = types.ModuleType("engine")
module.__getattr__ = imported
from foveate.server.cli import main
sys.exit(main(["serve", "m", "--port", "0", *sys.argv[1:]]))
"""


def test_a_process_reads_its_keys_again_and_writes_json_alone(tmp_path):
    key_file = tmp_path / "keys"
    key_file.write_text("old\n")
    key_file.chmod(0o604)
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
    command += ["--log-format", "json", "--api-key-file", str(key_file)]
    environment = {**os.environ, "FOVEATE_NOSUCH": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            url = process.stdout.readline().split()[-1]

            def ask(key):
                return httpx.get(url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

            assert (ask("old"), ask("new")) == (200, 401)
            key_file.write_text("new\n")
            os.kill(process.pid, signal.SIGHUP)
            end = time.monotonic() + 60
            while ask("new") != 200:
                assert time.monotonic() < end, "the keys were not read again"
                time.sleep(0.02)
            assert ask("old") == 401
        finally:
            process.terminate()
        errors = process.stderr.read()
        assert process.wait(10) == 0
    entries = [json.loads(line) for line in errors.splitlines()]
    messages = " | ".join(entry["message"] for entry in entries)
    for words in ("FOVEATE_NOSUCH is no setting", "chmod o-r", "careful\nnow", "GET /v1/models", "keys, 0 admin keys"):
        assert words in messages
    assert "Bearer" not in errors
    (ended,) = (entry for entry in entries if entry["message"] == "an exception ended thread failing")
    assert "ValueError: of a\nthread" in ended["exception"]
    assert sum(entry["message"] == "of a library" for entry in entries) == 1
