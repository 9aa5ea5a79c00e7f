"""The lines of a batch file, read one at a time: a file may be larger than memory, and so may a line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

_SKIP_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank.

    Attributes:
        number: Where it stands, from 1; blank lines count.
        data: Its bytes, or ``None`` where there are more than the limit.
    """

    number: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class Scan:
    """What one pass over an input tells.

    Attributes:
        sha256: Of the whole file, in hex.
        lines: Lines that are not blank.
    """

    sha256: str
    lines: int


def read_lines(file: BinaryIO, max_bytes: int, digest: hashlib._Hash | None = None) -> Iterator[Line]:
    """The lines of ``file`` that are not blank; holds ``max_bytes`` of one line at most.

    Args:
        file: Open at its beginning.
        max_bytes: Of one line, its end included.
        digest: Is fed everything that is read.
    """
    number = 0
    while piece := file.readline(max_bytes + 1):
        number += 1
        if digest is not None:
            digest.update(piece)
        too_long = len(piece) > max_bytes
        while piece and not piece.endswith(b"\n") and too_long:
            piece = file.readline(_SKIP_BYTES)
            if digest is not None:
                digest.update(piece)
        if too_long:
            yield Line(number, None)
            continue
        data = piece.removeprefix(_BOM) if number == 1 else piece
        if data.strip():
            yield Line(number, data)


def scan(path: Path, max_bytes: int, max_lines: int | None = None) -> Scan:
    """Reads ``path`` once, or as far as the first line after ``max_lines``.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        lines = sum(
            1 for _ in islice(read_lines(file, max_bytes, digest), None if max_lines is None else max_lines + 1)
        )
    return Scan(digest.hexdigest(), lines)
