"""From trials to what is said of them: a table, a JSON file, and heat maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..writable import part_of
from .policies import Refused, label, labels_of
from .trials import Trial, Trials

VERSION = 2
FILE = "results.json"

_CAPTIONS = {
    "score": "answers found, in %",
    "loss": "perplexity of the text's second half",
    "match": "dense's greedy tokens that are best here too, in %; KL(dense || this) in nats per token",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """The trials of one policy on one task at one length, at one depth or all together.

    Attributes:
        task: Its name, and how many facts it asks for at depths, if several.
        length: Tokens of prompt and answer.
        depth: Where the fact stood, or ``None``.
        attention: The policy.
        label: Of it, among all that were run (``policies.labels_of``).
        digest: Of it, its options and its profile.
        trials: How many; at one depth, how many facts there were asked for.
        values: Means of what was measured; ``perplexity`` where there is a ``loss``.
        keys_read_fraction: Mean.
        mass_kept: Mean over the trials that were audited.
    """

    task: str
    length: int
    depth: float | None
    attention: Mapping[str, Any]
    label: str
    digest: str
    trials: int
    values: Mapping[str, float]
    keys_read_fraction: float
    mass_kept: float | None

    @classmethod
    def of(cls, task: str, label: str, trials: Sequence[Trial], depth: float | None = None) -> Cell:
        """Trials that differ in sample, and in depths if ``depth`` is ``None``; else their facts at that depth."""
        first = trials[0]
        values = {name: _mean(trial.values[name] for trial in trials) for name in first.values}
        count = len(trials)
        if depth is not None:
            found = [said.found for trial in trials for said in trial.said if said.depth == depth]
            values, count = {"score": _mean(found)}, len(found)
        if "loss" in values:
            values["perplexity"] = math.exp(values["loss"])
        masses = [trial.mass_kept for trial in trials if trial.mass_kept is not None]
        return cls(
            task,
            first.length,
            depth,
            first.attention,
            label,
            first.digest,
            count,
            values,
            _mean(trial.keys_read_fraction for trial in trials),
            _mean(masses) if masses else None,
        )

    def __str__(self) -> str:
        """The measure, and in brackets the keys read in %."""
        values = self.values
        if "score" in values:
            told = f"{100 * values['score']:.0f}"
        elif "perplexity" in values:
            told = f"{values['perplexity']:.2f}"
        else:
            told = f"{100 * values['match']:.0f}; {values['kl']:.3f}"
        return f"{told} ({100 * self.keys_read_fraction:.0f})"


def cells(trials: Iterable[Trial], by_depth: bool) -> list[Cell]:
    """The trials in groups, in the order in which they first appear; with ``by_depth``, each depth's facts apart."""
    trials = list(trials)
    labels = labels_of((trial.digest, trial.attention) for trial in trials)
    groups: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        depths: list[float | None] = [*sorted(set(trial.depths))] if by_depth else []
        for depth in depths or [None]:
            # What is asked for in turn gets harder with their number.
            task = trial.task if len(trial.depths) < 2 else f"{trial.task}-{len(trial.depths)}"
            groups.setdefault((task, trial.length, depth, trial.digest), []).append(trial)
    return [Cell.of(key[0], labels[key[3]], group, key[2]) for key, group in groups.items()]


def table(found: Sequence[Cell]) -> str:
    """One Markdown table per task: a row per policy, a column per length."""
    parts = []
    for task in dict.fromkeys(cell.task for cell in found):
        own = [cell for cell in found if cell.task == task]
        lengths = sorted({cell.length for cell in own})
        counts = sorted({cell.trials for cell in own})
        trials = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        measure = next(_CAPTIONS[name] for name in own[0].values if name in _CAPTIONS)
        rows = [[task, *map(str, lengths)], ["---", *["---:"] * len(lengths)]]
        for name in dict.fromkeys(cell.label for cell in own):
            by_length = {cell.length: str(cell) for cell in own if cell.label == name}
            rows.append([name, *(by_length.get(length, "-") for length in lengths)])
        parts.append(
            f"{task}: {measure} (keys read, in %); {trials} trials a cell\n\n"
            + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        )
    return "\n\n".join(parts)


def write_report(directory: Path, trials: Trials, refused: Sequence[Refused]) -> str:
    """Writes ``results.json`` and heat maps; returns the tables and what is to be said beside them."""
    fine = cells(trials, by_depth=True)
    result = {
        **trials.header,
        "format": "foveate-eval",
        "version": VERSION,
        "cells": [asdict(cell) for cell in fine],
        "unavailable": [asdict(item) for item in refused],
    }
    part = part_of(directory / FILE)
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(directory / FILE)
    told = [table(cells(trials, by_depth=False))]
    if refused:
        told.append("\n".join(f"not run: {label(item.attention)}: {item.reason}" for item in refused))
    try:
        from .heatmap import draw

        drawn = [path.name for path in draw(directory, fine)]
    except ImportError:
        told.append(
            "No heat maps: matplotlib is missing. Get it with `pip install 'foveate[eval]'` and give the same command "
            "again; nothing is computed twice."
        )
        drawn = []
    told.append(f"written to {directory}: {', '.join([FILE, *drawn])}")
    return "\n\n".join(part for part in told if part)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
