"""SQLite files that one process has for itself, and that survive a kill and a power cut."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from .errors import BatchError, Damaged, InUse

CACHE_KIB = 2048


def open_alone(path: Path, schema: str) -> sqlite3.Connection:
    """The database at ``path``, made if it is missing, locked until it is closed.

    Every commit is on the disk when it returns. May be used from any thread, by one at a time.

    Raises:
        InUse: another process has it.
        Damaged: it is no database, or no longer one.
        BatchError: it cannot be opened.
    """
    try:
        # Made here and not by SQLite: what it holds of requests is nobody else's business.
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as error:
        raise BatchError(f"cannot open {path}: {reason(error)}") from None
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.executescript(f"BEGIN IMMEDIATE; {schema}; COMMIT;")
    except sqlite3.Error as error:
        connection.close()
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise InUse(f"{path} is in use by another process") from None
        raise unusable(path, error) from None
    return connection


def unusable(path: Path, error: sqlite3.Error) -> BatchError:
    """What to raise where the database at ``path`` fails: ``Damaged`` if it always will."""
    # The low byte is the kind of failure, the rest its details.
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    kind = Damaged if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT) else BatchError
    return kind(f"cannot use {path}: {error}")


def reason(error: Exception) -> str:
    """What the system said, without numbers and paths."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
