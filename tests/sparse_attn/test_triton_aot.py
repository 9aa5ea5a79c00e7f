"""The Triton kernels, compiled for five kinds of GPU on a machine without one: what the machine code holds.

Each target compiles in a process of its own (``aot_compile.py``), because another test interprets the kernels and
Triton decides between the two when it is imported. Every shape is compiled for one target of each kind of tensor core;
the two whose assembler takes longest get the dearest shapes (``python aot_compile.py sm_100`` compiles them all).
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
# Names in PTX: mma.sync is of sm_80 and later, wgmma of sm_90, tcgen05 of sm_100. Sixteen rows of decode are too few
# for the latter two.
MMA, WGMMA, TCGEN05, MFMA = "mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma"
PREFILL_PRODUCT = {"sm_80": MMA, "sm_90": WGMMA, "sm_100": TCGEN05, "sm_120": MMA, "gfx942": MFMA}
DECODE_PRODUCT = {"sm_80": MMA, "sm_90": MMA, "sm_100": MMA, "sm_120": MMA, "gfx942": MFMA}
# By kernel: how many are compiled, of every shape and of the dearest.
COUNTS = {
    "prefill": (5, 2),
    "decode": (4, 2),
    "thresholded_prefill": (3, 1),
    "thresholded_decode": (3, 1),
    "antidiagonal": (3, 1),
    "block_gate": (3, 1),
    "gathered": (3, 1),
    "anchor_lse": (3, 2),
    "anchor_pool": (3, 2),
}
DEAREST = {"sm_100", "sm_120"}
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
        command += ["dearest"] if target in DEAREST else []
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
    held: dict[str, dict[str, list[str]]] = {name: {} for name in COUNTS}
    for entry in compiled(target):
        case, kernel = entry["case"].split("/")
        held.get(kernel.removesuffix("_kernel"), {})[case] = entry["tensor_core"]
    assert {name: len(cases) for name, cases in held.items()} == {
        name: counts[target in DEAREST] for name, counts in COUNTS.items()
    }
    widest, narrow = PREFILL_PRODUCT[target], DECODE_PRODUCT[target]
    for name in ("prefill", "thresholded_prefill"):
        assert all(widest in names for names in held[name].values()), held[name]
    for name in ("decode", "thresholded_decode"):
        assert all(narrow in names for names in held[name].values()), held[name]
    for name in ("anchor_lse", "anchor_pool"):
        assert all((widest if "prefill" in case else narrow) in names for case, names in held[name].items()), held[name]
    # Only the widest tile of antidiagonals is a tile of prefill.
    for name in ("block_gate", "gathered", "antidiagonal"):
        assert all({widest, narrow} & {*names} for names in held[name].values()), held[name]
    assert widest in held["antidiagonal"]["antidiagonal-d128-g8-s4"]
