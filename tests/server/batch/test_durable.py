"""What is told as kept is on the disk."""

from __future__ import annotations

import asyncio
import os

from foveate.server.batch.ledger import Ledger
from foveate.server.batch.records import answered
from foveate.server.batch.upload import receive_form

FACTS = {"input": "sha256 0"}


def synced(monkeypatch):
    """Notes inode and size of what is synced."""
    seen = []
    real = os.fsync

    def fsync(descriptor):
        about = os.fstat(descriptor)
        seen.append((about.st_ino, about.st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def test_a_record_is_synced_before_its_line_counts_as_done(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "state", tmp_path / "output", None, FACTS)
    seen = synced(monkeypatch)
    ledger.add([answered(1, "a", {"text": "x"})])
    about = (tmp_path / "output").stat()
    ledger.close()
    assert (about.st_ino, about.st_size) in seen


def test_an_upload_is_synced_whole(tmp_path, monkeypatch):
    seen = synced(monkeypatch)
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\nlines\r\n--b--\r\n'

    async def stream():
        yield part

    form = asyncio.run(receive_form("multipart/form-data; boundary=b", stream(), tmp_path / "f", 100))
    about = (tmp_path / "f").stat()
    assert form.size == about.st_size == 5
    assert (about.st_ino, 5) in seen
