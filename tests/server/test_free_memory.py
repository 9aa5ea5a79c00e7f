"""What a process may still take, in control groups of both versions."""

from __future__ import annotations

import pytest
import torch

from foveate.server import loader
from foveate.server.free_memory import free_bytes

MIB = 2**20
NONE_V1 = 2**63 - 4096  # what version 1 says where there is no limit


def machine(tmp_path, cgroup, files):
    """Folders like /proc and /sys/fs/cgroup, of a machine with 1,000 MiB free."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB\n")
    if cgroup is not None:
        (proc / "self" / "cgroup").write_text(cgroup)
    for name, value in files.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return proc, groups


def v2(folder, limit, used, inactive=0):
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used * MIB,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive * MIB}\nactive_file 7",
    }


def v1(folder, limit, used, inactive=0):
    return {
        f"memory/{folder}/memory.limit_in_bytes": limit,
        f"memory/{folder}/memory.usage_in_bytes": used * MIB,
        f"memory/{folder}/memory.stat": f"inactive_file 0\ntotal_inactive_file {inactive * MIB}",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        (None, {}, 1000),
        ("0::/a/b\n", {}, 1000),
        ("0::/a/b\n", v2("a/b", "max", 50), 1000),
        ("0::/a/b\n", v2("a/b", 300 * MIB, 50), 250),
        ("0::/a/b\n", v2("a/b", 300 * MIB, 50, inactive=20), 270),
        ("0::/a/b\n", v2("a/b", "max", 50) | v2("a", 200 * MIB, 120), 80),
        ("0::/a/b\n", v2("a/b", 300 * MIB, 50) | v2("a", 200 * MIB, 10), 190),
        ("0::/\n", v2(".", 300 * MIB, 50), 250),
        ("0::/../other\n", v2(".", 300 * MIB, 50), 250),
        ("0::/a\n", v2("a", 300 * MIB, 400), 0),
        ("0::/a\n", v2("a", 5000 * MIB, 50), 1000),
        ("0::/a\n", {"a/memory.max": 300 * MIB}, 1000),
        ("0::/a\n", {"a/memory.max": 300 * MIB, "a/memory.current": 50 * MIB}, 250),
        ("5:cpu:/a\n4:memory:/a/b\n0::/\n", v1("a/b", 300 * MIB, 50, inactive=20), 270),
        ("4:memory:/a/b\n", v1("a/b", NONE_V1, 50) | v1("a", 200 * MIB, 10), 190),
        ("4:memory:/docker/123\n", v1(".", 300 * MIB, 50), 250),
        ("5:cpu:/a\n", v1("a", 300 * MIB, 50), 1000),
    ],
)
def test_the_tightest_limit_counts(tmp_path, cgroup, files, free):
    assert free_bytes(*machine(tmp_path, cgroup, files)) == free * MIB


def test_the_kv_cache_is_sized_by_it(monkeypatch):
    monkeypatch.setattr(loader, "free_bytes", lambda: 123)
    assert loader._free_bytes(torch.device("cpu")) == 123
