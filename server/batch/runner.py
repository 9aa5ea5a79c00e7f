"""Runs the lines of one batch: a bounded number at once; what is finished goes to the ledger before more is read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ParamSpec, TypeVar

from ..errors import ApiError
from ..exceptions import EngineDead, QueueFull, RequestAborted, StepFailed
from ..generation import Generation
from ..metrics import ServerMetrics
from ..state import ServerState
from .endpoints import answer, prepare
from .entry import Entry, LineError, parse_line
from .errors import BatchError, EngineStopped
from .ledger import Ledger
from .lines import Line, read_lines
from .records import Result, answered, refused, unreadable

# Lines that are read but not written, in bytes of JSON: many short ones, few long ones.
MAX_BYTES_AT_ONCE = 32 * 2**20
# Of the threads that read text; HTTP requests have the others.
PREPARED_AT_ONCE = 2
QUEUE_SECONDS = 2.0  # at most, until a line that found the queue full, or no time for its grammar, is tried again
# A step that fails ends everyone in it, so each gets another try beside others; so does what waited too long.
TRIES = 3

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Source:
    """The lines that are not done yet. Used in one thread at a time.

    Args:
        file: The input, open at its beginning.
        ledger: Knows what is done.
        urls: Paths that lines may ask for.
        max_bytes: Of one line.
    """

    file: BinaryIO
    ledger: Ledger
    urls: Collection[str]
    max_bytes: int
    _lines: Iterator[Line] = field(init=False)

    def __post_init__(self) -> None:
        self._lines = read_lines(self.file, self.max_bytes)

    def next(self) -> tuple[Line, Entry | LineError] | None:
        """The next line and what it holds; ``None`` at the end.

        Raises:
            BatchError: the input cannot be read.
        """
        try:
            line = next((line for line in self._lines if not self.ledger.is_done(line.number)), None)
        except OSError as error:
            raise BatchError(f"cannot read the input: {error.strerror}") from error
        if line is None:
            return None
        entry: Entry | LineError
        try:
            entry = parse_line(line, self.urls)
        except LineError as error:
            entry = error
        if entry.custom_id is not None and self.ledger.has_id(entry.custom_id):
            entry = duplicate(entry.custom_id)
        return line, entry


class BatchRunner:
    """Runs one batch to its end, or until it is told to stop.

    Args:
        state: Engine, settings and threads for text.
        source: What is to be run.
        ledger: Takes what came of it.
        owner: Digest of the API key whose prefixes the lines may share.
        threads: For work on files.
        at_once: Lines that may be in work; asked again and again.
        on_done: Called after results were written, with their number.
    """

    def __init__(
        self,
        state: ServerState,
        source: Source,
        ledger: Ledger,
        owner: str,
        threads: ThreadPoolExecutor,
        at_once: Callable[[], int],
        on_done: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._state, self._source, self._ledger, self._owner = state, source, ledger, owner
        self._threads, self._at_once, self._on_done = threads, at_once, on_done
        self._preparing = asyncio.Semaphore(PREPARED_AT_ONCE)
        # Lines wait for hours, which must not be read as the time that a client waits.
        self._metrics = ServerMetrics(lambda: None)
        self._sizes: dict[asyncio.Task[Result], int] = {}
        self._claimed: set[str] = set()
        self._at_end = False

    async def run(self, stop: asyncio.Event) -> bool:
        """Runs until every line has its record, or ``stop`` is set. Lines in work are then given up.

        Returns:
            Whether every line has its record.

        Raises:
            EngineStopped: the engine takes no more requests.
            BatchError: the input cannot be read, or the results cannot be written.
        """
        stopping = asyncio.create_task(stop.wait())
        try:
            while not stop.is_set():
                await self._fill(stop)
                if not self._sizes:
                    return self._at_end
                finished, _ = await asyncio.wait({*self._sizes, stopping}, return_when=asyncio.FIRST_COMPLETED)
                await self._write([task for task in self._sizes if task in finished])
            return False
        finally:
            stopping.cancel()
            for task in self._sizes:
                task.cancel()
            await asyncio.gather(*self._sizes, stopping, return_exceptions=True)

    async def _fill(self, stop: asyncio.Event) -> None:
        """Takes lines into work until enough are."""
        while not (self._at_end or stop.is_set()) and self._has_room():
            taken = await self._in_thread(self._source.next)
            if taken is None:
                self._at_end = True
                return
            line, entry = taken
            if entry.custom_id in self._claimed:
                entry = duplicate(entry.custom_id)
            if entry.custom_id is not None:
                self._claimed.add(entry.custom_id)
            task = asyncio.create_task(self._result(line.number, entry))
            self._sizes[task] = len(line.data or b"")

    def _has_room(self) -> bool:
        return not self._sizes or (len(self._sizes) < self._at_once() and sum(self._sizes.values()) < MAX_BYTES_AT_ONCE)

    async def _write(self, finished: Sequence[asyncio.Task[Result]]) -> None:
        """Puts results on the disk; only then others may take their places."""
        results = [task.result() for task in finished]
        if not results:
            return
        await self._in_thread(self._ledger.add, results)
        for task, result in zip(finished, results, strict=True):
            del self._sizes[task]
            if result.custom_id is not None:
                self._claimed.discard(result.custom_id)
        self._on_done(len(results))

    async def _result(self, number: int, entry: Entry | LineError) -> Result:
        """What comes of one line; raises only what ends the batch."""
        if isinstance(entry, LineError):
            return unreadable(number, entry)
        for tries_left in reversed(range(TRIES)):
            try:
                return await self._in_thread(answered, number, entry.custom_id, await self._answer(entry))
            except (StepFailed, RequestAborted) as error:
                self._check_engine(error)
                if not tries_left:
                    return refused(number, entry.custom_id, error)
            except Exception as error:
                self._check_engine(error)
                told = refused(number, entry.custom_id, error)
                if b'"code":"internal_error"' in told.data:
                    _log.error("line %d of a batch failed", number, exc_info=error)
                return told
        raise AssertionError("every try returns or raises")

    async def _answer(self, entry: Entry) -> dict[str, object]:
        generation = await self._prepared(entry)
        while True:
            try:
                return await answer(self._state, generation, self._owner, self._metrics)
            except QueueFull as error:
                await asyncio.sleep(min(error.retry_seconds, QUEUE_SECONDS))

    async def _prepared(self, entry: Entry) -> Generation:
        """As ``prepare``, which is tried again where it lacked only time."""
        for tries_left in reversed(range(TRIES)):
            try:
                async with self._preparing:
                    return await prepare(self._state, entry.url, entry.body)
            except ApiError as error:
                # A text that takes too long keeps a thread until it ends, and would take another.
                again = error.status == 503 and error.code != "text_timeout"
                if not again or not tries_left or self._state.condition != "ready":
                    raise
            await asyncio.sleep(QUEUE_SECONDS)
        raise AssertionError("every try returns or raises")

    def _check_engine(self, error: Exception) -> None:
        """An engine that stops fails everything in it: that says nothing about a line."""
        if isinstance(error, EngineDead) or self._state.condition != "ready":
            raise EngineStopped("the engine has stopped") from error

    async def _in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs ``function`` beside the event loop, to its end whatever happens here: it changes files."""
        work: Awaitable[T] = asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: function(*args, **kwargs)
        )
        return await asyncio.shield(work)


def duplicate(custom_id: str | None) -> LineError:
    # The record carries no id: the id belongs to the earlier line, and must be found once.
    return LineError("duplicate_custom_id", f"custom_id {custom_id!r} is that of an earlier line.", "custom_id")


def open_input(path: Path) -> BinaryIO:
    """``path``, open at its beginning.

    Raises:
        BatchError: it cannot be read, or not twice.
    """
    try:
        if not path.is_file() and path.exists():
            raise BatchError(f"{path} is not a plain file")
        return path.open("rb")
    except OSError as error:
        raise BatchError(f"cannot read {path}: {error.strerror}") from None
