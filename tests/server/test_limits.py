"""What is refused before the application sees it: size, encoding, keys, slowness; and request labels."""

from __future__ import annotations

import asyncio
import re

import pytest

from foveate.server import keys
from foveate.server.app import create_app
from foveate.server.settings import Settings

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Hi", "max_tokens": 2}


def check_refused(response, status):
    assert response.status_code == status
    assert response.headers["connection"] == "close"
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


def test_large_headers(client):
    check_refused(client.get("/health", headers={"x-big": "a" * 33_000}), 431)
    check_refused(client.get("/health", headers={f"x-{i}": "a" * 400 for i in range(90)}), 431)
    check_refused(client.get("/health?" + "a" * 33_000), 431)
    assert client.get("/health", headers={"x-big": "a" * 30_000}).status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "GZIP"])
def test_compressed_bodies(client, encoding):
    check_refused(client.post(COMPLETIONS, content=b"x", headers={"content-encoding": encoding}), 415)


def test_identity_is_no_encoding(client):
    assert client.post(COMPLETIONS, json=BODY, headers={"content-encoding": "identity"}).status_code == 200


def test_body_at_the_limit_and_one_byte_over(client_of):
    client = client_of(max_body_bytes=2000)
    content = b'{"prompt": "Hi", "max_tokens": 2}'.ljust(2000)
    headers = {"content-type": "application/json"}
    assert client.post(COMPLETIONS, content=content, headers=headers).status_code == 200
    check_refused(client.post(COMPLETIONS, content=content + b" ", headers=headers), 413)


class RawExchange:
    """An ASGI exchange whose body comes in parts, and that counts how many were taken."""

    def __init__(self, parts, headers=(), path=COMPLETIONS, pause=0.0):
        self.parts = list(parts)
        self.taken = 0
        self.sent = []
        self.pause = pause
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": list(headers),
        }

    async def receive(self):
        await asyncio.sleep(self.pause)
        if self.taken == len(self.parts):
            return {"type": "http.disconnect"}
        self.taken += 1
        return {"type": "http.request", "body": self.parts[self.taken - 1], "more_body": self.taken < len(self.parts)}

    async def send(self, message):
        self.sent.append((message, self.taken))

    def run(self, app):
        asyncio.run(app(self.scope, self.receive, self.send))
        return self.sent[0][0]["status"] if self.sent else None


@pytest.mark.parametrize("length", [b"2147483648", b"9" * 6000, b"0" * 6000 + b"9" * 20])
def test_a_declared_length_is_refused_unread(engine, settings, length):
    exchange = RawExchange([b"x"], headers=[(b"content-length", length)])
    assert exchange.run(create_app(engine, settings)) == 413
    assert exchange.sent[0][1] == 0


def test_an_undeclared_length_is_counted_while_it_is_read(engine):
    app = create_app(engine, Settings(model="m", max_body_bytes=3000))
    exchange = RawExchange([b"abcdef"] * 1000)
    assert exchange.run(app) == 413
    assert exchange.sent[0][1] == 501, "refused at the first byte over"
    assert exchange.taken == 1000, "the rest was taken and dropped, so that the client reads the answer"


def test_a_false_length_does_not_help(engine):
    app = create_app(engine, Settings(model="m", max_body_bytes=3000))
    assert RawExchange([b"a" * 4000], headers=[(b"content-length", b"10")]).run(app) == 413


def test_a_body_that_does_not_come(engine):
    app = create_app(engine, Settings(model="m", read_seconds=0.05))
    assert RawExchange([b"a"] * 1000, pause=0.01).run(app) == 408


def test_a_client_that_leaves_while_sending(engine, settings):
    exchange = RawExchange([])
    assert exchange.run(create_app(engine, settings)) is None
    assert engine.requests == []


class TestKeys:
    KEYS = ("first-key", "zweiter-schlüssel")

    @pytest.fixture
    def locked(self, client_of):
        return client_of(api_key=list(self.KEYS))

    @pytest.mark.parametrize("key", KEYS)
    def test_a_key_opens(self, locked, key):
        header = b"Bearer " + key.encode()
        assert locked.get("/v1/models", headers={"authorization": header}).status_code == 200
        assert locked.get("/v1/models", headers={b"Authorization": b"bearer " + key.encode()}).status_code == 200

    @pytest.mark.parametrize(
        "header",
        [
            None,
            b"",
            b"Bearer",
            b"Bearer ",
            b"Bearer wrong",
            b"Bearer first-ke",
            b"Bearer first-key2",
            b"Basic first-key",
            b"first-key",
            b"Bearer \xff\xfe",
        ],
    )
    def test_others_do_not(self, locked, header):
        headers = {} if header is None else {"authorization": header}
        response = locked.get("/v1/models", headers=headers)
        check_refused(response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/models",
            "/v1/completions",
            "/tokenize",
            "/openapi.json",
            "/nosuch",
            "/",
            "/health/",
            "/healthx",
            "//health",
            "/metrics/../v1/models",
        ],
    )
    def test_every_path_is_closed(self, locked, path):
        for method in ("GET", "POST", "OPTIONS"):
            assert locked.request(method, path).status_code == 401

    def test_but_two(self, locked):
        assert locked.get("/health").status_code == 200
        assert locked.get("/metrics").status_code == 200

    def test_a_crafted_host_does_not_help(self, locked):
        for host in ("localhost/health?x=", "localhost/health#", "localhost/metrics"):
            assert locked.get("/v1/models", headers={"host": host}).status_code == 401

    def test_keys_are_compared_as_digests(self, locked, monkeypatch):
        compared = []
        real = keys.hmac.compare_digest
        monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
        locked.get("/v1/models", headers={"authorization": "Bearer first-key"})
        assert [tuple(map(len, pair)) for pair in compared] == [(32, 32)] * 2, "all keys, by 32 bytes each"

    def test_owners_do_not_share_prefixes(self, locked, engine):
        for key in self.KEYS:
            for salt in ("", "s"):
                headers = {"authorization": b"Bearer " + key.encode()}
                locked.post(COMPLETIONS, json={**BODY, "cache_salt": salt}, headers=headers)
        salts = [request.salt for request in engine.requests]
        assert len(set(salts)) == 4
        assert not any(key in salt for key in self.KEYS for salt in salts)


UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.mark.parametrize("label", ["abc-123", "10.0.0.1:8080", "a b", "x" * 128])
def test_a_label_comes_back(client, label):
    assert client.get("/health", headers={"x-request-id": label}).headers["x-request-id"] == label


@pytest.mark.parametrize("label", [b"", b"x" * 129, b"\xc3\xa9", b"\x1b[31m", b"a\tb"])
def test_an_unfit_label_is_replaced(client, label):
    assert UUID.fullmatch(client.get("/health", headers={"x-request-id": label}).headers["x-request-id"])


def test_a_label_names_nothing_inside(client, engine):
    for _ in range(2):
        client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "same"})
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == 2
    assert all(UUID.fullmatch(request_id) for request_id in ids)


def test_internal_errors_have_a_label_and_are_counted(client, engine):
    engine.refuse = RuntimeError("x")
    response = client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "mine"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert 'foveate_requests_rejected_total{status="500"} 1.0' in client.get("/metrics").text
