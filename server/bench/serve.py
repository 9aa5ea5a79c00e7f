"""``foveate bench serve``: an open load on a running server, at each rate and for each policy in turns."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from foveate.sparse_attn.errors import SchemeError

from ..evaluation.policies import label
from ..machine import load_average
from .arrivals import Answer, poisson, summarize
from .report import Report, table
from .setup import random_prompt, wanted

if TYPE_CHECKING:
    from .client import Client

# What stands for the server's own default policy.
DEFAULT = "server's default"


@dataclass(slots=True)
class Load:
    """One policy at one rate, and what came of it in each round."""

    label: str
    attention: Mapping[str, Any] | None
    rate: float
    runs: list[dict[str, Any]] = field(default_factory=list)


def run(given: Namespace) -> int:
    """Measures and reports.

    Returns:
        Exit code: 1 if nothing could be measured, or not written.
    """
    try:
        from .client import Client, ServerError
    except ImportError:
        print("foveate: httpx is missing. Get it with `pip install 'foveate[bench]'`.", file=sys.stderr)
        return 1

    # In every prompt's name: a server that was measured before would answer the same prompts from its prefix cache.
    nonce = secrets.token_hex(8)

    async def measure() -> tuple[dict[str, Any], list[Load], list[dict[str, Any]]]:
        client = Client(given.url, given.api_key, given.timeout)
        try:
            return await _measure(given, client, nonce)
        finally:
            await client.close()

    try:
        report = Report("serve", given, torch.device("cpu"))
        server, loads, refused = asyncio.run(measure())
    except (ServerError, SchemeError, OSError, ValueError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    body = {
        "server": server,
        "nonce": nonce,
        "machine_is": "the client's",
        "cells": [cell(load) for load in loads],
        "unavailable": refused,
    }
    written = report.finish(body, _told(body, given), _draw if loads else None)
    return 0 if written and loads else 1


async def _measure(
    given: Namespace, client: Client, nonce: str
) -> tuple[dict[str, Any], list[Load], list[dict[str, Any]]]:
    served = await client.model(given.model)
    policies: list[Mapping[str, Any] | None] = [*wanted(given)] or [None]
    allowed, refused = [], []
    for attention in policies:
        for number in range(given.warmup):
            body = _body(given, served["id"], attention, (nonce, "warm", number), given.lengths[0])
            reason = await client.refusal({**body, "max_tokens": 2})
            if reason is not None:
                refused.append({"attention": dict(attention or {}), "reason": reason})
                break
        else:
            allowed.append(attention)
    loads = [
        Load(label(attention) if attention else DEFAULT, attention, rate)
        for rate in given.rate
        for attention in allowed
    ]
    total = given.repeats * len(loads) * given.requests
    with tqdm(total=total, desc="serve", unit=" requests", file=sys.stderr) as bar:
        for turn in range(given.repeats):
            for load in loads:
                bar.set_postfix_str(f"{load.rate:g}/s {load.label}")
                busy = load_average()
                answers = await _offer(given, client, served["id"], load, (nonce, turn), bar.update)
                found = summarize(answers, given.slo_ttft, given.slo_tpot)
                load.runs.append({**found, "load": [busy, load_average()]})
    kept = {name: served.get(name) for name in ("id", "max_model_len", "dtype")}
    return {"url": given.url, **kept}, loads, refused


async def _offer(
    given: Namespace, client: Client, model: str, load: Load, name: tuple[str, int], on_end: Callable[[], Any]
) -> list[Answer]:
    """Sends every request at its moment, whatever became of those before; ``name`` is the nonce and the round."""
    # The same moments for all policies of a round; another prompt for every request, so that nothing is cached.
    moments = poisson(load.rate, given.requests, f"{given.seed} {name[1]}")
    lengths = itertools.cycle(given.lengths)
    bodies = [
        _body(given, model, load.attention, (*name, load.rate, load.label, number), length)
        for number, length in zip(range(given.requests), lengths, strict=False)
    ]
    start = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - start

    async def one(due: float, body: Mapping[str, Any]) -> Answer:
        await asyncio.sleep(max(due - clock(), 0))
        answer = await client.complete(body, due, clock)
        on_end()
        return answer

    return await asyncio.gather(*(one(due, body) for due, body in zip(moments, bodies, strict=True)))


def _body(
    given: Namespace, model: str, attention: Mapping[str, Any] | None, name: object, length: int
) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": random_prompt(given.seed, name, given.vocab, length),
        "max_tokens": given.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **({"attention": dict(attention)} if attention else {}),
    }


def cell(load: Load) -> dict[str, Any]:
    """Medians over the rounds; errors are added up."""
    runs = load.runs
    medians: dict[str, Any] = {}
    for name, value in runs[0].items():
        if isinstance(value, (int, float)):
            medians[name] = statistics.median(run[name] for run in runs)
        elif name.endswith("_seconds"):
            some = [run[name] for run in runs if run[name]]
            medians[name] = {mark: statistics.median(one[mark] for one in some) for mark in some[0]} if some else None
    errors: dict[str, int] = {}
    for one in runs:
        for error, count in one["errors"].items():
            errors[error] = errors.get(error, 0) + count
    attention = None if load.attention is None else dict(load.attention)
    return {"label": load.label, "attention": attention, "rate": load.rate, **medians, "errors": errors, "runs": runs}


def _draw(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    from .plots import draw_serve

    return draw_serve(directory, report)


def _told(body: Mapping[str, Any], given: Namespace) -> str:
    marks = "p50 / p90 / p99"
    rows = [
        ["policy", "rate/s", "done", f"TTFT s, {marks}", f"ITL ms, {marks}", f"TPOT ms, {marks}", "tokens/s",
         "goodput/s", "good, %"],
    ]  # fmt: skip
    for one in body["cells"]:
        rows.append(
            [
                one["label"],
                f"{one['rate']:g}",
                f"{one['completed']:g} of {one['requests']:g}",
                _marks(one["ttft_seconds"], 1, 2),
                _marks(one["itl_seconds"], 1e3, 0),
                _marks(one["tpot_seconds"], 1e3, 0),
                f"{one['tokens_per_second']:.1f}",
                f"{one['goodput']:.2f}",
                f"{100 * one['good_share']:.0f}",
            ]
        )
    notes = [
        f"{one['label']} at {one['rate']:g}/s: {count} x {error}"
        for one in body["cells"]
        for error, count in one["errors"].items()
    ]
    late = max((one["late_seconds"] for one in body["cells"]), default=0.0)
    if late > 0.1:
        notes.append(f"the client itself was up to {late:.2f} s late in sending: this machine is too busy to measure")
    notes += [f"not run: {label(item['attention']) if item['attention'] else DEFAULT}: {item['reason']}"
              for item in body["unavailable"]]  # fmt: skip
    server = body["server"]
    lengths = ", ".join(f"{length:,}" for length in given.lengths)
    head = (
        f"{server['id']} at {server['url']}; {given.requests} arrivals a rate, prompts of {lengths} tokens, "
        f"{given.new_tokens} new tokens each; good: TTFT within {given.slo_ttft:g} s, TPOT within "
        f"{1e3 * given.slo_tpot:g} ms"
    )
    tables = table(rows) if body["cells"] else ""
    return "\n\n".join(part for part in (head, tables, "\n".join(notes), "the client's machine:") if part)


def _marks(found: Mapping[str, float] | None, factor: float, digits: int) -> str:
    return " / ".join(f"{found[mark] * factor:.{digits}f}" for mark in ("p50", "p90", "p99")) if found else "-"
