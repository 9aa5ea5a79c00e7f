"""The script behind the README's table of schemes runs, and times what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "schemes_cpu.py"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_it_prints_a_row_per_scheme(phase):
    command = [sys.executable, str(SCRIPT), "--phase", phase, "--contexts", "1024", "--chunk", "128", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    rows = [line.split() for line in done.stdout.splitlines() if line.count(".") > 2]
    names = [row[0] for row in rows]
    assert names[0] == "dense"
    assert {"kascade", "dhsa", "moba", "top_theta", "exact_topk"} < set(names)
    choosing = {row[0]: float(row[3]) for row in rows}
    assert choosing["exact_topk"] > 0
    assert float(rows[names.index("kascade")][1].rstrip("%")) < 60
