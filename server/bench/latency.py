"""``foveate bench latency``: one prompt alone, by length and scheme; a round of everything, then the next."""

from __future__ import annotations

import logging
import random
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from foveate.patches.fingerprint import fingerprint
from foveate.patches.parts import watch_parts
from foveate.sparse_attn.errors import SchemeError

from ..evaluation.policies import Policy, Refused
from ..evaluation.text import Text, read_text
from ..exceptions import EngineError
from ..journal import Journal
from ..machine import describe, load_average
from ..settings import Settings
from .latency_report import summary, told
from .report import Report, engine_facts, model_facts
from .setup import ERRORS, Bench, prepared, random_prompt, reasons
from .timing import Timing, TooLong, time_request

log = logging.getLogger(__name__)

VERSION = 2
FILE = "latency.jsonl"

# The power of the length by which time grows at least. On a CPU 0.92 was the least between two lengths (docs/bench.md);
# on a GPU short prompts wait for launches, whatever their length.
LEAST_GROWTH = {"cpu": 0.9, "cuda": 0.0}

# Tokens of the prompt that warms a policy up, and of its answer.
WARM_PROMPT, WARM_NEW = 600, 2


def run(given: Namespace, settings: Settings) -> int:
    """Measures what is missing in ``given.output``, and reports on all that is there.

    Returns:
        Exit code: 1 if nothing could be measured, or not written.
    """
    try:
        with prepared(given, settings, 1, given.new_tokens) as bench:
            report = Report("latency", given, bench.loaded.device)
            text = None if given.text is None else read_text(given.text, bench.loaded.tokenizer)
            if text is not None:
                text.piece(random.Random(0), max(given.lengths))  # says now, not hours later, if it is too short
            path: Path | None = given.output and given.output / FILE
            journal = Journal(path, _header(given, bench, text), given.fresh)
            latency = Latency(given, bench, journal, text)
            latency.run()
    except ERRORS as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    refused = [*bench.refused, *latency.failed.values()]
    body = {
        "model": model_facts(bench.loaded, bench.options),
        "engine": engine_facts(bench.options),
        "synthetic_profiles": bench.synthetic_profiles,
        **summary(journal.lines),
        "unavailable": reasons(refused),
    }
    written = report.finish(body, told(body), _draw)
    return 0 if written and body["cells"] else 1


def _draw(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    from .plots import draw_latency

    return draw_latency(directory, report)


def _header(given: Namespace, bench: Bench, text: Text | None) -> dict[str, Any]:
    """What two runs must share to be put into one table."""
    machine = describe(bench.loaded.device)
    engine = engine_facts(bench.options)
    return {
        "format": "foveate-bench-latency",
        "version": VERSION,
        "fingerprint": fingerprint(bench.loaded.model),
        **{name: machine[name] for name in ("foveate", "torch", "cpu", "kernels", "threads", "device")},
        "engine": {name: value for name, value in engine.items() if name not in ("profile", "kv_cache_gib")},
        "new_tokens": given.new_tokens,
        "seed": given.seed,
        "text": text and text.digest,
    }


class Latency:
    """Runs over one engine.

    Args:
        given: The command line.
        bench: Engine and policies.
        journal: What is measured already, and what will be.
        text: To cut prompts from; ``None`` draws token ids.

    Attributes:
        failed: By digest, policies that were given up.
    """

    def __init__(self, given: Namespace, bench: Bench, journal: Journal, text: Text | None) -> None:
        self._given, self._bench, self._journal, self._text = given, bench, journal, text
        self.failed: dict[str, Refused] = {}

    def run(self) -> None:
        """Whatever is missing; short prompts first, so that something can be seen soon."""
        missing = [item for item in self._plan() if not self._is_done(*item)]
        total = sum(length for _, length, _, _ in missing)
        with tqdm(total=total, desc="latency", unit=" tokens", file=sys.stderr, disable=not missing) as bar:
            warm: set[tuple[str, int]] = set()
            for kind, length, repeat, policy in missing:
                bar.set_postfix_str(f"{length} {policy.label}" + (" (parts)" if kind == "parts" else ""))
                before = bar.n
                if policy.digest not in self.failed:
                    try:
                        self._measure(kind, length, repeat, policy, bar, warm)
                    except (EngineError, SchemeError) as error:
                        self._fail(policy, error)
                bar.update(before + length - bar.n)  # also what was skipped

    def _plan(self) -> Iterator[tuple[str, int, int, Policy]]:
        rounds = [("run", repeat) for repeat in range(self._given.repeats)]
        rounds += [("parts", 0)] if self._given.parts else []
        for length in sorted(self._given.lengths):
            for kind, repeat in rounds:
                for policy in self._bench.policies:
                    yield kind, length, repeat, policy

    def _is_done(self, kind: str, length: int, repeat: int, policy: Policy) -> bool:
        key = (kind, length, repeat, policy.digest)
        return any(
            key == (line["kind"], line["length"], line["repeat"], line["digest"]) for line in self._journal.lines
        )

    def _measure(
        self, kind: str, length: int, repeat: int, policy: Policy, bar: Any, warm: set[tuple[str, int]]
    ) -> None:
        limit = self._given.max_seconds
        line: dict[str, Any] = {
            "kind": kind,
            "length": length,
            "repeat": repeat,
            "digest": policy.digest,
            "label": policy.label,
            "attention": dict(policy.attention),
        }
        reason = limit and self._too_long(kind, length, policy, limit)
        if reason:
            self._skip(line, limit, reason)
            return
        # On a GPU some kernels are compiled for the length.
        like = length if self._bench.loaded.device.type == "cuda" else min(WARM_PROMPT, length)
        if (policy.digest, like) not in warm:
            warm.add((policy.digest, like))
            new = min(WARM_NEW, self._given.new_tokens)
            try:
                time_request(self._bench.engine, self._prompt(like), new, policy.scheme, limit_seconds=limit)
            except TooLong as error:
                self._skip(line, limit, str(error))
                return
        load = load_average()
        watch = watch_parts(self._bench.loaded.model) if kind == "parts" else nullcontext()
        try:
            with watch as clock:
                timing = time_request(
                    self._bench.engine,
                    self._prompt(length),
                    self._given.new_tokens,
                    policy.scheme,
                    limit_seconds=limit,
                    clock=clock,
                    on_progress=bar.update,
                )
        except TooLong as error:
            self._skip(line, limit, str(error))
            return
        self._journal.add({**line, **_values(timing), "load": [load, load_average()]})

    def _too_long(self, kind: str, length: int, policy: Policy, limit: float) -> str | None:
        """Why a prompt would exceed the limit; ``None`` if it might not."""
        for line in self._journal.lines:
            if line["digest"] != policy.digest or line["length"] > length:
                continue
            if _tells_of(line, kind) and line["limit_seconds"] >= limit:
                return (
                    f"{line['length']} tokens took longer than {limit:g} s"
                    if line["length"] < length
                    else line["reason"]
                )
            if line["kind"] == "run":
                growth = LEAST_GROWTH[self._bench.loaded.device.type]
                least = line["first_seconds"] * (length / line["length"]) ** growth
                if least > limit:
                    return (
                        f"the first token of {line['length']} tokens took {line['first_seconds']:.0f} s, "
                        f"so this one may take {least:.0f} s or more"
                    )
        return None

    def _skip(self, line: Mapping[str, Any], limit: float, reason: str) -> None:
        """Notes it once per length and policy."""
        key = (line["length"], line["digest"], limit)
        for seen in self._journal.lines:
            if _tells_of(seen, line["kind"]) and key == (seen["length"], seen["digest"], seen["limit_seconds"]):
                return
        self._journal.add({**line, "kind": "skipped", "what": line["kind"], "limit_seconds": limit, "reason": reason})

    def _prompt(self, length: int) -> list[int]:
        if self._text is not None:
            return self._text.piece(random.Random(f"{self._given.seed} {length}"), length)
        return random_prompt(self._given.seed, length, self._bench.loaded.vocab_size, length)

    def _fail(self, policy: Policy, error: Exception) -> None:
        """Gives a policy up; the others go on."""
        cause = error.__cause__ or error
        log.debug("%s failed", policy.label, exc_info=error)
        self.failed[policy.digest] = Refused(policy.attention, f"{type(cause).__name__}: {cause}")


def _tells_of(line: Mapping[str, Any], kind: str) -> bool:
    """Whether a line says that ``kind`` takes too long: a watched run is slower, and says nothing of plain ones."""
    return line["kind"] == "skipped" and line["what"] in ("run", kind)


def _values(timing: Timing) -> dict[str, Any]:
    usage = timing.usage
    return {
        "first_seconds": timing.first_seconds,
        "gap_seconds": timing.gap_seconds,
        "gaps_seconds": list(timing.gaps_seconds),
        "total_seconds": timing.first_seconds + sum(timing.gaps_seconds),
        "keys_read_fraction": usage.keys_read_fraction,
        "pages": usage.pages,
        "prefill_parts": dict(timing.prefill_parts),
        "decode_parts": dict(timing.decode_parts),
    }
