"""How long short chats wait for their next token while one maximal prompt is computed, on a real server.

    python tests/bench/latency_under_prefill.py [MODEL] [--chats 2] [--context 0] [--step-seconds 0.25]
        [--attention streaming] [-o REPORT.json]

Starts `foveate serve`, keeps so many short chats going (each about 30 tokens of prompt and 64 of answer, one after
the other, all different), measures the time between two tokens at the client, first alone and then while a prompt of
the whole context is computed beside them. With --context N the model is one with random weights, SmolLM2-135M's shape
and a context of N tokens. The chunk time is the time between two reports of the long prompt's progress.

The line to hold: the 99th percentile of the time between tokens is at most twice the median chunk time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from foveate.server.packaged import resolve

ANSWER_TOKENS = 64
SETTLE_SECONDS = 2.0  # for which chats run before they are measured
ALONE_SECONDS = 10.0


@dataclass
class Waits:
    """Seconds between two tokens of a chat, and to its first one: of waits that begin at ``since`` or later."""

    between: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    since: float = float("inf")


@contextmanager
def model_of(given: argparse.Namespace) -> Iterator[str]:
    """The model's directory; with ``--context`` one of random weights is made."""
    path = resolve(given.model)
    if not given.context:
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as made:
        config = AutoConfig.from_pretrained(path)
        config.max_position_embeddings = given.context
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(made)
        AutoTokenizer.from_pretrained(path).save_pretrained(made)
        yield made


@contextmanager
def serving(model: str, options: list[str]) -> Iterator[str]:
    """URL of a server."""
    command = [sys.executable, "-m", "foveate.server", "serve", model, "--port", "0", "--served-model-name", "m"]
    with subprocess.Popen(
        [*command, "--log-level", "error", *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield next(line.split("ready on ")[1].strip() for line in process.stdout if "ready on " in line)
        finally:
            process.terminate()


async def events(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/completions", json={"model": "m", "stream": True, **body}) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                yield event


async def chat(client: httpx.AsyncClient, seed: int, waits: Waits, stop: asyncio.Event) -> None:
    """Short chats, one after the other, until ``stop``."""
    rng = random.Random(seed)
    while not stop.is_set():
        prompt = " ".join(rng.choices(("the", "sky", "is", "blue", "and", "rain", "falls", "over", "hills"), k=30))
        last = time.perf_counter()
        is_first = True
        # With log-probabilities each token is an event of its own, also one without text of its own.
        body = {"prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "logprobs": 0}
        async for event in events(client, body):
            now = time.perf_counter()
            if event["choices"] and not stop.is_set():
                if last >= waits.since:
                    (waits.first if is_first else waits.between).append(now - last)
                is_first, last = False, now


async def measure(url: str, given: argparse.Namespace) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        context = (await client.get("/v1/models")).json()["data"][0]["max_model_len"]
        rng = random.Random(1)
        prompt = [rng.randrange(1000, 30_000) for _ in range(context - 8)]
        alone, beside, chunks = Waits(), Waits(), []

        async def phase(waits: Waits, work: Any) -> float:
            """Seconds that the work took, during which alone waits are counted."""
            stop = asyncio.Event()
            chats = [asyncio.create_task(chat(client, index, waits, stop)) for index in range(given.chats)]
            await asyncio.sleep(SETTLE_SECONDS)
            waits.since = time.perf_counter()
            await work
            took = time.perf_counter() - waits.since
            stop.set()
            await asyncio.gather(*chats)
            return took

        await phase(alone, asyncio.sleep(ALONE_SECONDS))

        async def long() -> None:
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "return_progress": True}
            if given.attention:
                body["attention"] = (
                    json.loads(given.attention) if "{" in given.attention else {"scheme": given.attention}
                )
            last, done = None, 0
            with tqdm(total=len(prompt), unit=" tokens", file=sys.stderr) as bar:
                async for event in events(client, body):
                    now = time.perf_counter()
                    if progress := event.get("prompt_progress"):
                        if last is not None:
                            chunks.append((progress["processed"] - done, now - last))
                        bar.update(progress["processed"] - done)
                        last, done = now, progress["processed"]

        return {
            "context": context,
            "long_seconds": await phase(beside, long()),
            "alone": vars(alone),
            "beside": vars(beside),
            "chunks": chunks,
        }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--chats", type=int, default=2, help="short chats at once (default: 2)")
    parser.add_argument("--context", type=int, default=0, help="random weights with a context of so many tokens")
    parser.add_argument("--step-seconds", default="0.25")
    parser.add_argument("--attention", help="scheme of the long prompt, or its JSON")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    options = ["--step-seconds", given.step_seconds, "--request-timeout", "36000"]
    load = os.getloadavg()[0]
    with model_of(given) as model, serving(model, options) as url:
        report = asyncio.run(measure(url, given))
    if given.output:
        given.output.write_text(json.dumps(report), encoding="utf-8")

    times = [seconds for _, seconds in report["chunks"]]
    counts = [count for count, _ in report["chunks"]]
    chunk = statistics.median(times)
    print(f"{report['context']} tokens of context, {given.chats} chats, load average before {load:.1f}")
    print(f"long prompt: {report['long_seconds']:.1f} s in {len(times)} chunks of {counts[0]} to {counts[-1]} tokens")
    print(f"{'':<26}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}   (ms)")
    rows = (
        ("between tokens, alone", report["alone"]["between"]),
        ("between tokens, beside", report["beside"]["between"]),
        ("first token, alone", report["alone"]["first"]),
        ("first token, beside", report["beside"]["first"]),
        ("chunk of the long prompt", times),
    )
    for name, values in rows:
        shown = "".join(f"{1000 * percentile(values, share):8.0f}" for share in (0.5, 0.9, 0.99, 1))
        print(f"{name:<26}{shown}   {len(values)} of them")
    ratio = percentile(report["beside"]["between"], 0.99) / chunk
    print(f"p99 between tokens / median chunk: {ratio:.2f} (to be at most 2)")
    return int(ratio > 2)


if __name__ == "__main__":
    sys.exit(main())
