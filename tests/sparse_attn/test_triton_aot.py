"""The Triton kernels, compiled ahead of time for five GPUs: no spills, shared memory within the card, tensor cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("aot_compile.py")
# Shared memory that one block can have, in KiB: CUDA programming guide, table of compute capabilities; CDNA 3 ISA.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


@pytest.mark.parametrize("target", SHARED_KIB)
def test_kernels_compile_within_the_card(target, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), target], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    assert len(kernels) >= 5
    for kernel in kernels:
        name = kernel["case"]
        assert kernel["spilled"] == 0, f"{name} spills {kernel['spilled']} bytes"
        assert kernel["shared"] <= SHARED_KIB[target] * 1024, f"{name} takes {kernel['shared']} bytes of shared memory"
        if "prefill" in name.rsplit("/")[-1] or name.rsplit("/")[-1].startswith("decode"):
            assert kernel["tensor_core"], f"{name} has no tensor-core instruction"
