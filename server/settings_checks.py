"""Checks of settings that look at the machine, so that a wrong one is said before anything is loaded."""

from __future__ import annotations

import importlib.util
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
        lines = content.decode("utf-8-sig").splitlines()  # some editors put a mark before the text
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ValueError(f"{path} holds no key")
    return keys


def require_opentelemetry() -> None:
    """Checks that traces can be made.

    Raises:
        ValueError: the library is missing.
    """
    # Each name in turn: to look for a module imports its parents.
    for name in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
        try:
            missing = importlib.util.find_spec(name) is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            raise ValueError("traces need OpenTelemetry: pip install 'foveate[otel]'")
