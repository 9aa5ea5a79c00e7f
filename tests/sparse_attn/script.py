"""Cases of Triton kernels, run by files that are scripts too; not collected by pytest.

Triton reads ``TRITON_INTERPRET`` when it is first imported, and other tests import it for the real compiler. So a file
of cases is started in processes of its own, prints one JSON array ``[name, result]`` per case, and its tests judge
those. Where there is a GPU the kernels run on it, else in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.kv_cache.view import LayerPages, PagedView, Rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
# On a GPU nearly all the time goes into compiling, which wants cores.
PROCESSES = max(1, (os.cpu_count() or 1) // 4) if DEVICE.type == "cuda" else 1

Cases = Mapping[str, Callable[[], Any]]


class Measured(dict[str, Any]):
    """What each case gave, by name. Asking for one that raised fails the test with its traceback."""

    def __missing__(self, name: str) -> Any:
        pytest.fail(f"{name} was not run", pytrace=False)

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if isinstance(found, dict) and "raised" in found:
            pytest.fail(found["raised"], pytrace=False)
        return found


def measure(module: str, seconds: int) -> Measured:
    """Runs the cases of a test file, such as ``test_chunks_triton``, which gives ``tell_cases`` all of them."""
    interpreter = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if DEVICE.type == "cpu" else {}
    strict = ("-W", "error") if DEVICE.type == "cpu" else ()  # a GPU's compilers and drivers warn as they like
    command = [sys.executable, *strict, "-m", f"tests.sparse_attn.{module}"]
    running = [
        subprocess.Popen(
            [*command, str(part), str(PROCESSES)],
            env=os.environ | interpreter,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for part in range(PROCESSES)
    ]
    found, end = Measured(), time.monotonic() + seconds
    try:
        for process in running:
            out, err = process.communicate(timeout=max(end - time.monotonic(), 1))
            assert process.returncode == 0, err[-4000:]
            found |= dict(map(json.loads, out.splitlines()))
    finally:
        for process in running:
            process.kill()  # one that has ended stays as it is
            process.wait()
    return found


def tell_cases(cases: Cases) -> None:
    """Prints what each case gives, or how it failed. Arguments: which part of the cases, of how many."""
    part, parts = map(int, sys.argv[1:] or (0, 1))
    for name in list(cases)[part::parts]:
        try:
            result = cases[name]()
        except Exception:  # the other cases can still be told
            result = {"raised": traceback.format_exc(limit=-8)}
        print(json.dumps([name, result]), flush=True)


def on_device(view: PagedView) -> PagedView:
    """The same pages and rows where the kernels run."""
    pages, rows = view.pages, view.rows
    moved = LayerPages(
        pages.keys.to(DEVICE), pages.values.to(DEVICE), {stat: kept.to(DEVICE) for stat, kept in pages.stats.items()}
    )
    return PagedView(moved, Rows.build(rows.host_block_tables, rows.host_context_lens, rows.host_query_lens, DEVICE))
