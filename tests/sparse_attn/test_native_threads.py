"""Threads of the kernels' own: the same results as on one thread, whoever calls, and no CPU taken while idle."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from foveate.patches.norm_native import NativeNorm
from foveate.sparse_attn.ops import native

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

THREADS = 4
NAME = "foveate-cpu"


@pytest.fixture
def own():
    """Kernels run on so many threads of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    native.library().keep_threads()
    yield
    native.library().keep_threads(False)
    torch.set_num_threads(before)


def rows(seed, count=700):
    return torch.randn(count, 512, generator=torch.Generator().manual_seed(seed))


def normed(x):
    return NativeNorm(torch.ones(512), 1e-6, from_one=False)(x)


def test_every_row_is_computed_once(own):
    for seed in range(50):
        x = rows(seed, 300 + 13 * seed)
        torch.set_num_threads(1)
        alone = normed(x)
        torch.set_num_threads(THREADS)
        assert torch.equal(normed(x), alone)


def test_callers_at_once_get_each_their_own(own):
    wanted = [normed(rows(seed)) for seed in range(4)]
    wrong = []

    def call(seed):
        x = rows(seed)
        wrong.extend(seed for _ in range(200) if not torch.equal(normed(x), wanted[seed]))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def spent():
    """Clock ticks that the kernels' threads, and those that they made, have run, by thread."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        if (task / "comm").read_text().strip() == NAME:
            found[task.name] = int(fields[11]) + int(fields[12])
    return found


def test_idle_threads_sleep(own):
    normed(rows(0, 4000))
    before = spent()
    assert len(before) >= THREADS - 1  # and torch's, which the first of them made
    time.sleep(0.5)
    assert sum(spent().values()) - sum(before.values()) <= 2  # of 50 for each that spins


FORK = """
import os
import torch
from foveate.patches.norm_native import NativeNorm
from foveate.sparse_attn.ops import native

native.library().keep_threads()
torch.set_num_threads(3)
x, norm = torch.randn(3000, 512), NativeNorm(torch.ones(512), 1e-6, from_one=False)
wanted = norm(x)
child = os.fork()
same = torch.equal(norm(x), wanted)
if child == 0:
    os._exit(0 if same else 3)
assert same and os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_has_threads_of_its_own():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=120)
