"""The soak of ``tests/bench/soak.py`` in small: mixed requests, a third cut off, and nothing may be left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "soak.py"


def test_nothing_leaks(tmp_path):
    command = [sys.executable, str(SCRIPT), "--requests", "150", "--rounds", "5", "--clients", "24", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("PASSED\n")
