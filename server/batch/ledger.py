"""Which lines are done, and the files that hold what came of them.

Records are appended and reach the disk first; then one transaction of the state file says which lines they are and
how long the files are now. Whatever stands behind that length was written by a run that was killed before its
transaction: it is cut off when the next run begins, and its lines are run again. So a line's record is in the files
once, if and only if the state file says that it is done.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Literal

from .database import open_alone, reason, unusable
from .errors import BatchError, CannotResume
from .records import RECORD_HEAD, Result, id_key

_SCHEMA = """
CREATE TABLE IF NOT EXISTS done (line INTEGER PRIMARY KEY, id BLOB);
CREATE UNIQUE INDEX IF NOT EXISTS done_ids ON done (id) WHERE id IS NOT NULL;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    begun INTEGER, output_bytes INTEGER, errors_bytes INTEGER, answered INTEGER, failed INTEGER
);
INSERT OR IGNORE INTO totals VALUES (1, 0, 0, 0, 0, 0);
"""
_OPTIONS = re.compile(r"\b\w*Options\(")  # how a scheme's identity holds its options


class Ledger:
    """The outputs of one batch and the state file beside them. One thread at a time may use it.

    Args:
        state: Path of the state file.
        output: Where answers go.
        errors: Where error records go; to ``output`` if ``None``.
        facts: What this run's answers depend on, see ``require``.
        restart: Forget what is done.

    Attributes:
        answered: Lines with an answer.
        failed: Lines with an error record.

    Raises:
        InUse: another process writes there.
        CannotResume: a fact has changed, the outputs are not as the last run left them, or the state file is damaged.
        BatchError: a file cannot be opened.
    """

    def __init__(
        self, state: Path, output: Path, errors: Path | None, facts: Mapping[str, str], restart: bool = False
    ) -> None:
        _check_places(state, output, errors)
        self._connection = open_alone(state, _SCHEMA)
        self._files: list[_Appended] = []
        try:
            if restart:
                self._forget()
            row: tuple[int, ...] = self._connection.execute(
                "SELECT begun, output_bytes, errors_bytes, answered, failed FROM totals"
            ).fetchone()
            begun, *sizes, self.answered, self.failed = row
            self.require(facts)
            paths = [output] if errors is None else [output, errors]
            for path, size in zip(paths, sizes, strict=False):
                self._files.append(_Appended(path, size, "any" if restart else "ours" if begun else "none"))
            self._connection.execute("UPDATE totals SET begun = 1")
        except sqlite3.Error as error:
            self.close()
            raise unusable(state, error) from None
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> int:
        """Lines that have a record."""
        return self.answered + self.failed

    def require(self, facts: Mapping[str, str]) -> None:
        """Says what this run's answers depend on, by name. Before the first line is done, any facts will do.

        Raises:
            CannotResume: a fact differs from the last run's.
        """
        if self.done == 0:
            self._connection.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())
            return
        known = dict(self._connection.execute("SELECT name, value FROM facts"))
        for name, value in facts.items():
            if known.setdefault(name, value) != value:
                raise CannotResume(
                    f"cannot go on: the {name} has changed since the last run, which had {_shown(known[name])}; now it "
                    f"is {_shown(value)}. {self.done} lines are done"
                )

    def is_done(self, number: int) -> bool:
        return self._connection.execute("SELECT 1 FROM done WHERE line = ?", (number,)).fetchone() is not None

    def has_id(self, custom_id: str) -> bool:
        """Whether a line with this id is done."""
        row = self._connection.execute("SELECT 1 FROM done WHERE id = ?", (id_key(custom_id),)).fetchone()
        return row is not None

    def add(self, results: Sequence[Result]) -> None:
        """Writes records, all of them or none. They are on the disk when this returns.

        Raises:
            BatchError: they cannot be written; what was done before is safe.
        """
        failed = sum(result.failed for result in results)
        output, errors = self._files[0], self._files[-1]
        try:
            output.write(b"".join(result.data for result in results if errors is output or not result.failed))
            if errors is not output:
                errors.write(b"".join(result.data for result in results if result.failed))
            with self._transaction():
                self._connection.executemany(
                    "INSERT INTO done VALUES (?, ?)", [(result.number, result.key) for result in results]
                )
                self._connection.execute(
                    "UPDATE totals SET output_bytes = ?, errors_bytes = ?, answered = ?, failed = ?",
                    (output.size, errors.size, self.answered + len(results) - failed, self.failed + failed),
                )
        except (OSError, sqlite3.Error) as error:
            for file in self._files:
                file.back()
            raise BatchError(f"cannot write results: {reason(error)}. The {self.done} lines done are safe") from error
        for file in self._files:
            file.keep()
        self.answered += len(results) - failed
        self.failed += failed

    def close(self) -> None:
        for file in self._files:
            file.close()
        with suppress(sqlite3.Error):
            self._connection.close()

    def _forget(self) -> None:
        with self._transaction():
            self._connection.execute("DELETE FROM done")
            self._connection.execute("DELETE FROM facts")
            self._connection.execute("UPDATE totals SET output_bytes = 0, errors_bytes = 0, answered = 0, failed = 0")

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)


class _Transaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
        elif self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


class _Appended:
    """A file that only grows, by whole records.

    Args:
        size: Bytes that belong to it; what stands behind them is cut off.
        takes: Where none belong to it, what may be cut off: ``any`` thing, ``ours`` (a record), or ``none``.
    """

    def __init__(self, path: Path, size: int, takes: Literal["any", "ours", "none"]) -> None:
        try:
            # Not buffered: what could not be written must not be written later.
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise BatchError(f"cannot write {path}: {error.strerror}") from None
        self._kept = self.size = size
        descriptor = self._file.fileno()
        found = os.fstat(descriptor).st_size
        head = os.pread(descriptor, len(RECORD_HEAD), 0)
        is_ours = takes == "any" or (takes == "ours" and RECORD_HEAD.startswith(head))
        problem = None
        if size == 0 and found and not is_ours:
            problem = f"{path} exists, and no batch that could go on left it: name another file"
        elif found < size or (size and os.pread(descriptor, 1, size - 1) != b"\n"):
            problem = f"cannot go on: {path} has changed since the last run"
        if problem:
            self._file.close()
            raise CannotResume(problem)
        self._file.truncate(size)
        self._file.seek(size)
        _sync_folder(path.parent)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            written = self._file.write(rest) or 0
            rest = rest[written:]
            self.size += written
        if data:
            os.fsync(self._file.fileno())

    def keep(self) -> None:
        """What was written belongs to the file."""
        self._kept = self.size

    def back(self) -> None:
        """Takes back what was written since ``keep``."""
        self.size = self._kept
        with suppress(OSError):  # else the next run cuts it off
            self._file.truncate(self._kept)
            self._file.seek(self._kept)

    def close(self) -> None:
        self._file.close()


def same_file(one: Path, other: Path) -> bool:
    """Whether both names are of one file, by links too; it need not exist."""
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return one.resolve() == other.resolve()


def _shown(fact: str) -> str:
    """A fact as people read it: identities of schemes are made to be compared."""
    words = " ".join(part for part in fact.split("\0") if part)
    return _OPTIONS.sub("(", words)


def _check_places(state: Path, output: Path, errors: Path | None) -> None:
    if errors is not None and same_file(errors, output):
        raise BatchError("errors and answers cannot go to the same file by two names; leave --errors out")
    for path in (output, errors):
        if path is not None and path.exists() and not S_ISREG(path.stat().st_mode):
            raise BatchError(f"{path} is not a plain file")
        if path is not None and same_file(path, state):
            raise BatchError(f"{path} is the state file; name another")


def _sync_folder(path: Path) -> None:
    """A new file's name is on the disk after this."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
