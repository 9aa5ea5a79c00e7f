"""/v1/cache: who may use it, what it tells, what it removes."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest

from foveate.server.app import create_app
from foveate.server.engine import Engine
from foveate.server.settings import Settings

from .conftest import LocalClient

ADMIN = {"authorization": "Bearer root"}
USER = {"authorization": "Bearer alice"}


@pytest.fixture(scope="module")
def settings(model_dir, tmp_path_factory):
    return Settings(
        model=model_dir, dtype="float32", page_size=16, kv_cache_gib=0.01, api_key=["alice", "bob"], admin_key=["root"],
        cache_dir=str(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip


@pytest.fixture
def client(settings):
    engine = Engine.load(settings)
    with LocalClient(create_app(engine, settings), raise_server_exceptions=False) as client:
        client.delete("/v1/cache", headers=ADMIN)
        yield client
    engine.shutdown(0)


def ask(client, seed, headers=USER, length=200, **fields):
    body = {"prompt": [(seed + place) % 256 for place in range(length)], "max_tokens": 2, "temperature": 0, **fields}
    answer = client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def listed(client, count):
    """The list, as soon as it has so many entries."""
    deadline = time.monotonic() + 60
    while True:
        answer = client.get("/v1/cache", headers=ADMIN)
        assert answer.status_code == 200
        if len(answer.json()["data"]) == count:
            return answer.json()
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/cache"), ("DELETE", "/v1/cache"), ("DELETE", f"/v1/cache/{'0' * 32}")]
)
@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"authorization": "Bearer x"}, 401), (USER, 403)],
    ids=["no-key", "wrong-key", "user"],
)
def test_only_an_administrator_may(client, method, path, headers, status):
    assert client.request(method, path, headers=headers).status_code == status


def test_what_is_kept_is_listed_and_removed(client):
    assert ask(client, 1) == 0
    listed(client, 1)
    assert ask(client, 2, length=300, attention={"scheme": "streaming"}) == 0
    found = listed(client, 2)
    assert (found["object"], found["has_more"]) == ("list", False)
    assert found["bytes"] == sum(entry["bytes"] for entry in found["data"]) <= found["limit_bytes"]
    newest, oldest = found["data"]
    assert (newest["attention"], newest["tokens"]) == ("streaming", 288)
    assert (oldest["attention"], oldest["tokens"]) == ("dense", 192)
    assert abs(newest["created"] - time.time()) < 60
    assert "prompt" not in client.get("/v1/cache", headers=ADMIN).text
    first = client.get("/v1/cache?limit=1", headers=ADMIN).json()
    assert (first["data"], first["has_more"]) == ([newest], True)
    rest = client.get(f"/v1/cache?limit=1&after={newest['id']}", headers=ADMIN).json()
    assert (rest["data"], rest["has_more"]) == ([oldest], False)
    gone = client.delete(f"/v1/cache/{oldest['id']}", headers=ADMIN)
    assert gone.json() == {"id": oldest["id"], "object": "cache.entry", "deleted": True}
    assert client.delete(f"/v1/cache/{oldest['id']}", headers=ADMIN).status_code == 404
    listed(client, 1)
    assert ask(client, 1) == 0, "memory forgot it, too"
    listed(client, 2)
    assert client.delete("/v1/cache", headers=ADMIN).json()["count"] == 2
    assert listed(client, 0)["bytes"] == 0


def test_what_the_disk_does_not_let_go_is_not_said_to_be_gone(client, monkeypatch):
    ask(client, 1)
    (entry,) = listed(client, 1)["data"]

    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        for path in (f"/v1/cache/{entry['id']}", "/v1/cache"):
            answer = client.delete(path, headers=ADMIN)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cache_not_removed")
        assert listed(client, 1)["data"] == [entry]
    assert client.delete(f"/v1/cache/{entry['id']}", headers=ADMIN).status_code == 200
    listed(client, 0)


@pytest.mark.parametrize("id", ["x", "..%2f..%2fetc%2fpasswd", "A" * 32, "0" * 33, "%00", "0" * 32])
def test_ids_that_are_none_are_not_found(client, id):
    answer = client.delete(f"/v1/cache/{id}", headers=ADMIN)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit=1e9", f"after={'x' * 65}"])
def test_a_query_out_of_range_is_refused(client, query):
    assert client.get(f"/v1/cache?{query}", headers=ADMIN).status_code == 400


def test_keys_and_salts_do_not_see_each_others_documents_after_a_restart(settings):
    def serve():
        engine = Engine.load(settings)
        return engine, LocalClient(create_app(engine, settings))

    engine, client = serve()
    assert ask(client, 5) == 0
    engine.shutdown(0)
    engine, client = serve()
    bob = {"authorization": "Bearer bob"}
    assert [ask(client, 5, bob), ask(client, 5, cache_salt="s"), ask(client, 5, ADMIN), ask(client, 5)] == [
        0,
        0,
        0,
        192,
    ]
    text = client.get("/metrics").text
    assert "foveate_disk_hit_tokens_total 192.0" in text
    assert "foveate_disk_corrupt_files_total 0.0" in text
    engine.shutdown(0)


def test_without_a_directory_there_is_no_cache(model_dir):
    settings = Settings(model=model_dir, dtype="float32", kv_cache_gib=0.01, admin_key=["root"])
    engine = Engine.load(settings)
    client = LocalClient(create_app(engine, settings))
    answer = client.get("/v1/cache", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "cache_disabled")
    assert "foveate_disk" not in client.get("/metrics").text
    engine.shutdown(0)
