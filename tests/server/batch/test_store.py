"""Files and batches that the server remembers."""

from __future__ import annotations

import pytest

from foveate.server.batch.store import ENDED, Store

CHAT = "/v1/chat/completions"


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "batches")
    yield made
    made.close()


def file_in(store, owner="ada", content=b"{}\n"):
    path = store.upload_path()
    path.write_bytes(content)
    return store.add_file(owner, "batch", "lines.jsonl", path)


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing", "cancelling", *ENDED])
def test_the_input_of_a_batch_that_has_not_ended_stays(store, status):
    file = file_in(store)
    batch = store.add_batch("ada", CHAT, "24h", file, None)
    if status != "validating":
        store.advance(batch.id, status)
    user = store.remove_file(file)
    assert (user is None) == (status in ENDED)
    assert store.file_path(file.id).exists() == (status not in ENDED)
    assert (store.file("ada", file.id) is None) == (status in ENDED)


def test_a_stage_keeps_the_time_at_which_it_began(store, monkeypatch):
    batch = store.add_batch("ada", CHAT, "24h", file_in(store), None)
    for now in (1000, 2000):  # a server that is started again begins a batch again
        monkeypatch.setattr("foveate.server.batch.store.time.time", lambda now=now: now)
        store.advance(batch.id, "in_progress")
    assert store.batch("ada", batch.id).times == {"in_progress": 1000}
