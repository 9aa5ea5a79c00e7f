"""Thousands of mixed requests against a real server process, a third of them cut off: does anything leak?

    python tests/bench/soak.py [--requests 10000] [--clients 48] [--rounds 20] [--seed 0] [-o REPORT.json]

Starts `foveate serve` on a random llama of two layers, in a process of its own. The requests are completions and
chats, streamed and not, of all schemes that need no profile, with n, stop strings, shared beginnings, priorities,
time limits, penalties; some are wrong, and a third hang up at a random moment: at once, while they wait, while their
prompt is computed, within their answer. After each round the server must be idle: no page in use, nothing waiting.

The verdict, and exit status 0, takes all of:
  - every request that was not cut off ended as it should;
  - no page in use whenever the server is idle, and no page missing;
  - resident memory after the last round within 5 % of what it was after the warm-up (the first fifth);
  - as many threads and open files at the end as after the warm-up, give or take 2;
  - /health green to the end, and exit status 0 after SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 2048
GROWTH = 0.05
SLACK = 2  # threads and open files
TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}{% endfor %}"
SCHEMES: list[Any] = [
    None, None,
    {"scheme": "streaming", "budget_tokens": 64, "sink_tokens": 4},
    {"scheme": "moba", "block_tokens": 32, "top_k": 2},
    {"scheme": "dhsa", "budget_tokens": 64, "dense_tail_tokens": 8},
    {"scheme": "quest", "budget_tokens": 64},
    {"scheme": "xattention"},
    {"scheme": "dhsa_block"},
]  # fmt: skip


def make_model(path: str) -> None:
    """A random llama with one token per byte, and a chat template."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT, eos_token_id=256, bos_token_id=None,
        pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|end|>", "<s>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)
    fast.save_pretrained(path)


@contextmanager
def serving(options: list[str], threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of a server on the random model; it is killed at the end if it still runs."""
    with tempfile.TemporaryDirectory() as path:
        make_model(path)
        command = [sys.executable, "-m", "foveate.server", "serve", path, "--port", "0", "--served-model-name", "tiny"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log = Path(path) / "log"
        with (
            log.open("w", encoding="utf-8") as errors,
            subprocess.Popen(
                [*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            ) as process,
        ):
            assert process.stdout is not None
            try:
                yield (
                    next(line.split("ready on ")[1].strip() for line in process.stdout if "ready on " in line),
                    process,
                )
            finally:
                process.kill()
        said = log.read_text(encoding="utf-8")
        first = min((at for at in (said.find("ERROR"), said.find("Traceback")) if at >= 0), default=len(said))
        print(said[first:][:6000], end="", file=sys.stderr)  # what went wrong first says the most


class Caller:
    """Makes requests from a seed, and says how each ended."""

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._seed = seed
        rng = random.Random(seed)
        self._documents = ["".join(rng.choices("abcdefghij ", k=600)) for _ in range(5)]

    async def call(self, number: int) -> str:
        """``done``, ``cut off``, ``refused`` or ``timed out`` as it should be, or what is wrong."""
        rng = random.Random(f"{self._seed}/{number}")
        path, body, expected = self._request(rng)
        leave = number % 3 == 0
        try:
            if not leave:
                return await self._whole(path, body, expected)
            if body["stream"] and rng.random() < 0.5:
                return await self._leave_within(path, body, rng.randrange(1, 12))
            try:
                async with asyncio.timeout(rng.choice((0.0, 0.002, 0.02, 0.1, 0.3))):
                    await self._whole(path, body, expected)
            except TimeoutError:
                return "cut off"
        except httpx.HTTPError as error:
            return f"broken connection: {type(error).__name__}"
        return "cut off"

    async def _whole(self, path: str, body: dict[str, Any], expected: str) -> str:
        while True:
            if body["stream"]:
                async with self._client.stream("POST", path, json=body) as response:
                    text = "".join([part async for part in response.aiter_text()])
            else:
                response = await self._client.post(path, json=body)
                text = response.text
            if response.status_code != 429:
                break
            await asyncio.sleep(min(float(response.headers["retry-after"]), 0.5))
        return _verdict(response.status_code, text, body, expected)

    async def _leave_within(self, path: str, body: dict[str, Any], events: int) -> str:
        async with self._client.stream("POST", path, json=body) as response:
            async for _ in response.aiter_lines():
                events -= 1
                if not events:
                    break
        return "cut off"

    def _request(self, rng: random.Random) -> tuple[str, dict[str, Any], str]:
        texts = [self._text(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        body: dict[str, Any] = {"model": "tiny", "stream": rng.random() < 0.6, "max_tokens": rng.randrange(1, 40)}
        chat = rng.random() < 0.3
        if chat:
            body["messages"] = [{"role": "user", "content": texts[0]}]
        else:
            body["prompt"] = texts if len(texts) > 1 else texts[0] if rng.random() < 0.8 else list(texts[0].encode())
        options: list[dict[str, Any]] = [
            {"n": rng.randrange(1, 5)},
            {"stop": rng.sample(["e", "th", "\n", "ab", "é"], 2)},
            {"seed": rng.randrange(1000), "temperature": 0.7, "top_p": 0.9},
            {"temperature": 0, "logit_bias": {"65": 5, "66": -100}},
            {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
            {"ignore_eos": True, "min_tokens": 3, "max_tokens": 30},
            {"top_k": 5, "min_p": 0.05},
            {"priority": rng.randrange(-2, 3)},
            {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2},
            {"cache_salt": rng.choice("ab")},
        ]
        for option in rng.sample(options, rng.randrange(0, 5)):
            body |= option
        if body["stream"] and rng.random() < 0.5:
            body |= {"return_progress": True, "stream_options": {"include_usage": True}}
        if (scheme := rng.choice(SCHEMES)) is not None:
            body["attention"] = scheme
        expected = "done"
        if rng.random() < 0.05:
            expected = "refused"
            body |= rng.choice(
                [
                    {"temperature": 9}, {"attention": {"scheme": "none"}}, {"max_tokens": 10 * CONTEXT},
                    {"logit_bias": {"99999": 1}}, {"priority": 2**40}, {"timeout": -1},
                ]
            )  # fmt: skip
        elif rng.random() < 0.03:
            expected = "timed out"
            body |= {"timeout": 0.001, "max_tokens": 300, "ignore_eos": True}
        return "/v1/chat/completions" if chat else "/v1/completions", body, expected

    def _text(self, rng: random.Random) -> str:
        own = "".join(rng.choices("klmnopqrst ", k=rng.choice((3, 20, 100, 300))))
        if rng.random() < 0.4:
            return rng.choice(self._documents)[: rng.randrange(16, 600)] + own
        return own


def _verdict(status: int, text: str, body: dict[str, Any], expected: str) -> str:
    wrong = f"{expected} was expected, got {status}: {text[-300:]}"
    if status != 200:
        right = {"refused": (400,), "timed out": (408,), "done": ()}[expected]
        return expected if status in right else wrong
    if not body["stream"]:
        choices = json.loads(text)["choices"]
        ended = [choice["finish_reason"] for choice in choices]
    else:
        blocks = [block for block in text.split("\n\n") if block.startswith("data: ")]
        if not text.endswith("data: [DONE]\n\n"):
            return f"a stream without its end: {text[-300:]}"
        events = [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
        if any("error" in event for event in events):
            return expected if expected == "timed out" and "request_timeout" in text else wrong
        ended = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) and isinstance(body["prompt"][0], str) else 1
    # A machine that is fast enough answers in time.
    complete = len(ended) == prompts * body.get("n", 1) and set(ended) <= {"stop", "length"}
    return "done" if complete and expected != "refused" else wrong


def process_state(pid: int) -> dict[str, int]:
    """Resident memory in KiB, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "rss_kib": int(lines["VmRSS"].split()[0]),
        "threads": int(lines["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def gauge(text: str, name: str) -> float:
    match = re.search(rf"^foveate_{name} (\S+)$", text, re.MULTILINE)
    if match is None:
        raise KeyError(name)
    return float(match[1])


async def idle(client: httpx.AsyncClient, seconds: float = 30) -> dict[str, float]:
    """The gauges of the engine once it is idle, or as they are after ``seconds``."""
    deadline = time.monotonic() + seconds
    names = ("requests_running", "requests_waiting", "kv_pages_used")
    while True:
        text = (await client.get("/metrics")).text
        found = {name: gauge(text, name) for name in names}
        found["pages_missing"] = gauge(text, "kv_pages_total") - sum(
            gauge(text, f"kv_pages_{kind}") for kind in ("free", "cached", "used")
        )
        found |= {name: gauge(text, f"{name}_total") for name in ("preempted", "aborted", "generated_tokens", "steps")}
        if not any(found[name] for name in names) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.05)


async def soak(url: str, pid: int, given: argparse.Namespace) -> dict[str, Any]:
    """Runs all requests; what was seen after each round, how requests ended, and what was wrong."""
    ends: Counter[str] = Counter()
    wrong: list[str] = []
    rounds: list[dict[str, float]] = []
    size = -(-given.requests // given.rounds)
    limits = httpx.Limits(max_connections=given.clients * 2, max_keepalive_connections=given.clients)
    gate = asyncio.Semaphore(given.clients)
    with tqdm(total=given.requests, unit=" requests", file=sys.stderr, disable=given.quiet) as bar:

        async def one(caller: Caller, number: int) -> None:
            async with gate:
                end = await caller.call(number)
            known = end in ("done", "cut off", "refused", "timed out")
            ends[end if known else "wrong"] += 1
            if not known and len(wrong) < 20:
                wrong.append(f"request {number}: {end}")
            bar.update()

        for first in range(0, given.requests, size):
            numbers = range(first, min(first + size, given.requests))
            async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:
                caller = Caller(client, given.seed)
                await asyncio.gather(*(one(caller, number) for number in numbers))
            # Connections are open files of the server: only those of this client count.
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                seen = await idle(client)
                health = (await client.get("/health")).status_code
                await asyncio.sleep(0.3)
                rounds.append({**seen, **process_state(pid)})
            bar.set_postfix(rss_mib=rounds[-1]["rss_kib"] // 1024, pages=int(seen["kv_pages_used"]))
    return {"ends": ends, "wrong": wrong, "rounds": rounds, "health": health}


def judge(report: dict[str, Any], status: int) -> list[str]:
    """What is wrong, in words."""
    complaints = list(report["wrong"])
    rounds = report["rounds"]
    for number, seen in enumerate(rounds, 1):
        for name in ("requests_running", "requests_waiting", "kv_pages_used", "pages_missing"):
            if seen[name]:
                complaints.append(f"after round {number}: {name} is {seen[name]:g}")
    warm, last = rounds[max(len(rounds) // 5 - 1, 0)], rounds[-1]
    report["growth"] = last["rss_kib"] / warm["rss_kib"] - 1
    if abs(report["growth"]) > GROWTH:
        complaints.append(f"resident memory went from {warm['rss_kib']} to {last['rss_kib']} KiB")
    for name in ("threads", "files"):
        if abs(last[name] - warm[name]) > SLACK:
            complaints.append(f"{name} went from {warm[name]} to {last[name]}")
    if report["health"] != 200:
        complaints.append(f"/health says {report['health']}")
    if status != 0:
        complaints.append(f"the server ended with {status}")
    return complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=48, help="requests in flight (default: 48)")
    parser.add_argument("--rounds", type=int, default=20, help="times that the server is let become idle (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the server (default: 1)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("-o", "--output", type=Path, help="where to write the report as JSON")
    given = parser.parse_args()

    # Few pages and few seats, so that requests queue, pass each other and are preempted.
    options = ["--page-size", "16", "--kv-cache-gib", "0.002", "--max-batch-tokens", "128", "--max-running", "24"]
    # A request of a large priority waits while others come; on a slow machine that is long.
    options += ["--max-queued-requests", "64", "--request-timeout", "3600", "--log-level", "error"]
    began = time.monotonic()
    with serving(options, given.threads) as (url, process):
        report = asyncio.run(soak(url, process.pid, given))
        process.terminate()
        status = process.wait(60)
    complaints = judge(report, status)
    report |= {"seconds": round(time.monotonic() - began, 1), "complaints": complaints, "seed": given.seed}
    if given.output:
        given.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
    first, last = report["rounds"][0], report["rounds"][-1]
    ends = ", ".join(f"{count} {end}" for end, count in report["ends"].items())
    print(f"{given.requests} requests in {report['seconds']:.0f} s: {ends}")
    print(
        f"steps {last['steps']:g}, tokens {last['generated_tokens']:g}, aborted {last['aborted']:g}, "
        f"preempted {last['preempted']:g}"
    )
    print(
        f"resident memory {first['rss_kib'] / 1024:.1f} MiB after round 1, {last['rss_kib'] / 1024:.1f} at the end; "
        f"since the warm-up {report['growth']:+.2%}; threads {last['threads']:g}, open files {last['files']:g}"
    )
    for complaint in complaints:
        print(f"WRONG: {complaint}")
    print("PASSED" if not complaints else "FAILED")
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
