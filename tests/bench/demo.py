"""``make demo``: a real model answers a question about a real long document, over HTTP.

Starts the server on a free loopback port and asks it through the OpenAI client with dense and with sparse
attention; starts it again as it is fastest on a CPU, with weights of 4 bits and keys and values of 8; and asks stock
transformers the same in the first server's element type. Prints answers and figures.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI
from tqdm import tqdm

MODEL = "smollm2-135m"
DOCUMENT = Path(__file__).parent / "data" / "gpl-3.0.txt"
# A model of 135M parameters finds a fact when the prompt ends where the fact would go on; asked as a question in a
# chat, it often does not. The sentence stands in the middle of the document: sinks and a window alone do not find it.
QUESTION = '\n\nReminder. An "entity transaction" is a transaction transferring'
ANSWER = "control of an organization"
NEW_TOKENS = 24
TILE, QUERIES = 64, 8
SPARSE = {"scheme": "kascade", "tile_tokens": TILE, "scored_queries": QUERIES}
FAST = ("--quantization", "int4", "--kv-dtype", "int8")


@dataclass(frozen=True, slots=True)
class Run:
    """One answer and what it took."""

    name: str
    answer: str
    first_token_seconds: float
    tokens_per_second: float
    prompt_tokens: int
    pages: int | None = None
    keys_read_fraction: float | None = None


def main() -> int:
    prompt = DOCUMENT.read_text(encoding="utf-8") + QUESTION
    print(f"Document: {DOCUMENT.name}, {len(prompt):,} characters. Question: ...{QUESTION.strip()} ___\n")
    runs: list[Run] = []
    with serving() as client:
        dtype = client.models.list().data[0].model_dump()["dtype"]
        runs.append(ask(client, f"foveate, dense ({dtype})", prompt, {"scheme": "dense"}))
        runs.append(ask(client, f"foveate, {SPARSE['scheme']} ({dtype})", prompt, SPARSE))
    print(f"server stopped; once more with {' '.join(FAST)}")
    with serving(*FAST) as client:
        runs.append(ask(client, f"foveate, {SPARSE['scheme']} (int4)", prompt, SPARSE))
    print("server stopped")
    runs.append(stock(prompt, dtype))
    report(runs)
    return 0 if all(ANSWER in " ".join(run.answer.split()) for run in runs) else 1


@contextlib.contextmanager
def serving(*options: str) -> Iterator[OpenAI]:
    """Runs ``foveate serve`` on a free port until the block ends; gives a client of it, which has asked once."""
    command = [sys.executable, "-m", "foveate.server", "serve", MODEL, "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            print(line, end="", flush=True)
            if "ready on " in line:
                url = line.split("ready on ")[1].strip()
                client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1800, max_retries=0)
                client.completions.create(model=MODEL, prompt="Warm up.", max_tokens=4)
                yield client
                return
        raise SystemExit(f"the server did not start (exit status {server.wait()})")
    finally:
        server.terminate()
        server.wait(60)


def ask(client: OpenAI, name: str, prompt: str, attention: dict[str, object]) -> Run:
    """One streamed completion, with a progress bar while the prompt is computed."""
    bar = tqdm(desc=name, unit=" tokens", leave=False)
    start = time.perf_counter()
    first = last = start
    pieces: list[str] = []
    usage = None
    extra = {"attention": attention, "return_progress": True}
    stream = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    for chunk in stream:
        progress = (chunk.model_extra or {}).get("prompt_progress")
        if progress:
            bar.total, bar.n = progress["total"], progress["processed"]
            bar.refresh()
        if chunk.choices:
            last = time.perf_counter()
            first = first if pieces else last
            pieces.append(chunk.choices[0].text)
        usage = chunk.usage or usage
    bar.close()
    if usage is None:
        raise SystemExit("the server sent no usage")
    reading = (usage.model_extra or {})["attention"]
    rate = (usage.completion_tokens - 1) / (last - first)
    return Run(
        name,
        "".join(pieces),
        first - start,
        rate,
        usage.prompt_tokens,
        reading["pages"],
        reading["keys_read_fraction"],
    )


def stock(prompt: str, dtype: str) -> Run:
    """The same prompt through ``transformers`` alone (sdpa attention), in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    from foveate.server.packaged import resolve

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    print(f"transformers, sdpa ({dtype}) is reading the same document ...", flush=True)
    path = resolve(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    clock = Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            streamer=clock,
        )
    _, first, *rest = clock.times  # the first call hands back the prompt
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return Run(
        f"transformers, sdpa ({dtype})", answer, first - start, len(rest) / (rest[-1] - first), int(ids.shape[1])
    )


def report(runs: list[Run]) -> None:
    print(f"\nPrompt: {runs[0].prompt_tokens:,} tokens\n")
    head = f"{'':32} {'first token':>12} {'decode':>14} {'pages':>7} {'keys read':>10}"
    print(head)
    print("-" * len(head))
    for run in runs:
        pages = "-" if run.pages is None else str(run.pages)
        keys = "-" if run.keys_read_fraction is None else f"{run.keys_read_fraction:.1%}"
        print(
            f"{run.name:32} {run.first_token_seconds:10.2f} s {run.tokens_per_second:8.1f} tok/s {pages:>7} {keys:>10}"
        )
    print(
        f"\nkascade: {QUERIES} of the {TILE} queries of a tile choose its keys (all 32 of 32 without these options)\n"
    )
    for run in runs:
        right = "right" if ANSWER in " ".join(run.answer.split()) else f"WRONG, expected {ANSWER!r}"
        print(f"{run.name} ({right}):\n    {' '.join(run.answer.split())}\n")


if __name__ == "__main__":
    sys.exit(main())
