"""Runs the batches of a server beside its requests, and goes on with them when it is started again."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import ApiError
from ..state import ServerState
from .errors import CannotResume, EngineStopped
from .ledger import Ledger
from .lines import Scan, scan
from .runner import BatchRunner, Source, open_input
from .store import Store, StoredBatch

RUNNING_AT_ONCE = 4
UPLOADS_AT_ONCE = 16  # of one owner
POLL_SECONDS = 0.1
COUNT_SECONDS = 1.0  # between two counts in the store; those that clients read are newer
RETRY_SECONDS = 10.0  # after a full disk

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """A batch in work."""

    batch: StoredBatch
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    ledger: Ledger | None = None


class BatchService:
    """The batches of one server, several at once, each owner's turn as it comes.

    Made with the app; lives between ``start`` and ``stop`` on its event loop.

    Attributes:
        store: Files and batches.
    """

    def __init__(self, state: ServerState, store: Store) -> None:
        self.store = store
        self._state = state
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._not_before: dict[str, float] = {}
        self._uploads: Counter[str] = Counter()

    async def start(self) -> None:
        self._threads = ThreadPoolExecutor(RUNNING_AT_ONCE + 1, thread_name_prefix="foveate-batch")
        self._wake = asyncio.Event()
        self._closing = False
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Gives up lines in work; what is done is kept, and the rest is run after the next start."""
        self._closing = True
        self._wake.set()
        await asyncio.gather(self._loop, return_exceptions=True)
        self._threads.shutdown()
        self.store.close()

    @contextmanager
    def uploading(self, owner: str) -> Iterator[None]:
        """Counts an upload on its way.

        Raises:
            ApiError: 429, the owner has enough of them.
        """
        if self._uploads[owner] >= UPLOADS_AT_ONCE:
            raise ApiError(
                429,
                f"{UPLOADS_AT_ONCE} uploads are on their way already.",
                type="rate_limit_error",
                code="too_many_uploads",
                headers={"retry-after": "5"},
            )
        self._uploads[owner] += 1
        try:
            yield
        finally:
            self._uploads[owner] -= 1
            self._uploads += Counter()  # forgets who has none

    def wake(self) -> None:
        """There is a new batch, or one to cancel."""
        self._wake.set()

    def cancel(self, batch: StoredBatch) -> None:
        """Stops a batch that ``Store.advance`` has marked as cancelling."""
        running = self._running.get(batch.id)
        if running is not None:
            running.stop.set()
        self._wake.set()

    def counts(self, batch: StoredBatch) -> tuple[int, int]:
        """Lines answered and failed, as of now."""
        running = self._running.get(batch.id)
        if running is None or running.ledger is None:
            return batch.answered, batch.failed
        return running.ledger.answered, running.ledger.failed

    @property
    def _may_run(self) -> bool:
        return not self._closing and self._state.condition == "ready"

    async def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            if self._may_run:
                try:
                    await self._start_batches()
                except Exception as error:  # the disk, most likely; this loop must not end
                    _log.error("no batch can be begun: %s", error)
            else:
                self._stop_batches()
            with suppress(TimeoutError):
                # The engine says nothing when it becomes ready, or begins to drain.
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)
        self._stop_batches()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _stop_batches(self) -> None:
        for running in self._running.values():
            running.stop.set()

    async def _start_batches(self) -> None:
        if len(self._running) >= RUNNING_AT_ONCE:
            return
        waiting = await self._in_thread(self.store.open_batches)
        while len(self._running) < RUNNING_AT_ONCE and (batch := self._next(waiting)) is not None:
            waiting.remove(batch)
            running = self._running[batch.id] = _Running(batch)
            task = asyncio.create_task(self._work(running))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next(self, waiting: list[StoredBatch]) -> StoredBatch | None:
        """The oldest batch of the owner who has the fewest in work."""
        now = asyncio.get_running_loop().time()
        owners = [running.batch.owner for running in self._running.values()]
        ready = [
            batch for batch in waiting if batch.id not in self._running and self._not_before.get(batch.id, now) <= now
        ]
        return min(ready, key=lambda batch: (owners.count(batch.owner), batch.number), default=None)

    async def _work(self, running: _Running) -> None:
        batch = running.batch
        try:
            await self._take_on(running)
            self._not_before.pop(batch.id, None)
        except EngineStopped:
            _log.info("batch %s waits for the next start", batch.id)
        except Exception as error:
            # Most likely a disk: it may have room again later, and nothing that was done is lost.
            _log.error("batch %s is tried again in %g s: %s", batch.id, RETRY_SECONDS, error)
            _log.debug("why a batch stopped", exc_info=True)
            self._not_before[batch.id] = asyncio.get_running_loop().time() + RETRY_SECONDS
        finally:
            del self._running[batch.id]
            self._wake.set()

    async def _take_on(self, running: _Running) -> None:
        """Brings a batch to its end, or as far as it comes until it is told to stop."""
        batch, store = running.batch, self.store
        if batch.status == "finalizing":
            await self._in_thread(self._end, batch, "completed")
            return
        if batch.status == "cancelling":
            await self._in_thread(self._end, batch, "cancelled")
            return
        try:
            path, settings = store.file_path(batch.input_file), self._state.settings
            found = await self._in_thread(scan, path, settings.max_body_bytes, settings.max_batch_lines)
        except FileNotFoundError:
            await self._in_thread(self._end, batch, "failed", _told("input_missing", "The input file is gone."))
            return
        if problem := self._problem(found):
            await self._in_thread(self._end, batch, "failed", problem)
            return
        if not await self._advance(batch, "in_progress", total=found.lines):
            return  # cancelled meanwhile: it is taken up again at once
        try:
            finished = await self._answer(running, found)
        except CannotResume as error:
            await self._in_thread(self._end, batch, "failed", _told("cannot_resume", str(error)))
            return
        if finished and await self._advance(batch, "finalizing"):
            await self._in_thread(self._end, batch, "completed")

    async def _advance(self, batch: StoredBatch, status: str, **values: Any) -> bool:
        """Moves a batch on, unless it is to be cancelled."""
        advance = partial(self.store.advance, batch.id, status, ("cancelling", "cancelled"), **values)
        return bool(await self._in_thread(advance))

    async def _answer(self, running: _Running, found: Scan) -> bool:
        batch, store, settings = running.batch, self.store, self._state.settings
        engine = self._state.served().engine
        facts = {"input": f"sha256 {found.sha256}", "model": engine.model_name, **engine.identity}
        output, errors = store.file_path(batch.output_file), store.file_path(batch.error_file)
        running.ledger = ledger = await self._in_thread(Ledger, store.state_path(batch), output, errors, facts)
        counted = 0.0
        loop = asyncio.get_running_loop()

        def on_done(count: int) -> None:
            nonlocal counted
            if loop.time() >= counted + COUNT_SECONDS:
                counted = loop.time()
                self._threads.submit(store.count, batch.id, ledger.answered, ledger.failed)

        try:
            with open_input(store.file_path(batch.input_file)) as file:
                source = Source(file, ledger, {batch.endpoint}, settings.max_body_bytes)
                runner = BatchRunner(
                    self._state, source, ledger, batch.owner, self._threads, self._share_in_flight, on_done
                )
                return await runner.run(running.stop)
        finally:
            await self._in_thread(store.count, batch.id, ledger.answered, ledger.failed)
            await self._in_thread(ledger.close)

    def _end(self, batch: StoredBatch, status: str, errors: list[dict[str, Any]] | None = None) -> None:
        store = self.store
        with suppress(CannotResume):
            # Cuts off what a killed server wrote but did not count.
            output, errors_path = store.file_path(batch.output_file), store.file_path(batch.error_file)
            ledger = Ledger(store.state_path(batch), output, errors_path, {})
            store.count(batch.id, ledger.answered, ledger.failed)
            ledger.close()
        store.end(batch, status, errors)

    def _problem(self, found: Scan) -> list[dict[str, Any]] | None:
        most = self._state.settings.max_batch_lines
        if found.lines > most:
            message = f"The file has more than {most} lines (--max-batch-lines)."
            return _told("too_many_lines", message)
        if found.lines == 0:
            return _told("empty_file", "The file has no lines.")
        return None

    def _share_in_flight(self) -> int:
        return max(1, self._state.settings.batch_in_flight // max(1, len(self._running)))

    async def _in_thread(self, function: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args))


def _told(code: str, message: str) -> list[dict[str, Any]]:
    return [{"code": code, "message": message, "line": None, "param": None}]


def open_service(state: ServerState) -> BatchService | None:
    """The batches of the server, if ``--batch-dir`` says where to keep them.

    Raises:
        BatchError: that directory cannot be used.
    """
    directory = state.settings.batch_dir
    return None if directory is None else BatchService(state, Store(directory))
