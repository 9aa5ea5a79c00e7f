"""The Triton kernels, compiled for five kinds of GPU on a machine without one: what the machine code holds.

Each target compiles in a process of its own (``aot_compile.py``), because another test interprets the kernels and
Triton decides between the two when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

Entries = list[dict[str, Any]]

KIB = 1024
# Shared memory of one program (CUDA C++ Programming Guide, compute capabilities; CDNA 3 ISA, LDS). sm_80 itself has
# 163 KiB; sm_86 and sm_89 run the same sizes and have 99.
SHARED = {"sm_80": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "sm_120": 99 * KIB, "gfx942": 64 * KIB}
# Names in SASS: HMMA is mma.sync, HGMMA wgmma, UTC*MMA tcgen05. Sixteen rows of decode are too few for the latter two.
PREFILL_PRODUCT = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}
DECODE_PRODUCT = {"sm_80": "HMMA", "sm_90": "HMMA", "sm_100": "HMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}
PRODUCT = {"prefill": PREFILL_PRODUCT, "decode": DECODE_PRODUCT}
# Scalar registers that an AMD compiler parks in lanes of a vector register, outside the loop: no memory is touched.
MOST_LANES = 16

pytestmark = [pytest.mark.timeout(900), pytest.mark.parametrize("target", SHARED)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Iterator[Callable[[str], Entries]]:
    """Starts all targets, two at a time, and hands out the entries of one as soon as it is done."""
    cache = tmp_path_factory.mktemp("triton")

    def run(target: str) -> Entries:
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache / target), "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(Path(__file__).with_name("aot_compile.py")), target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        futures = {target: pool.submit(run, target) for target in SHARED}
        yield lambda target: futures[target].result()


def test_nothing_spills_to_memory(target, compiled):
    spilled = {entry["case"]: entry["spilled"] for entry in compiled(target) if entry["spilled"]}
    assert not spilled, f"{target}: bytes or instructions of spills by kernel: {spilled}"
    assert max(entry["lanes"] for entry in compiled(target)) <= MOST_LANES


def test_shared_memory_fits(target, compiled):
    used = {entry["case"]: entry["shared"] for entry in compiled(target)}
    assert max(used.values()) <= SHARED[target], f"{target}: {max(used, key=used.__getitem__)} takes too much"


def test_products_run_on_the_tensor_core(target, compiled):
    held = {entry["case"]: entry["tensor_core"] for entry in compiled(target)}
    prefill = {case: names for case, names in held.items() if case.endswith("/prefill_kernel")}
    decode = {case: names for case, names in held.items() if case.endswith("/decode_kernel")}
    antidiagonal = {case: names for case, names in held.items() if case.endswith("/antidiagonal_kernel")}
    assert len(prefill) == 5
    assert len(decode) == 4
    assert len(antidiagonal) == 3
    thresholded = {phase: [held[c] for c in held if c.endswith(f"/thresholded_{phase}_kernel")] for phase in PRODUCT}
    assert [len(names) for names in thresholded.values()] == [3, 3]
    for phase, product in PRODUCT.items():
        assert all(product[target] in names for names in thresholded[phase]), thresholded
    assert all(PREFILL_PRODUCT[target] in names for names in prefill.values()), prefill
    assert all(DECODE_PRODUCT[target] in names for names in decode.values()), decode
    anchored = {phase: [held[case] for case in held if "anchor-" in case and phase in case] for phase in PRODUCT}
    assert [len(names) for names in anchored.values()] == [4, 2]
    for phase, product in PRODUCT.items():
        assert all(product[target] in names for names in anchored[phase]), anchored
    gated = [held[case] for case in held if case.endswith(("/block_gate_kernel", "/gathered_kernel"))]
    assert len(gated) == 6
    assert all({PREFILL_PRODUCT[target], DECODE_PRODUCT[target]} & {*names} for names in gated), held
    # The widest tile is a tile of prefill; the others are too few rows for wgmma and tcgen05.
    assert all(PREFILL_PRODUCT[target] in names or DECODE_PRODUCT[target] in names for names in antidiagonal.values())
    assert PREFILL_PRODUCT[target] in antidiagonal["antidiagonal-d128-g8-s4/antidiagonal_kernel"]
