"""From the engine's thread to the event loop: the events of one HTTP answer."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from starlette.types import Receive

from foveate.sparse_attn.protocol import Scheme

from .engine_protocol import EngineLike
from .errors import ApiError
from .exceptions import RequestAborted
from .metrics import RequestTimer, ServerMetrics
from .request import Delta, Event, Failed, Finished, GenerationRequest, SamplingParams

QUEUED_EVENTS = 256


class ClientDisconnected(Exception):
    """Nobody is there to answer."""


class SlowReader(ApiError):
    """The client does not read as fast as tokens come."""

    def __init__(self) -> None:
        super().__init__(503, "The stream was not read fast enough.", type="server_error", code="slow_reader")


class RequestTimeout(ApiError):
    """The whole answer took too long: for the client, who ``asked`` for so much time, or for the server."""

    def __init__(self, seconds: float, asked: bool) -> None:
        super().__init__(
            408 if asked else 504,
            f"The answer was not complete after {seconds:g} seconds ({'timeout' if asked else '--request-timeout'}).",
            type="invalid_request_error" if asked else "server_error",
            param="timeout" if asked else None,
            code="request_timeout",
            headers={"x-should-retry": "false"},
        )


class ResponseStream:
    """Events of every engine request behind one HTTP answer.

    Made, used and closed on the event loop; only ``_from_engine`` runs in the engine's thread.

    The queue may be full for ``full_seconds``: a burst, or a busy event loop, must not cost a healthy
    client its answer. One that stays behind for longer does not read as fast as tokens come.

    Args:
        seconds: Time for the whole answer.
        asked: Whether the client chose that time.
        full_seconds: Time for which ``QUEUED_EVENTS`` per choice may wait.
    """

    def __init__(
        self, engine: EngineLike, metrics: ServerMetrics, seconds: float, full_seconds: float, asked: bool = False
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._seconds = seconds
        self._asked = asked
        self._full_seconds = full_seconds
        self._full_since: float | None = None
        self._deadline = time.monotonic() + seconds
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._limit = QUEUED_EVENTS
        self._open: dict[int, str] = {}  # prompt -> id of its request, while it runs
        self._timers: dict[int, RequestTimer] = {}
        self._error: Exception | None = None
        self._wake = asyncio.Event()
        self._spoke_at = 0.0

    def submit(
        self, prompts: list[list[int]], sampling: SamplingParams, scheme: Scheme, salt: str | None, priority: int = 0
    ) -> None:
        """Gives one request per prompt to the engine; all of them, or none.

        Raises:
            EngineError: the engine refused one.
        """
        self._limit = QUEUED_EVENTS * len(prompts) * sampling.n
        requests = [
            GenerationRequest(
                request_id=str(uuid.uuid4()),
                prompt_token_ids=token_ids,
                sampling=sampling,
                scheme=scheme,
                on_event=partial(self._from_engine, index),
                salt=salt,
                priority=priority,
            )
            for index, token_ids in enumerate(prompts)
        ]
        self._open = {index: request.request_id for index, request in enumerate(requests)}
        self._timers = {index: self._metrics.timer() for index in self._open}
        try:
            self._engine.submit(*requests)
        except BaseException:
            self._open.clear()
            raise

    async def events(self, pause: float) -> AsyncIterator[tuple[int, Event] | None]:
        """``(prompt, event)`` until every request ended; ``None`` when nobody was told anything for ``pause`` seconds.

        Events alone are no news for the client, who may not have asked for the progress of its
        prompt: whoever writes says so by ``spoke``.

        Raises:
            ClientDisconnected: the client went away.
            Exception: the error of a request, after the others were aborted.
        """
        self.spoke()
        while self._events or self._open or self._error:
            if self._error:
                raise self._error
            if self._open and time.monotonic() >= self._deadline:
                self.fail(RequestTimeout(self._seconds, self._asked))
                continue
            if self._spoke_at + pause <= time.monotonic():
                self.spoke()
                yield None
                continue
            if not self._events:
                self._wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(self._spoke_at + pause, self._deadline) - time.monotonic()):
                        await self._wake.wait()
                continue
            index, event = self._events.popleft()
            if isinstance(event, Failed):
                self.fail(event.error)
            else:
                yield index, event

    def spoke(self) -> None:
        """Says that the client was told something just now."""
        self._spoke_at = time.monotonic()

    @asynccontextmanager
    async def watching(self, receive: Receive) -> AsyncIterator[None]:
        """Aborts every request as soon as the client goes away, and in any case at the end."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            yield
        finally:
            watcher.cancel()
            self.close()
            await asyncio.wait([watcher])

    def fail(self, error: Exception) -> None:
        """Ends the stream with ``error``; what was queued is dropped. The first error counts."""
        if self._error is None:
            self._error = error
        self._events.clear()
        self.close()
        self._wake.set()

    def close(self) -> None:
        """Aborts what still runs."""
        for index, request_id in self._open.items():
            self._timers[index].cut_off()
            self._engine.abort(request_id)
        self._open.clear()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.fail(ClientDisconnected())

    def _from_engine(self, index: int, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server stops, nobody waits
            self._loop.call_soon_threadsafe(self._push, index, event)

    def _push(self, index: int, event: Event) -> None:
        if index not in self._open:
            return
        if isinstance(event, Delta) and event.finish_reason == "abort":
            event = Failed(RequestAborted("the request was aborted"))
        self._timers[index].saw(event)
        if isinstance(event, (Finished, Failed)):
            del self._open[index]
        elif self._is_behind():
            self.fail(SlowReader())
            return
        self._events.append((index, event))
        self._wake.set()

    def _is_behind(self) -> bool:
        if len(self._events) < self._limit:
            self._full_since = None
            return False
        now = time.monotonic()
        if self._full_since is None:
            self._full_since = now
        return now - self._full_since > self._full_seconds
