"""A report of speed that says of itself what was measured, with what, and where."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..loader import LoadedModel
from ..machine import describe, load_average
from ..options import EngineOptions
from ..writable import check_writable, part_of

FORMAT, VERSION = "foveate-bench", 1

# Given on the command line, but no matter of a report: functions, keys (also as they were typed), and where it goes.
_NOT_TOLD = ("run", "api_key", "command_line", "default_schemes", "output", "fresh")


class Report:
    """What every report says, whatever was measured; made when the measuring begins.

    Args:
        kind: ``latency``, ``throughput``, ``serve`` or ``ops``.
        given: The command line.
        device: Where it is measured.

    Raises:
        OSError: the results cannot be written: said now, not after hours.
    """

    def __init__(self, kind: str, given: Namespace, device: torch.device) -> None:
        self.kind = kind
        self._target: Path | None = None
        if given.output is not None:
            given.output.mkdir(parents=True, exist_ok=True)
            self._target = given.output / f"{kind}.json"
            check_writable(self._target)
        self._about: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe(device),
            "options": {name: _plain(value) for name, value in vars(given).items() if name not in _NOT_TOLD},
        }
        self._load = load_average()

    def finish(
        self,
        body: Mapping[str, Any],
        text: str,
        draw: Callable[[Path, Mapping[str, Any]], list[Path]] | None = None,
    ) -> bool:
        """Writes ``KIND.json`` and the plots if there is an output directory; prints the tables.

        Args:
            body: The rest of the JSON object.
            text: Tables for a reader.
            draw: Writes plots of the whole object into a directory. May raise ``ImportError``.

        Returns:
            Whether all was written that should be; standard error tells what was not.
        """
        load = {"start": self._load, "end": load_average()}
        whole = {**self._about, "load_average": load, **body}
        machine = self._about["machine"]
        about = (
            f"{machine['cpu']} ({machine['kernels'] or 'no native kernels'}), {machine['threads']} threads of "
            f"{machine['cores']} cores on {machine['device']}; load average {load['start']} to {load['end']}"
        )
        told, written = "", True
        try:
            if self._target is not None:
                told = _write(self._target, whole, draw)
        except OSError as error:  # the tables are left, and where they cannot be printed the file is
            print(f"foveate: the results are not all written: {error}", file=sys.stderr)
            written = False
        print("\n\n".join(part for part in (text, about, told) if part), flush=True)
        return written


def _write(target: Path, whole: Mapping[str, Any], draw: Callable[[Path, Mapping[str, Any]], list[Path]] | None) -> str:
    """Writes a report and its plots; returns what is to be printed of that.

    Raises:
        OSError: something could not be written.
    """
    part = part_of(target)
    part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    part.replace(target)
    names, told = [target.name], []
    try:
        names += [path.name for path in draw(target.parent, whole)] if draw else []
    except ImportError:
        told.append("No plots: matplotlib is missing. Get it with `pip install 'foveate[bench]'`.")
    return "\n\n".join([*told, f"written to {target.parent}: {', '.join(names)}"])


def model_facts(loaded: LoadedModel, options: EngineOptions) -> dict[str, Any]:
    """The model, as far as its speed depends on it."""
    facts = asdict(loaded.attached.facts)
    wanted = ("model_type", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    config = loaded.model.config.get_text_config()
    return {
        "name": loaded.name,
        **{name: facts[name] for name in wanted},
        "hidden_size": config.hidden_size,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "quantization": options.quantization,
    }


def engine_facts(options: EngineOptions) -> dict[str, Any]:
    """Options of the engine that measured."""
    return {name: _plain(value) for name, value in asdict(options).items()}


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head, the first column is text and the others are numbers."""
    marks = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], marks, *rows[1:]])


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
