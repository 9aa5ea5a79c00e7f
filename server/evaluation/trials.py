"""The trials: written down one by one, so that a run that was cut off goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..journal import Journal

VERSION = 1
FILE = "trials.jsonl"


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy on one sample.

    Attributes:
        task: Its name.
        length: Tokens of prompt and answer.
        depth: Where the fact stood, 0 to 1, or ``None``.
        sample: Number of the sample.
        attention: The policy, as a request gives it.
        digest: The policy with its defaults and profile.
        values: What was measured: ``score``, ``loss``, or ``match`` and ``kl``.
        keys_read_fraction: Keys read over those of dense attention.
        mass_kept: Share of dense attention's mass that was kept, where it was audited.
        answers: What the model said, turn by turn, where it was to say something.
        expected: What it should have said.
    """

    task: str
    length: int
    depth: float | None
    sample: int
    attention: Mapping[str, Any]
    digest: str
    values: Mapping[str, float]
    keys_read_fraction: float
    mass_kept: float | None = None
    answers: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int, float | None, int, str]:
        return self.task, self.length, self.depth, self.sample, self.digest


class Trials:
    """A file of trials, one JSON object per line, under a header that says what they are trials of.

    Args:
        directory: Made if need be.
        header: Model, element type, seed and the like: what results must share to be compared.
        fresh: Forget what is there.

    Raises:
        OtherResults: the directory holds results under another header; the message says what differs.
    """

    def __init__(self, directory: Path, header: Mapping[str, Any], fresh: bool = False) -> None:
        self.header = {"format": "foveate-trials", "version": VERSION, **header}
        self._journal = Journal(directory / FILE, self.header, fresh)
        self._found: dict[tuple[str, int, float | None, int, str], Trial] = {}
        for read in self._journal.lines:
            trial = Trial(**{**read, "answers": tuple(read["answers"]), "expected": tuple(read["expected"])})
            self._found[trial.key] = trial

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._found.values())

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def add(self, trial: Trial) -> None:
        """Writes a trial down."""
        self._journal.add(asdict(trial))
        self._found[trial.key] = trial
