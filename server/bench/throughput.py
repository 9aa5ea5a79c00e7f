"""``foveate bench throughput``: tokens per second of a batch whose prompts are all there from the start."""

from __future__ import annotations

import itertools
import logging
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from foveate.sparse_attn.errors import SchemeError

from ..evaluation.policies import Policy, Refused
from ..exceptions import EngineError
from ..llm import LLM
from ..machine import load_average
from ..request import SamplingParams
from ..settings import Settings
from .report import Report, engine_facts, model_facts, table
from .setup import ERRORS, Bench, prepared, random_prompt, reasons

log = logging.getLogger(__name__)


def run(given: Namespace, settings: Settings) -> int:
    """Measures and reports.

    Returns:
        Exit code: 1 if nothing could be measured, or not written.
    """
    try:
        # No more contexts than requests, or the pool's statistics would take memory that nobody uses.
        running = min(given.requests, settings.max_running)
        with prepared(given, settings, running, given.new_tokens) as bench:
            report = Report("throughput", given, bench.loaded.device)
            runs, failed = measure(given, bench)
    except ERRORS as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    cells = [cell(policy, runs[policy.label]) for policy in bench.policies if runs[policy.label]]
    body = {
        "model": model_facts(bench.loaded, bench.options),
        "engine": engine_facts(bench.options),
        "synthetic_profiles": bench.synthetic_profiles,
        "cells": cells,
        "unavailable": reasons([*bench.refused, *failed]),
    }
    written = report.finish(body, _told(body, given), _draw)
    return 0 if written and cells else 1


def measure(given: Namespace, bench: Bench) -> tuple[dict[str, list[dict[str, Any]]], list[Refused]]:
    """Each policy's runs by its label, taking turns; and the policies that failed."""
    lengths = list(itertools.islice(itertools.cycle(given.lengths), given.requests))
    vocab = bench.loaded.vocab_size
    prompts = [random_prompt(given.seed, number, vocab, length) for number, length in enumerate(lengths)]
    llm = LLM.over(bench.engine)
    runs: dict[str, list[dict[str, Any]]] = {policy.label: [] for policy in bench.policies}
    failed: dict[str, Refused] = {}
    total = given.repeats * len(bench.policies) * given.requests * given.new_tokens
    with tqdm(total=total, desc="throughput", unit=" tokens", file=sys.stderr) as bar:
        for turn in range(given.repeats):
            for policy in bench.policies:
                if policy.label in failed:
                    continue
                bar.set_postfix_str(policy.label)
                try:
                    if not turn:
                        _generate(llm, [prompts[0]], min(2, given.new_tokens), policy, None)  # warms up
                    runs[policy.label].append(_generate(llm, prompts, given.new_tokens, policy, bar))
                except (EngineError, SchemeError) as error:
                    cause = error.__cause__ or error
                    log.debug("%s failed", policy.label, exc_info=error)
                    failed[policy.label] = Refused(policy.attention, f"{type(cause).__name__}: {cause}")
    return runs, list(failed.values())


def _generate(llm: LLM, prompts: Sequence[list[int]], new_tokens: int, policy: Policy, bar: Any) -> dict[str, Any]:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    load, before = load_average(), llm.engine.snapshot()
    start = time.perf_counter()
    done = llm.generate(list(prompts), params, dict(policy.attention))
    seconds = time.perf_counter() - start
    if bar is not None:
        bar.update(sum(one.usage.completion_tokens for one in done))
    after = llm.engine.snapshot()
    return {
        "seconds": seconds,
        "prompt_tokens": sum(one.usage.prompt_tokens for one in done),
        "completion_tokens": sum(one.usage.completion_tokens for one in done),
        "keys_read_fraction": statistics.mean(one.usage.keys_read_fraction for one in done),
        "steps": after.steps - before.steps,
        "preemptions": after.preemptions - before.preemptions,
        "load": [load, load_average()],
    }


def cell(policy: Policy, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over a policy's runs."""
    tokens = runs[0]["prompt_tokens"] + runs[0]["completion_tokens"]
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "label": policy.label,
        "attention": dict(policy.attention),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "completion_tokens_per_second": runs[0]["completion_tokens"] / seconds,
        "keys_read_fraction": runs[0]["keys_read_fraction"],
        "runs": [dict(run) for run in runs],
    }


def _draw(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    from .plots import draw_throughput

    return draw_throughput(directory, report)


def _told(body: Mapping[str, Any], given: Namespace) -> str:
    model = body["model"]
    lengths = " and ".join(f"{length:,}" for length in given.lengths)
    rows = [["scheme", "seconds", "tokens/s", "generated tokens/s", "keys read, %", "preemptions"]]
    for one in body["cells"]:
        rows.append(
            [
                one["label"],
                f"{one['seconds']:.2f}",
                f"{one['tokens_per_second']:.1f}",
                f"{one['completion_tokens_per_second']:.1f}",
                f"{100 * one['keys_read_fraction']:.0f}",
                str(max(run["preemptions"] for run in one["runs"])),
            ]
        )
    notes = [f"not run: {item['attention']['scheme']}: {item['reason']}" for item in body["unavailable"]]
    if body["synthetic_profiles"]:
        notes.append(f"synthetic profiles, made from random tokens: {', '.join(body['synthetic_profiles'])}")
    head = (
        f"{model['name']}, {model['dtype']}, weights {model['quantization']}; {given.requests} prompts of {lengths} "
        f"tokens, {given.new_tokens} new tokens each"
    )
    return "\n\n".join([head, table(rows), "\n".join(notes)]).strip()
