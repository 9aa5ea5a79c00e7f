"""kill -9 while pages are written, twenty times: what is found afterwards is right, and nothing is left over.

One process imports the library once and forks a writer per round, so that a round takes milliseconds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch

from foveate.kv_cache.disk import FOLDER

from .disk_runs import pages_of, read_all, store_at

ROUNDS = 20
PROMPTS = 6
PAGES = 6
PAGE_BYTES = 100_000
LIMIT_BYTES = 3_000_000  # less than all prompts take, so that files are evicted while others are written
WRITER = textwrap.dedent(
    f"""
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    from disk_runs import run_of, store_at
    runs = [run_of(seed, first, 2, {PAGE_BYTES}) for seed in range({PROMPTS}) for first in range(0, {PAGES}, 2)]
    for line in sys.stdin:
        writer = os.fork()
        if writer == 0:
            store = store_at(Path(line.strip()), {LIMIT_BYTES})
            print(os.getpid(), flush=True)
            while True:
                for run in runs:
                    store.write(*run)
                store.remove([run.name for run in store._index.oldest()[::2]])
        os.waitpid(writer, 0)
        print("gone", flush=True)
    """
)


def test_twenty_kills_leave_no_wrong_page(tmp_path):
    rng = random.Random(5)
    command = [sys.executable, "-c", WRITER]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found, parts = 0, 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(ROUNDS):
            print(tmp_path, file=parent.stdin, flush=True)
            writer = int(parent.stdout.readline())
            time.sleep(rng.uniform(0.0, 0.06))
            os.kill(writer, signal.SIGKILL)
            assert parent.stdout.readline() == "gone\n"
            parts += sum(path.name.endswith(".part") for path in (tmp_path / FOLDER).iterdir())
            store = store_at(tmp_path, LIMIT_BYTES)
            for seed in range(PROMPTS):
                pages = read_all(store, seed, PAGES)
                found += len(pages)
                if pages:
                    assert torch.equal(torch.stack(pages), pages_of(seed, 0, len(pages), PAGE_BYTES))
            assert store.counts.corrupt == 0, "a killed writer leaves whole files or none"
            left = list((tmp_path / FOLDER).iterdir())
            assert not [path for path in left if path.name.endswith(".part")]
            assert sum(path.stat().st_size for path in left) == store.nbytes
        parent.stdin.close()
    assert found > ROUNDS, "the writers wrote next to nothing: the kills came too early"
    assert parts > 0, "no kill came within a write"
