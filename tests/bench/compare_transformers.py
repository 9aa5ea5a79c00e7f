"""Dense prefill and decode of long prompts: ours against stock transformers, in one run.

    python tests/bench/compare_transformers.py [--lengths 2000,8000] [--repeats 3] [--dtypes bfloat16,float32]

Both sides get the same random token ids and generate the same number of tokens. The sides take turns, each figure is
the median of its repeats, and the load average is printed: the machine may be shared. One JSON line per length and
element type of the stock side, then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from foveate.server.bench.timing import time_request
from foveate.server.engine import Engine
from foveate.server.options import EngineOptions
from foveate.server.packaged import resolve


class Timing(NamedTuple):
    """Seconds to the first token, and per token after it."""

    prefill: float
    token: float


class Clock(BaseStreamer):
    """Notes when ``generate`` hands over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ours(engine: Engine, ids: list[int], new: int, attention: dict[str, Any]) -> Timing:
    engine.cache.reset_prefix()
    timing = time_request(engine, ids, new, engine.build_scheme(attention))
    return Timing(timing.first_seconds, statistics.mean(timing.gaps_seconds))


def stock(model: Any, ids: list[int], new: int) -> Timing:
    row = torch.tensor([ids])
    clock = Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            streamer=clock,
        )
    _, first, *rest = clock.times
    return Timing(first - start, (rest[-1] - first) / (new - 1))


def median(timings: list[Timing]) -> Timing:
    return Timing(*(statistics.median(column) for column in zip(*timings, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="packaged name, directory or hub id")
    parser.add_argument("--lengths", default="2000,8000", help="prompt lengths in tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", default="bfloat16,float32", help="element types of the stock side")
    parser.add_argument("--attention", type=json.loads, default={"scheme": "dense"}, help="our policy, as JSON")
    args = parser.parse_args()
    path = resolve(args.model)
    engine = Engine.load(EngineOptions(args.model))
    dtype = str(engine.dtype).removeprefix("torch.")
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, name), attn_implementation="sdpa").eval()
        for name in args.dtypes.split(",")
    }
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in map(int, args.lengths.split(",")):
        ids = torch.randint(10, engine.vocab_size, (length,), generator=generator).tolist()
        mine: list[Timing] = []
        theirs: dict[str, list[Timing]] = {name: [] for name in models}
        ours(engine, ids[:300], 4, args.attention)
        for _ in range(args.repeats):
            mine.append(ours(engine, ids, args.new_tokens, args.attention))
            for name, model in models.items():
                theirs[name].append(stock(model, ids, args.new_tokens))
        us = median(mine)
        for name, timings in theirs.items():
            them = median(timings)
            row = {
                "prompt_tokens": length,
                "attention": args.attention,
                "foveate_dtype": dtype,
                "transformers_dtype": name,
                "foveate_prefill_s": round(us.prefill, 2),
                "transformers_prefill_s": round(them.prefill, 2),
                "prefill_ratio": round(them.prefill / us.prefill, 2),
                "foveate_decode_ms": round(us.token * 1e3, 1),
                "transformers_decode_ms": round(them.token * 1e3, 1),
                "decode_ratio": round(them.token / us.token, 2),
                "repeats": args.repeats,
                "threads": torch.get_num_threads(),
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "load1": round(os.getloadavg()[0], 2),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    engine.shutdown(0)
    print("\n| prompt | ours | transformers | prefill | decode |\n| ---: | --- | --- | ---: | ---: |")
    for row in rows:
        print(
            f"| {row['prompt_tokens']:,} | {dtype} | {row['transformers_dtype']} | {row['prefill_ratio']} x sooner "
            f"| {row['decode_ratio']} x faster |"
        )


if __name__ == "__main__":
    main()
