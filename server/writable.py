"""Whether a file can be written, asked before hours of work."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def part_of(target: Path) -> Path:
    """Where a file is written, to be put in its place whole."""
    return target.with_name(f".{target.name}.part")


def check_writable(target: Path) -> None:
    """
    Raises:
        OSError: ``target`` cannot be written by way of ``part_of``.
    """
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    part = part_of(target)
    part.open("wb").close()
    part.unlink()
