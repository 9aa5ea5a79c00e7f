"""Kills `foveate batch` again and again, and counts: every custom_id once, none lost, no half line.

    .venv/bin/python tests/bench/kill_batch.py --model smollm2-135m        # 20 kills in 500 lines

Each run is killed (SIGKILL) at a random moment after its first new record, or sooner; the last one ends by itself. One
line in a hundred is bad, to be found among the error records. Exits with 1 if anything is lost, doubled or torn.

``--fork`` makes each run a fork of one process that has imported everything: the same code is killed, and a run begins
sooner.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

BAD_EVERY = 100


def write_input(path: Path, lines: int, model: str) -> set[str]:
    """An input of ``lines`` lines; returns the ids of the good ones."""
    good = set()
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            body = {"model": model, "prompt": f"Line {number} says", "max_tokens": 2 + number % 15, "temperature": 0}
            if number % BAD_EVERY == BAD_EVERY // 2:
                body["temperature"] = 9
            else:
                good.add(f"line-{number}")
            line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return good


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


class Forked:
    """A run of the command in a fork of this process."""

    def __init__(self, arguments: list[str], said: Path) -> None:
        from foveate.server import engine  # noqa: F401 (imported once, for every fork)
        from foveate.server.cli import main

        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = 70
            try:
                status = main(arguments)
            finally:
                os._exit(status)
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while (status := self.poll()) is None:
            time.sleep(0.001)
        return status


def started(arguments: list[str], said: Path, fork: bool) -> Forked | subprocess.Popen[bytes]:
    if fork:
        return Forked(arguments, said)
    with said.open("wb") as stderr:
        return subprocess.Popen([sys.executable, "-m", "foveate.server", *arguments], stderr=stderr)


def run_once(arguments: list[str], output: Path, kill_after: float | None, fork: bool) -> int:
    """Runs until the end, or until ``kill_after`` seconds after the first new record. Returns the exit status."""
    before = count_lines(output)
    said = output.with_name("stderr.txt")
    process = started(arguments, said, fork)
    if kill_after is not None:
        if random.random() < 0.8:  # the others are killed while the model is loaded, or while they resume
            while process.poll() is None and count_lines(output) == before:
                time.sleep(0.001)
        deadline = time.monotonic() + kill_after
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
    status = process.wait()
    if status not in (0, -signal.SIGKILL):
        print(said.read_text(errors="replace")[-2000:])
    return status


def check(output: Path, errors: Path, good: set[str], lines: int) -> list[str]:
    """What is wrong with the finished outputs."""
    wrong = []
    ids: Counter[str] = Counter()
    for path, is_good in ((output, True), (errors, False)):
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            wrong.append(f"{path.name} ends in half a line")
        for line in data.splitlines():
            record = json.loads(line)
            ids[record["custom_id"]] += 1
            if (record["custom_id"] in good) != is_good or (record["response"]["status_code"] == 200) != is_good:
                wrong.append(f"{record['custom_id']} is in {path.name}")
    lost = [f"line-{number}" for number in range(lines) if f"line-{number}" not in ids]
    doubled = [name for name, count in ids.items() if count > 1]
    print(f"{sum(ids.values())} records, {len(lost)} lost, {len(doubled)} duplicated")
    return wrong + [f"{name} is lost" for name in lost] + [f"{name} is doubled" for name in doubled]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="packaged name or directory")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="a run lives so long at most after its first record")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--fork", action="store_true", help="begin runs sooner")
    given = parser.parse_args(arguments)
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        source, output, errors = (Path(folder) / name for name in ("input.jsonl", "output.jsonl", "errors.jsonl"))
        good = write_input(source, given.lines, Path(given.model).name)
        command = ["batch", str(source), "-o", str(output)]
        command += ["--errors", str(errors), "--model", given.model, "--batch-in-flight", str(given.in_flight)]
        kills = 0
        torn = 0
        while kills < given.kills:
            status = run_once(command, output, random.uniform(0, given.seconds), given.fork)
            if status != -signal.SIGKILL:
                print(f"run {kills + 1} ended by itself with {status}: nothing was left to kill")
                break
            kills += 1
            data = output.read_bytes() if output.exists() else b""
            torn += bool(data) and not data.endswith(b"\n")
            print(f"kill {kills}: {count_lines(output) + count_lines(errors)} of {given.lines} lines are written")
        status = run_once(command, output, None, given.fork)
        print(f"{kills} kills ({torn} left half a line), then a run to the end: exit {status}")
        wrong = check(output, errors, good, given.lines)
    for item in wrong[:20]:
        print(item)
    return 1 if wrong or status or kills < given.kills else 0


if __name__ == "__main__":
    sys.exit(main())
