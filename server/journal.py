"""A file of JSON lines under a header: what was measured is written down at once, and a run goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class OtherResults(Exception):
    """The directory holds results that cannot be compared with those to come."""


class Journal:
    """One JSON object per line, the first of them the header.

    A last line that was cut off in the middle is dropped.

    Args:
        path: Its directory is made if need be; ``None`` keeps everything in memory.
        header: What results must share to be compared; JSON values.
        fresh: Forget what is there.

    Attributes:
        header: As given.
        lines: What is written, in order.

    Raises:
        OtherResults: the file has another header; the message says what differs.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any], fresh: bool = False) -> None:
        self._path = path
        self.header: dict[str, Any] = json.loads(json.dumps(dict(header)))
        self.lines: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not fresh:
            self._restore(path)
        else:
            path.write_text(json.dumps(self.header) + "\n", encoding="utf-8")

    def add(self, line: Mapping[str, Any]) -> None:
        """Writes a line down."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.lines.append(dict(line))

    def _restore(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        header = json.loads(lines[0]) if lines else {}
        differing = sorted(name for name in {*header, *self.header} if header.get(name) != self.header.get(name))
        if differing:
            raise OtherResults(
                f"{path} holds results with another {', '.join(differing)}; "
                "choose another directory, or forget them with --fresh"
            )
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):
            path.write_text("".join(whole), encoding="utf-8")
        self.lines = [json.loads(line) for line in whole[1:]]
