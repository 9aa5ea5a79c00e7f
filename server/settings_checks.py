"""Checks of settings that look at files, so that a wrong one is said before anything is loaded."""

from __future__ import annotations

from pathlib import Path

_MAX_KEY_FILE_BYTES = 2**20


def read_keys(path: Path) -> list[str]:
    """The keys in ``path``: one per line; empty lines and lines that begin with ``#`` are passed over.

    Raises:
        ValueError: it cannot be read, is no text, or holds no key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > _MAX_KEY_FILE_BYTES:
        raise ValueError(f"{path} is larger than {_MAX_KEY_FILE_BYTES} bytes: is it a file of keys?")
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no key")
    return keys
