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
        runs: Files that hold it, first to last. Other documents may share them, or continue from the middle of one.
        own_keys: Its pages that no other document has, last first.
        own_bytes: Of these, in every file that holds them.
    """

    id: str
    runs: tuple[StoredRun, ...]
    own_keys: tuple[bytes, ...]
    own_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its files, those that it shares too."""
        return sum(run.nbytes for run in self.runs)

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
        self._behind: dict[bytes, set[str]] = {}  # page -> files that continue it

    def add(self, run: StoredRun) -> None:
        """Adds a file, or replaces the one of that name."""
        self.remove(run.name)
        self.runs[run.name] = run
        self.nbytes += run.nbytes
        for index, key in enumerate(run.header.keys):
            self._pages.setdefault(key, {})[run.name] = index
        self._behind.setdefault(run.header.parent, set()).add(run.name)

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
        behind = self._behind[run.header.parent]
        behind.remove(name)
        if not behind:
            del self._behind[run.header.parent]

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

    def front(self, key: bytes) -> set[str]:
        """Names of the files in which a page is and everything before it."""
        return {run.name for run, _ in self._chain(key)}

    def oldest(self) -> list[StoredRun]:
        """Files by the time of their last use, but none before one that continues it, which is lost without it."""
        used = {run.name: run.used for run in self.runs.values()}
        for run in sorted(self.runs.values(), key=lambda run: -run.header.first_page):
            for parent in self._pages.get(run.header.parent, ()):
                used[parent] = max(used[parent], used[run.name])
        return sorted(self.runs.values(), key=lambda run: (used[run.name], -run.header.first_page))

    def documents(self) -> list[Document]:
        """Every chain of pages that no page continues, the latest used first."""
        ends = {run.header.keys[-1] for run in self.runs.values()}
        documents = [self._document(key) for key in ends if not self._next(key)]
        return sorted(documents, key=lambda document: (-document.runs[-1].used, document.id))

    def ends(self, keys: Iterable[bytes]) -> list[Span]:
        """Where pages are and all that continue them, in every file that holds any: the end of each, or all of it."""
        firsts: dict[str, int] = {}
        todo = list(keys)
        while todo:
            key = todo.pop()
            for name, index in (*((name, 0) for name in self._behind.get(key, ())), *self._pages.get(key, {}).items()):
                if index < firsts.get(name, index + 1):
                    firsts[name] = index
                    todo += self.runs[name].header.keys[index:]
        return [Span(name, first, self.runs[name].header.num_pages - first) for name, first in firsts.items()]

    def _document(self, key: bytes) -> Document:
        chain = list(self._chain(key))
        own = self._own(chain)
        firsts: dict[str, int] = {}
        for page in own:  # last first
            firsts.update(self._pages[page])
        nbytes = sum(_bytes_from(self.runs[name], first) for name, first in firsts.items())
        return Document(key.hex()[:32], tuple(run for run, _ in reversed(chain)), tuple(own), nbytes)

    def _own(self, chain: list[tuple[StoredRun, int]]) -> list[bytes]:
        """Pages from the end of a chain up to where another document leaves it."""
        own: list[bytes] = []
        for run, count in chain:
            for key in reversed(run.header.keys[:count]):
                # Most pages stand in one file and amid it, and a server of 300 GB has 200,000 of them.
                is_plain = key not in self._behind and len(self._pages[key]) == 1
                if own and not is_plain and len(self._next(key)) > 1:
                    return own
                own.append(key)
        return own

    def _chain(self, key: bytes) -> Iterator[tuple[StoredRun, int]]:
        """Files in which a page is and everything before it, last first, each with how many of its pages these are."""
        seen: set[str] = set()
        while key in self._pages:
            name, index = next(iter(self._pages[key].items()))
            if name in seen:
                return  # a forged header goes in a circle
            seen.add(name)
            yield self.runs[name], index + 1
            key = self.runs[name].header.parent

    def _next(self, key: bytes) -> set[bytes]:
        """Pages that continue a page."""
        found = {self.runs[name].header.keys[0] for name in self._behind.get(key, ())}
        for name, index in self._pages[key].items():
            found.update(self.runs[name].header.keys[index + 1 : index + 2])
        return found


def _bytes_from(run: StoredRun, first: int) -> int:
    """Bytes that a file gets smaller by without its pages from ``first`` on, but for its header."""
    return (run.header.num_pages - first) * run.header.stride if first else run.nbytes
