"""API keys and admin keys, from settings and from files."""

from __future__ import annotations

import logging

import pytest
from fastapi import FastAPI, Request

from foveate.server import keys
from foveate.server.app import create_app
from foveate.server.keys import KeyRing, require_admin
from foveate.server.settings import Settings

from .conftest import LocalClient


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# keys of two users\none\n\n  two  \n")
    path.chmod(0o600)
    return path


def bearer(key):
    return f"Bearer {key}".encode()


def admin_app(engine, **options):
    """The application with one more route, which only an administrator may use."""
    app: FastAPI = create_app(engine, Settings(model="m", **options))

    @app.get("/secret")
    async def secret(request: Request) -> dict[str, str]:
        require_admin(request)
        return {"it": "is 42"}

    return LocalClient(app)


def ask(client, key=None, path="/secret"):
    response = client.get(path, headers={} if key is None else {"authorization": bearer(key)})
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response


def outcome(response):
    return (response.status_code, response.json().get("error", {}).get("code"))


class TestAdmin:
    def test_with_api_keys(self, engine):
        client = admin_app(engine, api_key=["user"], admin_key=["root", "root2"])
        assert outcome(ask(client)) == (401, "invalid_api_key")
        assert outcome(ask(client, "wrong")) == (401, "invalid_api_key")
        assert outcome(ask(client, "user")) == (403, "admin_key_required")
        for key in ("root", "root2"):
            assert outcome(ask(client, key)) == (200, None)
            assert ask(client, key, "/v1/models").status_code == 200, "an admin's key opens what a user's does"

    def test_without_api_keys(self, engine):
        client = admin_app(engine, admin_key=["root"])
        assert ask(client, path="/v1/models").status_code == 200
        assert outcome(ask(client)) == (401, "invalid_api_key")
        assert outcome(ask(client, "wrong")) == (401, "invalid_api_key")
        assert outcome(ask(client, "root")) == (200, None)

    @pytest.mark.parametrize("key", [None, "", "user", "wrong"])
    def test_without_an_admin_key_the_path_is_closed(self, engine, key):
        assert outcome(ask(admin_app(engine), key)) == (403, "admin_disabled")
        expected = (403, "admin_disabled") if key == "user" else (401, "invalid_api_key")
        assert outcome(ask(admin_app(engine, api_key=["user"]), key)) == expected

    def test_it_needs_the_bearer_scheme(self, engine):
        client = admin_app(engine, admin_key=["root"])
        assert client.get("/secret", headers={"authorization": "Basic root"}).status_code == 401
        assert client.get("/secret", headers={"authorization": "root"}).status_code == 401


class TestFiles:
    def test_lines_are_keys(self, key_file):
        ring = KeyRing(Settings(model="m", api_key=["three"], api_key_file=key_file))
        assert all(ring.caller(bearer(key)).owner for key in ("one", "two", "three"))
        assert not any(ring.caller(bearer(key)).owner for key in ("", "# keys of two users", "on", "one\ntwo"))

    def test_admin_keys_too(self, key_file):
        ring = KeyRing(Settings(model="m", admin_key_file=key_file))
        assert ring.caller(bearer("one")).admin
        assert not ring.locked, "admin keys alone do not lock the other paths"

    def test_reload(self, key_file):
        ring = KeyRing(Settings(model="m", api_key_file=key_file))
        key_file.write_text("three\n")
        assert ring.caller(bearer("one")).owner
        ring.reload()
        assert not ring.caller(bearer("one")).owner
        assert ring.caller(bearer("three")).owner

    @pytest.mark.parametrize(
        "content", [b"", b"# none\n", b"\xff\xfe", None], ids=["empty", "comment", "binary", "gone"]
    )
    def test_a_file_that_went_bad_keeps_the_keys(self, key_file, caplog, content):
        ring = KeyRing(Settings(model="m", api_key_file=key_file))
        key_file.unlink()
        if content is not None:
            key_file.write_bytes(content)
        ring.reload()
        assert ring.caller(bearer("one")).owner
        assert ring.locked
        assert "the old keys stay" in caplog.text

    @pytest.mark.parametrize(("mode", "warns"), [(0o604, True), (0o644, True), (0o640, False), (0o600, False)])
    def test_a_file_that_everyone_can_read(self, key_file, caplog, mode, warns):
        key_file.chmod(mode)
        KeyRing(Settings(model="m", api_key_file=key_file))
        assert ("chmod o-r" in caplog.text) == warns
        assert "one" not in caplog.text.replace(str(key_file), "")

    def test_nothing_of_a_key_is_shown(self, key_file, caplog):
        caplog.set_level(logging.DEBUG)
        settings = Settings(model="m", api_key=["s3cret-a"], admin_key=["s3cret-b"], api_key_file=key_file)
        ring = KeyRing(settings)
        ring.reload()
        assert "s3cret" not in caplog.text + repr(settings) + repr(vars(ring))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b"", "holds no key"),
        (b"#\n\n", "holds no key"),
        (b"\xff", "not UTF-8"),
        (b"k" * 2**21, "larger"),
    ],
    ids=["missing", "empty", "comments", "binary", "huge"],
)
def test_a_bad_file_is_refused(tmp_path, content, words):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    for field in ("api_key_file", "admin_key_file"):
        with pytest.raises(ValueError, match=words) as refusal:
            Settings(model="m", **{field: path})
        assert "k" * 20 not in str(refusal.value)


def test_a_mark_before_the_text_is_no_part_of_a_key(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\ufeffmine\nother\n")
    ring = KeyRing(Settings(model="m", api_key_file=path))
    assert [bool(ring.caller(f"Bearer {key}".encode()).owner) for key in ("mine", "other", "\ufeffmine")] == [1, 1, 0]


def test_a_directory_is_no_key_file(tmp_path):
    with pytest.raises(ValueError, match="cannot read"):
        Settings(model="m", api_key_file=tmp_path)


def test_every_key_is_compared(monkeypatch):
    """One more or less of them would tell by the time which one was right."""
    compared = []
    real = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    ring = KeyRing(Settings(model="m", api_key=["a", "b"], admin_key=["c"]))
    for key in ("a", "b", "c", "wrong"):
        compared.clear()
        ring.caller(bearer(key))
        assert compared == [(32, 32)] * 3
