"""The trials: written down one by one, so that a run that was cut off goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..journal import Journal

VERSION = 2
FILE = "trials.jsonl"

# Task, length, depths, sample and digest: one trial each.
Key = tuple[str, int, tuple[float, ...], int, str]


@dataclass(frozen=True, slots=True)
class Said:
    """One answer of a trial.

    Attributes:
        answer: What the model said.
        expected: What it should have said.
        found: Whether that counts as the same.
        depth: Where it stood in the document, 0 to 1, if that was asked for.
    """

    answer: str
    expected: str
    found: bool
    depth: float | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One policy on one sample.

    Attributes:
        task: Its name.
        length: Tokens of prompt and answer.
        depths: Where the facts asked for stood, 0 to 1; none if that was not asked for.
        sample: Number of the sample.
        attention: The policy, as a request gives it.
        digest: The policy with its defaults and profile.
        values: What was measured: ``score``, ``loss``, or ``match`` and ``kl``.
        keys_read_fraction: Keys read over those of dense attention.
        mass_kept: Share of dense attention's mass that was kept, where it was audited.
        said: Its answers, turn by turn, where it was to say something.
    """

    task: str
    length: int
    depths: tuple[float, ...]
    sample: int
    attention: Mapping[str, Any]
    digest: str
    values: Mapping[str, float]
    keys_read_fraction: float
    mass_kept: float | None = None
    said: tuple[Said, ...] = ()

    @property
    def key(self) -> Key:
        return self.task, self.length, self.depths, self.sample, self.digest


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
        self._found: dict[Key, Trial] = {}
        for read in self._journal.lines:
            said = tuple(Said(**answer) for answer in read["said"])
            trial = Trial(**{**read, "depths": tuple(read["depths"]), "said": said})
            self._found[trial.key] = trial

    def __iter__(self) -> Iterator[Trial]:
        return iter(self._found.values())

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def add(self, trial: Trial) -> None:
        """Writes a trial down."""
        self._journal.add(asdict(trial))
        self._found[trial.key] = trial
