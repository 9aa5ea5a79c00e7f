"""Which files of a page store hold which pages. Pure bookkeeping in memory; ``disk`` reads and writes the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .disk_format import RunHeader


@dataclass(slots=True)
class StoredRun:
    """A file.

    Attributes:
        name: Of the file, in the store's directory.
        header: What it says of itself.
        nbytes: Its length.
        used: When it was last wanted, Unix time in nanoseconds.
    """

    name: str
    header: RunHeader
    nbytes: int
    used: int


@dataclass(frozen=True, slots=True)
class Span:
    """Pages ``first`` to ``first + count - 1`` of a file."""

    name: str
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt of which pages are kept, as an administrator sees it.

    Attributes:
        id: Names it: the beginning of the key of its last page.
        runs: Its files, first to last.
        own_runs: Those of them that no other document needs.
    """

    id: str
    runs: tuple[StoredRun, ...]
    own_runs: tuple[StoredRun, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its files, those that it shares too."""
        return sum(run.nbytes for run in self.runs)

    @property
    def own_bytes(self) -> int:
        return sum(run.nbytes for run in self.own_runs)

    @property
    def tokens(self) -> int:
        return self.runs[-1].header.num_tokens


class RunIndex:
    """Files by name, and pages by chained key. Not thread-safe: the store locks."""

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.nbytes = 0
        # Page -> files that hold it: two servers may have written the same one.
        self._pages: dict[bytes, dict[str, int]] = {}

    def add(self, run: StoredRun) -> None:
        """Adds a file, or replaces the one of that name."""
        self.remove(run.name)
        self.runs[run.name] = run
        self.nbytes += run.nbytes
        for index, key in enumerate(run.header.keys):
            self._pages.setdefault(key, {})[run.name] = index

    def remove(self, name: str) -> None:
        """Forgets a file; an unknown one is ignored."""
        run = self.runs.pop(name, None)
        if run is None:
            return
        self.nbytes -= run.nbytes
        for key in set(run.header.keys):
            holders = self._pages[key]
            del holders[name]
            if not holders:
                del self._pages[key]

    def __contains__(self, key: bytes) -> bool:
        return key in self._pages

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, from the first on, are there."""
        return next((index for index, key in enumerate(keys) if key not in self._pages), len(keys))

    def spans(self, keys: Iterable[bytes]) -> list[Span]:
        """Where the pages of ``keys`` are, up to the first that is missing."""
        found: list[Span] = []
        for key in keys:
            holders = self._pages.get(key)
            if holders is None:
                break
            last = found[-1] if found else None
            if last is not None and holders.get(last.name) == last.first + last.count:
                found[-1] = Span(last.name, last.first, last.count + 1)
            else:
                found.append(Span(*next(iter(holders.items())), 1))
        return found

    def oldest(self) -> list[StoredRun]:
        """Files by the time of their last use; of one document the last pages first."""
        return sorted(self.runs.values(), key=lambda run: (run.used, -run.header.first_page))

    def documents(self) -> list[Document]:
        """Every chain of files that no file continues, the latest used first."""
        parents = {name: self._parent(run) for name, run in self.runs.items()}
        # Where a file is continued after some of its pages, by another question about the same document say, its
        # rest is the end of a document of its own.
        ends = {parent.header.keys[-1]: parent.name for parent in self.runs.values()}
        continued = {ends[run.header.parent] for run in self.runs.values() if run.header.parent in ends}
        chains = [tuple(self._chain(name, parents)) for name in self.runs if name not in continued]
        users: dict[str, int] = {}
        for chain in chains:
            for run in chain:
                users[run.name] = users.get(run.name, 0) + 1
        documents = [
            Document(_id(chain[-1]), chain, tuple(run for run in chain if users[run.name] == 1)) for chain in chains
        ]
        return sorted(documents, key=lambda document: (-document.runs[-1].used, document.id))

    def _parent(self, run: StoredRun) -> str | None:
        found = self._pages.get(run.header.parent)
        return None if found is None else next(iter(found))

    def _chain(self, name: str, parents: dict[str, str | None]) -> Iterator[StoredRun]:
        names: list[str] = []
        here: str | None = name
        while here is not None and here not in names:  # a forged header could go in a circle
            names.append(here)
            here = parents[here]
        return (self.runs[item] for item in reversed(names))


def _id(last: StoredRun) -> str:
    return last.header.keys[-1].hex()[:32]
