"""The allocator of a process that serves on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Whether the mapping that holds a large tensor was advised to use huge pages: its flags have "hg".
ADVISED = """
import re, torch
from foveate.server.memory import tune_allocator
tune_allocator()
large = torch.ones(2**25)
at = large.data_ptr() + 2**26
inside = False
for line in open("/proc/self/smaps"):
    if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(found[1], 16) <= at < int(found[2], 16)
    elif inside and line.startswith("VmFlags"):
        print("hg" in line.split())
"""


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no huge pages on request")
@pytest.mark.parametrize(("wanted", "advised"), [(None, "True"), ("0", "False")], ids=["default", "off"])
def test_large_tensors_ask_for_huge_pages_unless_told_otherwise(wanted, advised, monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    if wanted is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", wanted)
    told = subprocess.run([sys.executable, "-c", ADVISED], capture_output=True, text=True, timeout=120, check=True)
    assert told.stdout.split() == [advised]
