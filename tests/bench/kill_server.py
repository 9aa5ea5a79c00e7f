"""Kills `foveate serve` again and again while it runs a batch, and counts: every custom_id once, none lost.

    .venv/bin/python tests/bench/kill_server.py --model smollm2-135m --lines 500 --kills 20

Each server is killed (SIGKILL) at a random moment after it became ready; the next one goes on with the batch.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

URL = "/v1/completions"


@contextmanager
def serving(model: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """A server that is ready; it is killed at the end."""
    command = [sys.executable, "-m", "foveate.server", "serve", model, "--port", "0", "--batch-dir", str(folder)]
    with subprocess.Popen(
        [*command, "--batch-in-flight", "16"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if "ready on" in line), "")
            if not line:
                raise RuntimeError("the server ended before it was ready")
            yield process, openai.OpenAI(base_url=f"{line.split()[-1]}/v1", api_key="none", max_retries=0)
        finally:
            process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="packaged name or directory")
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.5, help="a server runs so long at most")
    given = parser.parse_args()
    random.seed(given.seed)
    names = [f"line-{number}" for number in range(given.lines)]
    bodies = [{"prompt": f"Line {number} says", "max_tokens": 2 + number % 15} for number in range(given.lines)]
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": body})
        for name, body in zip(names, bodies, strict=True)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "batches"
        batch_id = None
        kills = 0
        while kills < given.kills:
            with serving(given.model, folder) as (_, client):
                if batch_id is None:
                    file = client.files.create(file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch")
                    batch_id = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id
                time.sleep(random.uniform(0, given.seconds))
                batch = client.batches.retrieve(batch_id)
            if batch.status == "completed":
                print("the batch ended before the last kill")
                break
            kills += 1
            assert batch.request_counts is not None
            print(f"kill {kills}: {batch.status}, {batch.request_counts.completed} of {given.lines}", flush=True)
        with serving(given.model, folder) as (_, client):
            while (batch := client.batches.retrieve(str(batch_id))).status != "completed":
                time.sleep(0.1)
            assert batch.output_file_id is not None
            content = client.files.content(batch.output_file_id).content
    ids = Counter(json.loads(line)["custom_id"] for line in content.splitlines())
    lost, doubled = set(names) - set(ids), [name for name, count in ids.items() if count > 1]
    torn = not content.endswith(b"\n")
    print(f"{kills} kills: {sum(ids.values())} records, {len(lost)} lost, {len(doubled)} duplicated; counted: {batch}")
    return 1 if lost or doubled or torn or kills < given.kills else 0


if __name__ == "__main__":
    sys.exit(main())
