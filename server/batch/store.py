"""What the server keeps of files and batches: rows in one SQLite file, contents in plain files beside it.

A file's path is made from an id that the server made and that stands in a row; nothing of a request enters it. Every
look-up names the owner, so one key's files and batches do not exist for another.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .database import open_alone
from .errors import BatchError

Order = Literal["asc", "desc"]
ENDED = ("failed", "completed", "cancelled")
# Stages of a batch that are told with the time at which they began.
STAGES = ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, owner TEXT, purpose TEXT, filename TEXT, bytes INTEGER,
    created_at INTEGER
);
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner, number);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE, owner TEXT, status TEXT, endpoint TEXT,
    completion_window TEXT, input_file TEXT, output_file TEXT, error_file TEXT, metadata TEXT, errors TEXT,
    created_at INTEGER, times TEXT, total INTEGER, answered INTEGER, failed INTEGER
);
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches (owner, number);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, number);
"""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file.

    Attributes:
        bytes: Its size.
        created_at: Unix time in seconds.
    """

    number: int
    id: str
    owner: str
    purpose: str
    filename: str
    bytes: int
    created_at: int


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """One batch.

    Attributes:
        input_file, output_file, error_file: Ids. Those of the outputs are given out when the batch is made; they are
            files for clients once it has ended, if anything is in them.
        times: When each stage of ``STAGES`` began.
        errors: Why it failed, as a client reads it.
        total: Lines of the input, once they were counted.
    """

    number: int
    id: str
    owner: str
    status: str
    endpoint: str
    completion_window: str
    input_file: str
    output_file: str
    error_file: str
    metadata: dict[str, str] | None
    errors: list[dict[str, Any]] | None
    created_at: int
    times: dict[str, int]
    total: int
    answered: int
    failed: int

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Store:
    """The files and batches in one directory. May be used from any thread.

    Raises:
        InUse: another server has the directory.
        BatchError: the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self._files, self._states = directory / "files", directory / "states"
        self._uploads = directory / "uploads"
        try:
            for folder in (directory, self._files, self._states, self._uploads):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BatchError(f"cannot use {directory}: {error.strerror}") from None
        self._lock = threading.Lock()
        self._room = threading.Lock()
        self._promised: dict[Path, int] = {}  # bytes by upload on its way
        self._rows = open_alone(directory / "batches.sqlite", _SCHEMA)
        self._rows.row_factory = sqlite3.Row
        self._sweep()

    def close(self) -> None:
        with self._lock:
            self._rows.close()

    # Files

    def upload_path(self) -> Path:
        """Where the bytes of an upload may go until it is whole."""
        return self._uploads / uuid.uuid4().hex

    def begin_upload(self, path: Path, wanted: int, most: int) -> int:
        """Bytes that the upload to ``path`` may have: ``wanted``, or what is left of ``most`` for all files.

        No other upload is given them until ``end_upload``.
        """
        with self._room:
            # In this order: a file is in the folder before its upload ends, which waits for the lock.
            left = most - self._file_bytes() - sum(self._promised.values())
            self._promised[path] = max(0, min(wanted, left))
            return self._promised[path]

    def end_upload(self, path: Path) -> None:
        """Removes what is left of an upload, and gives back its bytes."""
        try:
            path.unlink(missing_ok=True)
        finally:
            with self._room:
                self._promised.pop(path, None)

    def file_path(self, id: str) -> Path:
        """Where the content of a stored file, or of a batch's output, is."""
        return self._files / id

    def state_path(self, batch: StoredBatch) -> Path:
        return self._states / batch.id

    def add_file(self, owner: str, purpose: str, filename: str, upload: Path) -> StoredFile:
        """Takes ``upload``, which is whole and on the disk, into the store."""
        id = f"file-{uuid.uuid4().hex}"
        size = upload.stat().st_size
        upload.rename(self._files / id)
        with self._lock:
            self._insert_file(id, owner, purpose, filename, size)
        return self._file("id = ?", (id,))

    def file(self, owner: str, id: str) -> StoredFile | None:
        try:
            return self._file("owner = ? AND id = ?", (owner, id))
        except LookupError:
            return None

    def files(
        self, owner: str, purpose: str | None, after: StoredFile | None, limit: int, order: Order
    ) -> list[StoredFile]:
        rows = self._page("files", owner, None if after is None else after.number, limit, order, purpose)
        return [StoredFile(**row) for row in rows]

    def remove_file(self, file: StoredFile) -> StoredBatch | None:
        """Removes a file; returns the batch that still needs it, in which case it stays."""
        with self._lock:
            user = self._rows.execute(
                f"SELECT * FROM batches WHERE input_file = ? AND status NOT IN {ENDED}", (file.id,)
            ).fetchone()
            if user is None:
                self._rows.execute("DELETE FROM files WHERE id = ?", (file.id,))
        if user is not None:
            return _batch(user)
        self.file_path(file.id).unlink(missing_ok=True)
        return None

    # Batches

    def add_batch(
        self, owner: str, endpoint: str, window: str, input_file: StoredFile, metadata: Mapping[str, str] | None
    ) -> StoredBatch | None:
        """A new batch, or ``None`` if its input was removed a moment ago."""
        id = f"batch_{uuid.uuid4().hex}"
        outputs = [f"file-{uuid.uuid4().hex}" for _ in range(2)]
        with self._lock:
            self._rows.execute(
                "INSERT INTO batches (id, owner, status, endpoint, completion_window, input_file, output_file,"
                " error_file, metadata, created_at, times, total, answered, failed)"
                " SELECT ?, ?, 'validating', ?, ?, id, ?, ?, ?, ?, '{}', 0, 0, 0 FROM files WHERE id = ?",
                (id, owner, endpoint, window, *outputs, _json(metadata), int(time.time()), input_file.id),
            )
        return self.batch(owner, id)

    def batch(self, owner: str, id: str) -> StoredBatch | None:
        row = self._row("SELECT * FROM batches WHERE owner = ? AND id = ?", (owner, id))
        return None if row is None else _batch(row)

    def batches(self, owner: str, after: StoredBatch | None, limit: int) -> list[StoredBatch]:
        return [
            _batch(row)
            for row in self._page("batches", owner, None if after is None else after.number, limit, "desc", None)
        ]

    def open_batches(self, owner: str | None = None) -> list[StoredBatch]:
        """Those that have not ended, oldest first; of one owner, or of all."""
        with self._lock:
            rows = self._rows.execute(
                f"SELECT * FROM batches WHERE status NOT IN {ENDED} AND owner = coalesce(?, owner) ORDER BY number",
                (owner,),
            ).fetchall()
        return [_batch(row) for row in rows]

    def advance(self, id: str, status: str, unless: tuple[str, ...] = ENDED, **values: Any) -> bool:
        """Moves a batch on to ``status``, and sets columns; False if it is at one of ``unless`` by now."""
        with self._lock:
            return self._advance(id, status, unless, values)

    def count(self, id: str, answered: int, failed: int) -> None:
        """Keeps how far a batch has come; calls may come in any order."""
        with self._lock:
            self._rows.execute(
                "UPDATE batches SET answered = max(answered, ?), failed = max(failed, ?) WHERE id = ?",
                (answered, failed, id),
            )

    def end(self, batch: StoredBatch, status: str, errors: list[dict[str, Any]] | None = None) -> None:
        """Ends a batch: its outputs become files for its owner, unless they are empty."""
        outputs = [(batch.output_file, "output"), (batch.error_file, "errors")]
        sizes = {id: self.file_path(id).stat().st_size for id, _ in outputs if self.file_path(id).exists()}
        with self._lock:
            self._rows.execute("BEGIN IMMEDIATE")
            try:
                for id, name in outputs:
                    if sizes.get(id):
                        self._insert_file(id, batch.owner, "batch_output", f"{batch.id}_{name}.jsonl", sizes[id])
                self._advance(batch.id, status, ENDED, {"errors": _json(errors)})
                self._rows.execute("COMMIT")
            except BaseException:
                self._rows.execute("ROLLBACK")
                raise
        for id, _ in outputs:
            if not sizes.get(id):
                self.file_path(id).unlink(missing_ok=True)
        _remove_state(self.state_path(batch))

    def output_id(self, batch: StoredBatch, id: str) -> str | None:
        """``id`` of an output, once it is a file."""
        return id if batch.ended and self._row("SELECT 1 FROM files WHERE id = ?", (id,)) is not None else None

    def _advance(self, id: str, status: str, unless: tuple[str, ...], values: Mapping[str, Any]) -> bool:
        columns = {"status": status, **values}
        sets = ", ".join(f"{name} = ?" for name in columns)
        marks = ", ".join("?" * len(unless))
        done = self._rows.execute(
            f"UPDATE batches SET {sets}, times = json_insert(times, '$.' || ?, ?) "
            f"WHERE id = ? AND status NOT IN ({marks})",
            (*columns.values(), status, int(time.time()), id, *unless),
        )
        return done.rowcount == 1

    def _file_bytes(self) -> int:
        """Of all files on the disk, those of batches in work too."""
        total = 0
        with os.scandir(self._files) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # deleted meanwhile
                    total += entry.stat().st_size
        return total

    def _insert_file(self, id: str, owner: str, purpose: str, filename: str, size: int) -> None:
        self._rows.execute(
            "INSERT INTO files (id, owner, purpose, filename, bytes, created_at) VALUES (?, ?, ?, ?, ?, ?)",
            (id, owner, purpose, filename, size, int(time.time())),
        )

    def _file(self, where: str, values: tuple[Any, ...]) -> StoredFile:
        row = self._row(f"SELECT * FROM files WHERE {where}", values)
        if row is None:
            raise LookupError("no such file")
        return StoredFile(**row)

    def _page(
        self, table: str, owner: str, after: int | None, limit: int, order: Order, purpose: str | None
    ) -> list[sqlite3.Row]:
        sign, word = ("<", "DESC") if order == "desc" else (">", "ASC")
        conditions = ["owner = ?"]
        values: list[Any] = [owner]
        if after is not None:
            conditions.append(f"number {sign} ?")
            values.append(after)
        if purpose is not None:
            conditions.append("purpose = ?")
            values.append(purpose)
        query = f"SELECT * FROM {table} WHERE {' AND '.join(conditions)} ORDER BY number {word} LIMIT ?"
        with self._lock:
            return self._rows.execute(query, (*values, limit)).fetchall()

    def _row(self, query: str, values: tuple[Any, ...]) -> sqlite3.Row | None:
        with self._lock:
            row: sqlite3.Row | None = self._rows.execute(query, values).fetchone()
        return row

    def _one(self, query: str) -> sqlite3.Row:
        row = self._row(query, ())
        if row is None:
            raise LookupError(query)
        return row

    def _sweep(self) -> None:
        """Removes what a killed server left: uploads, and contents that no row names."""
        known = {row["id"] for row in self._rows.execute("SELECT id FROM files")}
        live = self.open_batches()
        known |= {id for batch in live for id in (batch.output_file, batch.error_file)}
        states = {batch.id for batch in live}
        for path in self._uploads.iterdir():
            path.unlink()
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink()
        for path in self._states.iterdir():
            if path.name.removesuffix("-wal").removesuffix("-shm") not in states:
                path.unlink()


def _batch(row: sqlite3.Row) -> StoredBatch:
    values = dict(row)
    for name in ("metadata", "errors", "times"):
        values[name] = None if values[name] is None else json.loads(values[name])
    return StoredBatch(**values)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _remove_state(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        with suppress(OSError):
            os.unlink(f"{path}{suffix}")
