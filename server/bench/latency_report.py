"""From timed prompts to medians, shares and growth, and to tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.policies import labels_of
from .figures import growth, percentile, shares
from .report import table


def summary(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``cells`` by length and policy, and what was ``skipped``."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["digest"], line["length"]), []).append(line)
    labels = labels_of((line["digest"], line["attention"]) for line in lines)
    by_length = sorted(groups.items(), key=lambda item: item[0][1])
    cells = [_cell(labels[digest], group) for (digest, _), group in by_length if _runs(group)]
    for cell in cells:
        shorter = [one for one in cells if one["digest"] == cell["digest"] and one["length"] < cell["length"]]
        if shorter:
            last = shorter[-1]
            cell["growth"] = growth(last["length"], last["first_seconds"], cell["length"], cell["first_seconds"])
    skipped = [
        {
            "label": labels[line["digest"]],
            **{name: line[name] for name in ("length", "what", "repeat", "attention", "limit_seconds", "reason")},
        }
        for group in groups.values()
        for line in _given_up(group)
    ]
    return {"cells": cells, "skipped": skipped}


def _runs(group: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in group if line["kind"] == "run"]


def _given_up(group: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What was skipped, under the last limit, and not measured since."""
    measured = {(line["kind"], line["repeat"]) for line in group}
    skipped = {(line["what"], line["repeat"]): line for line in group if line["kind"] == "skipped"}
    return [line for key, line in skipped.items() if key not in measured]


def _cell(label: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    runs = _runs(group)
    first = [line["first_seconds"] for line in runs]
    gaps = [gap for line in runs for gap in line["gaps_seconds"]]
    loads = [load for line in group if "load" in line for load in line["load"]]
    cell: dict[str, Any] = {
        "length": runs[0]["length"],
        "label": label,
        "attention": runs[0]["attention"],
        "digest": runs[0]["digest"],
        "repeats": len(runs),
        "first_seconds": statistics.median(first),
        "first_seconds_range": [min(first), max(first)],
        "prefill_tokens_per_second": runs[0]["length"] / statistics.median(first),
        "gap_seconds": statistics.median(line["gap_seconds"] for line in runs) if gaps else None,
        "gap_seconds_p90": percentile(gaps, 0.9) if gaps else None,
        "keys_read_fraction": runs[0]["keys_read_fraction"],
        "load_average": [min(loads), max(loads)],
    }
    for line in group:
        if line["kind"] == "parts":
            cell["prefill_shares"] = shares(line["prefill_parts"], line["first_seconds"])
            decode = sum(line["gaps_seconds"])
            cell["decode_shares"] = shares(line["decode_parts"], decode) if decode else None
    return cell


def told(body: Mapping[str, Any]) -> str:
    """The tables, and what is to be said beside them."""
    cells = body["cells"]
    lengths = sorted({cell["length"] for cell in [*cells, *body["skipped"]]})
    names = list(dict.fromkeys(cell["label"] for cell in [*cells, *body["skipped"]]))
    by_place = {(cell["label"], cell["length"]): cell for cell in cells}
    head = [f"{length:,}" for length in lengths]

    def rows(title: str, show: Any) -> str:
        found = [
            [name, *(show(by_place[name, length]) if (name, length) in by_place else "-" for length in lengths)]
            for name in names
        ]
        return table([[title, *head], *found])

    model = body["model"]
    parts = []
    if cells:
        loads = [load for cell in cells for load in cell["load_average"]]
        parts.append(
            f"{model['name']}, {model['dtype']}, weights {model['quantization']}, one prompt alone; "
            f"load average {min(loads)} to {max(loads)} while it was measured"
        )
        parts.append(rows("seconds to first token (keys read, in %)", _first))
        parts.append(rows("growth since the length before (1 linear, 2 quadratic)", _growth))
        parts.append(rows("ms between tokens, median (p90)", _gap))
    if any("prefill_shares" in cell for cell in cells):
        parts.append(rows("prefill: % attention / selection / linear / rest", lambda cell: _shares(cell, "prefill")))
        parts.append(rows("decode: % attention / selection / linear / rest", lambda cell: _shares(cell, "decode")))
    notes = [f"skipped: {item['label']} at {item['length']:,} tokens{_part(item)}: {item['reason']}"
             for item in body["skipped"]]  # fmt: skip
    notes += [f"not run: {item['attention']['scheme']}: {item['reason']}" for item in body["unavailable"]]
    if body["synthetic_profiles"]:
        notes.append(f"synthetic profiles, made from random tokens: {', '.join(body['synthetic_profiles'])}")
    return "\n\n".join([*parts, "\n".join(notes)]).strip()


def _part(item: Mapping[str, Any]) -> str:
    if item["what"] == "parts":
        return ", the shares"
    return f", repeat {item['repeat'] + 1}" if item["repeat"] else ""


def _first(cell: Mapping[str, Any]) -> str:
    return f"{cell['first_seconds']:.2f} ({100 * cell['keys_read_fraction']:.0f})"


def _growth(cell: Mapping[str, Any]) -> str:
    return f"{cell['growth']:.2f}" if "growth" in cell else "-"


def _gap(cell: Mapping[str, Any]) -> str:
    if cell["gap_seconds"] is None:
        return "-"
    return f"{1e3 * cell['gap_seconds']:.1f} ({1e3 * cell['gap_seconds_p90']:.1f})"


def _shares(cell: Mapping[str, Any], phase: str) -> str:
    found = cell.get(f"{phase}_shares")
    return " / ".join(f"{100 * share:.0f}" for share in found.values()) if found else "-"
