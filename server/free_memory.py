"""How much memory this process may still take: what the machine has left, and the control groups it is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Version 1 has no word for "no limit", but a number that no machine reaches.
_NO_LIMIT = 2**60


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What can be had without swapping, file caches included; the least of the machine and of each control group."""
    with (proc / "meminfo").open(encoding="ascii") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return max(min([available, *_left(proc, groups)]), 0)


def _left(proc: Path, groups: Path) -> Iterator[int]:
    """What each group with a limit has left."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit, used, cache = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"  # with the groups inside, as the usage is
        else:
            continue
        for folder in _upwards(root, path):
            try:
                most, taken = (folder / limit).read_text(), (folder / used).read_text()
                if most.strip() != "max" and int(most) < _NO_LIMIT:
                    yield int(most) - int(taken) + _statistic(folder, cache)
            except (OSError, ValueError):  # not there, as in the root of version 2
                continue


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folders from a group's up to ``root``. Those a container does not see are missing; the root is its own."""
    folder = root if ".." in path.split("/") else root / path.lstrip("/")
    while folder != root:
        yield folder
        folder = folder.parent
    yield root


def _statistic(folder: Path, name: str) -> int:
    """A line of ``memory.stat``; 0 if there is none."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
