"""``/v1/files`` and ``/v1/batches``, asked by the OpenAI client and by hand."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from foveate.server import engine as engine_module
from foveate.server import limits
from foveate.server.app import create_app
from foveate.server.batch.download import FileDownload
from foveate.server.batch.errors import InUse
from foveate.server.batch.ledger import Ledger
from foveate.server.batch.records import answered
from foveate.server.batch.store import Store
from foveate.server.cli import main
from foveate.server.serve import FoveateServer, address_of, listen, server_config
from foveate.server.settings import Settings
from foveate.server.state import state_of_app

from .files import chat_line, completion_line, read_records

PAGE = Path(__file__).resolve().parents[3] / "docs/batch.md"
CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "cancelled"}


def jsonl(lines):
    return b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)


def records(content):
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture
def serving(engine, monkeypatch, tmp_path):
    """Starts a server with a batch directory around the fake engine."""

    @contextmanager
    def start(**options):
        monkeypatch.setattr(engine_module.Engine, "load", staticmethod(lambda settings: engine))
        settings = Settings(model="fake-model", port=0, batch_dir=tmp_path / "batches", **options)
        listener = listen(settings.host, settings.port)
        app = create_app(None, settings)
        server = FoveateServer(server_config(app, settings), state_of_app(app), listener)
        server.load_in = threading.Thread(target=server.load)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        server.load_in.start()
        thread.start()
        url = address_of(listener)
        try:
            while httpx.get(f"{url}/health").status_code != 200:
                time.sleep(0.01)
            yield url
        finally:
            server.should_exit = True
            thread.join(60)
            server.load_in.join(60)
            assert not thread.is_alive()

    return start


def client_at(url, key="none"):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def finished(client, batch, seconds=60.0):
    end = time.monotonic() + seconds
    while batch.status not in ENDED:
        assert time.monotonic() < end, f"the batch is still {batch.status}"
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def upload(client, lines, name="requests.jsonl"):
    return client.files.create(file=(name, jsonl(lines)), purpose="batch")


def run(client, lines, endpoint=CHAT, **options):
    file = upload(client, lines)
    batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)
    return finished(client, batch)


def test_the_openai_client_from_upload_to_answers(serving, engine):
    with serving() as url, client_at(url) as client:
        file = upload(client, [chat_line("a"), chat_line("b", temperature=9), chat_line("c", attention="x"), b"{"])
        assert (file.object, file.purpose, file.filename) == ("file", "batch", "requests.jsonl")
        assert client.files.retrieve(file.id) == file
        assert [item.id for item in client.files.list()] == [file.id]
        assert len(client.files.content(file.id).content) == file.bytes

        batch = client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"job": "night"}
        )
        assert (batch.object, batch.endpoint, batch.metadata) == ("batch", CHAT, {"job": "night"})
        batch = finished(client, batch)
        assert batch.status == "completed"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (4, 1, 3)
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at

        [record] = records(client.files.content(batch.output_file_id).content)
        assert (record["custom_id"], record["response"]["status_code"], record["error"]) == ("a", 200, None)
        assert record["response"]["body"]["choices"][0]["message"]["content"] == engine.script
        errors = {record["custom_id"]: record for record in records(client.files.content(batch.error_file_id).content)}
        assert errors["b"]["response"]["body"]["error"]["param"] == "temperature"
        assert errors["c"]["response"]["status_code"] == 400
        assert (errors[None]["error"]["code"], errors[None]["error"]["line"]) == ("invalid_json", 4)

        assert [item.id for item in client.batches.list()] == [batch.id]
        assert {item.purpose for item in client.files.list()} == {"batch", "batch_output"}
        assert [item.id for item in client.files.list(purpose="batch")] == [file.id]
        assert client.files.delete(batch.output_file_id).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.content(batch.output_file_id)


def test_the_program_of_the_page_runs_as_it_is_written(serving, engine, tmp_path, monkeypatch):
    blocks = dict(reversed(re.findall(r"```(json|python)\n(.*?)```", PAGE.read_text(), re.DOTALL)))  # the first of each
    monkeypatch.chdir(tmp_path)
    Path("requests.jsonl").write_text(blocks["json"])
    engine.model_name = "smollm2-135m"
    names = {}
    with serving() as url:
        exec(blocks["python"].replace("http://127.0.0.1:8000", url), names)
        names["client"].close()
    [answer] = read_records(Path("answers.jsonl"))
    assert (answer["custom_id"], answer["response"]["status_code"]) == ("q1", 200)
    [error] = read_records(Path("errors.jsonl"))
    assert (error["custom_id"], error["error"]["code"]) == ("q2", "invalid_url")


def test_completions_with_attention_per_line(serving, engine):
    with serving() as url, client_at(url) as client:
        lines = [completion_line("a"), completion_line("b", attention={"scheme": "streaming"}), chat_line("c")]
        batch = run(client, lines, "/v1/completions")
        told = {record["custom_id"]: record for record in records(client.files.content(batch.output_file_id).content)}
        used = {name: record["response"]["body"]["usage"]["attention"]["scheme"] for name, record in told.items()}
        assert used == {"a": "dense", "b": "streaming"}
        [error] = records(client.files.content(batch.error_file_id).content)
        assert (error["custom_id"], error["error"]["code"]) == ("c", "invalid_url")


def test_a_cancelled_batch_keeps_what_is_done(serving, engine):
    engine.script = "xy"
    with serving(batch_in_flight=1) as url, client_at(url) as client:
        file = upload(client, [chat_line(str(number)) for number in range(50)])
        engine.hold_after = 10  # each line has four events
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while engine.gate.is_set() or client.batches.retrieve(batch.id).request_counts.completed < 2:
            time.sleep(0.01)
        with pytest.raises(openai.BadRequestError, match="cancel it first"):
            client.files.delete(file.id)
        assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
        batch = finished(client, batch)
        engine.gate.set()
        assert batch.status == "cancelled"
        done = records(client.files.content(batch.output_file_id).content)
        assert 2 <= len(done) == batch.request_counts.completed < 50
        assert engine.pages_used == 0
        with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
            client.batches.cancel(run(client, [chat_line("a")]).id)


def test_a_restarted_server_goes_on(serving, engine):
    engine.script = "xy"
    engine.step_seconds = 0.01
    shutdown, engine.shutdown = engine.shutdown, lambda seconds: None
    with serving(batch_in_flight=2) as url, client_at(url) as client:
        file = upload(client, [chat_line(str(number)) for number in range(20)])
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while client.batches.retrieve(batch.id).request_counts.completed < 3:
            time.sleep(0.01)
    engine.shutdown = shutdown
    engine.step_seconds = 0
    with serving() as url, client_at(url) as client:
        batch = finished(client, client.batches.retrieve(batch.id))
        assert batch.request_counts.completed == 20
        done = [record["custom_id"] for record in records(client.files.content(batch.output_file_id).content)]
        assert sorted(done, key=int) == [str(number) for number in range(20)]


@pytest.mark.parametrize("cancelled", [False, True], ids=["left-alone", "cancelled"])
def test_a_batch_with_a_damaged_state_file_ends(serving, engine, tmp_path, cancelled):
    engine.hold_after = 6  # each line has four events or more
    with serving(batch_in_flight=1) as url, client_at(url) as client:
        file = upload(client, [chat_line(str(number)) for number in range(20)])
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while engine.gate.is_set():
            time.sleep(0.01)
    engine.gate.set()
    for state in (tmp_path / "batches" / "states").iterdir():
        state.write_bytes(bytes(4096))
    if cancelled:
        store = Store(tmp_path / "batches")
        store.advance(batch.id, "cancelling", ())
        store.close()
    with serving() as url, client_at(url) as client:
        batch = finished(client, client.batches.retrieve(batch.id))
        assert batch.status == ("cancelled" if cancelled else "failed")
        if not cancelled:
            assert batch.errors.data[0].code == "cannot_resume"
        assert client.files.delete(file.id).deleted
    assert not list((tmp_path / "batches" / "states").iterdir())


def test_another_model_after_a_restart_is_told(serving, engine):
    engine.script = "xy"
    engine.hold_after = 6  # each line has four events
    with serving(batch_in_flight=1) as url, client_at(url) as client:
        file = upload(client, [chat_line(str(number)) for number in range(20)])
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while client.batches.retrieve(batch.id).request_counts.completed < 1:
            time.sleep(0.01)
    engine.gate.set()
    engine.identity = {**engine.identity, "weights": "4567"}
    with serving() as url, client_at(url) as client:
        batch = finished(client, client.batches.retrieve(batch.id))
        assert batch.status == "failed"
        assert "weights has changed" in batch.errors.data[0].message
        assert "--restart" not in batch.errors.data[0].message
        done = records(client.files.content(batch.output_file_id).content)
        assert len(done) == batch.request_counts.completed < 20


@pytest.mark.parametrize(
    ("lines", "code"), [([], "empty_file"), ([chat_line("a"), chat_line("b"), chat_line("c")], "too_many_lines")]
)
def test_a_file_that_cannot_run_fails(serving, lines, code):
    with serving(max_batch_lines=2) as url, client_at(url) as client:
        batch = run(client, lines)
        assert (batch.status, batch.errors.data[0].code) == ("failed", code)
        assert (batch.output_file_id, batch.error_file_id) == (None, None)


def test_keys_do_not_see_each_other(serving, engine):
    with serving(api_key=["one", "two"]) as url, client_at(url, "one") as one, client_at(url, "two") as two:
        batch = run(one, [chat_line("a")])
        for look in (
            lambda: two.files.retrieve(batch.input_file_id),
            lambda: two.files.content(batch.output_file_id),
            lambda: two.files.delete(batch.output_file_id),
            lambda: two.batches.retrieve(batch.id),
            lambda: two.batches.cancel(batch.id),
            lambda: two.files.list(after=batch.input_file_id),
            lambda: two.batches.list(after=batch.id),
            lambda: two.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                look()
        assert list(two.files.list()) == list(two.batches.list()) == []
        run(two, [chat_line("a")])
        mine, theirs = (request.salt for request in engine.requests)
        assert mine != theirs


def test_pages_of_lists(serving):
    with serving() as url, client_at(url) as client:
        files = [upload(client, [chat_line("a")], f"{number}.jsonl").id for number in range(5)]
        assert [item.id for item in client.files.list(limit=2)] == files[::-1]
        assert [item.id for item in client.files.list(limit=2, order="asc", after=files[1])] == files[2:]
        first = client.files.list(limit=2)
        assert (len(first.data), first.has_more) == (2, True)


@pytest.fixture
def http(client_of, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "LINGER_SECONDS", 0.01)
    return client_of(batch_dir=tmp_path / "batches", max_file_bytes=4096, max_stored_bytes=6000)


def form(parts, end=b"--x--\r\n"):
    return b"".join(b"--x\r\ncontent-disposition: form-data; " + part + b"\r\n" for part in parts) + end


FILE = b'name="file"; filename="a"\r\n\r\n{}'
PURPOSE = b'name="purpose"\r\n\r\nbatch'


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (form([PURPOSE, FILE]), 200, None),
        (form([FILE, PURPOSE]), 200, None),
        (form([FILE]), 400, "missing_required_parameter"),
        (form([PURPOSE]), 400, "missing_required_parameter"),
        (form([PURPOSE, b'name="file"\r\n\r\n{}']), 400, "invalid_form"),
        (form([PURPOSE, FILE, FILE]), 400, "invalid_form"),
        (form([FILE, b'name="purpose"\r\n\r\nfine-tune']), 400, "invalid_value"),
        (form([PURPOSE, FILE], end=b""), 400, "invalid_form"),
        (b"", 400, "invalid_form"),
        (b"no form", 400, "invalid_form"),
        (form([b'name="a"\r\n\r\n' + b"b" * 5000, PURPOSE, FILE]), 400, "invalid_form"),
        (form([b'name="%d"\r\n\r\nb' % number for number in range(20)]), 400, "invalid_form"),
        (form([PURPOSE, b'name="file"; filename="a"\r\n' + b"a: b\r\n" * 100 + b"\r\n{}"]), 400, "invalid_form"),
        (form([PURPOSE, FILE + b"x" * 5000]), 413, "file_too_large"),
        (form([PURPOSE, FILE, b'name="expires_after[seconds]"\r\n\r\n3600']), 400, "unsupported_parameter"),
    ],
    ids=[
        "good", "file-first", "no-purpose", "no-file", "no-filename", "two-files", "purpose", "cut", "empty", "text",
        "long-field", "many-fields", "many-headers", "too-large", "expires",
    ],
)  # fmt: skip
def test_forms(http, tmp_path, content, status, code):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = http.post("/v1/files", content=content, headers=headers)
    assert response.status_code == status, response.text
    if code:
        assert response.json()["error"]["code"] == code
        assert list((tmp_path / "batches" / "files").iterdir()) == []
    assert list((tmp_path / "batches" / "uploads").iterdir()) == []


def test_other_content_types_are_refused(http):
    assert http.post("/v1/files", json={}).status_code == 415
    assert http.post("/v1/files", content=b"", headers={"content-type": "multipart/form-data"}).status_code == 415


def test_names_of_files_are_labels(http, tmp_path):
    made = http.post("/v1/files", files={"file": ("../../etc/pass\nwd", b"{}")}, data={"purpose": "batch"}).json()
    assert made["id"].startswith("file-")
    assert "\n" not in made["filename"]
    assert [path.name for path in (tmp_path / "batches" / "files").iterdir()] == [made["id"]]
    for id in ("../batches.sqlite", "%2e%2e%2fbatches.sqlite", "..%2fbatches.sqlite", "x" * 5000, "%00"):
        assert http.get(f"/v1/files/{id}").status_code == 404
        assert http.get(f"/v1/files/{id}/content").status_code == 404
        assert http.delete(f"/v1/files/{id}").status_code == 404
        assert http.post(f"/v1/batches/{id}/cancel").status_code == 404


def test_one_server_has_a_directory(http, engine, tmp_path):
    with pytest.raises(InUse, match="in use by another process"):
        create_app(engine, Settings(model="fake-model", batch_dir=tmp_path / "batches"))


def test_a_directory_that_cannot_be_used_ends_the_server(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert main(["serve", "fake-model", "--port", "0", "--batch-dir", str(tmp_path / "file" / "batches")]) == 1
    assert "cannot use" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["told", "chunked"])
def test_uploads_at_once_share_the_room(serving, tmp_path, length):
    body = form([PURPOSE, FILE + b"x" * 3500])
    with serving(max_file_bytes=4096, max_stored_bytes=6000) as url, ThreadPoolExecutor(2) as threads:
        halves = threading.Event()

        def pieces():
            yield body[:1000]
            halves.wait(60)
            yield body[1000:]

        def send(_):
            headers = {"content-type": "multipart/form-data; boundary=x"}
            if length == "told":
                headers["content-length"] = str(len(body))
            return httpx.post(f"{url}/v1/files", content=pieces(), headers=headers)

        sent = threads.map(send, range(2))
        end = time.monotonic() + 60
        while len(list((tmp_path / "batches" / "uploads").iterdir())) < 2:
            assert time.monotonic() < end
            time.sleep(0.005)
        halves.set()
        answers = list(sent)
        [refused] = [answer.json()["error"]["code"] for answer in answers if answer.status_code != 200]
        assert refused == "storage_full"
        [kept] = [answer.json()["id"] for answer in answers if answer.status_code == 200]
        assert httpx.delete(f"{url}/v1/files/{kept}").status_code == 200
        # What was refused keeps no room.
        again = httpx.post(f"{url}/v1/files", files={"file": ("a", b"x" * 4000)}, data={"purpose": "batch"})
        assert again.status_code == 200


def test_a_download_ends_with_its_client(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(64 * 2**20)
    pieces = []

    async def download():
        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):  # as uvicorn's, which drops what comes after the client left
            pieces.append(message.get("body", b""))
            if len(pieces) == 3:
                gone.set()

        await FileDownload(path, "large", 30)({"type": "http"}, receive, send)

    asyncio.run(download())
    assert len(pieces) <= 5


def test_uploads_of_one_key_are_bounded(http, monkeypatch):
    monkeypatch.setattr("foveate.server.batch.service.UPLOADS_AT_ONCE", 0)
    response = http.post("/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_uploads")


def test_what_a_killed_server_left_is_swept(engine, tmp_path):
    folder = tmp_path / "batches"
    store = Store(folder)
    kept = store.upload_path()
    kept.write_bytes(b"{}")
    file = store.add_file("", "batch", "a", kept)
    batch = store.add_batch("", CHAT, "24h", file, None)
    store.file_path(batch.output_file).write_bytes(b"half a li")
    for path in (store.upload_path(), store.file_path("file-of-no-row"), folder / "states" / "batch_of_no_row-wal"):
        path.write_bytes(b"x")
    store.close()
    store = Store(folder)
    assert sorted(path.name for path in (folder / "files").iterdir()) == sorted([file.id, batch.output_file])
    assert list((folder / "uploads").iterdir()) == list((folder / "states").iterdir()) == []
    store.close()


def test_a_batch_cancelled_by_a_killed_server_ends_with_whole_records(serving, engine, tmp_path):
    store = Store(tmp_path / "batches")
    given = store.upload_path()
    given.write_bytes(jsonl([chat_line("a")]))
    batch = store.add_batch("", CHAT, "24h", store.add_file("", "batch", "a", given), None)
    ledger = Ledger(store.state_path(batch), store.file_path(batch.output_file), store.file_path(batch.error_file), {})
    ledger.add([answered(1, "a", {})])
    ledger.close()
    with store.file_path(batch.output_file).open("ab") as file:
        file.write(b'{"id":"batch_req_torn')
    store.advance(batch.id, "cancelling")
    store.close()
    with serving() as url, client_at(url) as client:
        ended = finished(client, client.batches.retrieve(batch.id))
        assert (ended.status, ended.request_counts.completed) == ("cancelled", 1)
        assert [record["custom_id"] for record in records(client.files.content(ended.output_file_id).content)] == ["a"]


def test_the_store_has_a_bound(http):
    for status in (200, 413):
        response = http.post("/v1/files", files={"file": ("a", b"x" * 4000)}, data={"purpose": "batch"})
        assert response.status_code == status
    assert response.json()["error"]["code"] == "storage_full"


def test_answers_that_are_being_written_count(http, tmp_path):
    (tmp_path / "batches" / "files" / "file-output").write_bytes(b"x" * 4000)
    response = http.post("/v1/files", files={"file": ("a", b"x" * 4000)}, data={"purpose": "batch"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "storage_full")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": 5}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a" * 65: "b"}}, f"metadata.{'a' * 64}.[key]"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_batches_are_refused(http, change, param):
    file = http.post("/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h", **change}
    response = http.post("/v1/batches", json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/files"), ("POST", "/v1/files"), ("GET", "/v1/files/a"), ("DELETE", "/v1/files/a"),
        ("GET", "/v1/files/a/content"), ("GET", "/v1/batches"), ("POST", "/v1/batches"), ("GET", "/v1/batches/a"),
        ("POST", "/v1/batches/a/cancel"),
    ],
)  # fmt: skip
def test_without_a_directory_the_flag_is_named(client, method, path):
    response = client.request(method, path)
    assert response.status_code == 400
    assert "--batch-dir" in response.json()["error"]["message"]
