"""Server-sent events: framing, keep-alive, errors inside a stream."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, error_body
from .exceptions import EngineError
from .streaming import ClientDisconnected, ResponseStream

PING_SECONDS = 10.0
PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

_log = logging.getLogger(__name__)


def frame(payload: Mapping[str, Any]) -> bytes:
    """One event on one line. ASCII only, since some clients split lines at U+2028 and the like too."""
    return b"data: " + json.dumps(payload, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n\n"


class EventStream(Response):
    """Sends ``payloads`` as events; ``None`` among them is a keep-alive comment.

    Ends with ``data: [DONE]``, after an error too. A client that does not read for
    ``write_seconds`` is cut off.
    """

    media_type = "text/event-stream"
    end = DONE

    def __init__(
        self, stream: ResponseStream, payloads: AsyncIterator[Mapping[str, Any] | None], write_seconds: float
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._stream = stream
        self._payloads = payloads
        self._write_seconds = write_seconds

    def framed(self, payload: Mapping[str, Any]) -> bytes:
        return frame(payload)

    def failed(self, error: Exception) -> bytes:
        """What is sent in place of the rest."""
        return frame(error_body(error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._write_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": more})
            self._stream.spoke()

        async with self._stream.watching(receive):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for payload in self._payloads:
                        await write(PING if payload is None else self.framed(payload))
                except (ApiError, EngineError) as error:
                    await write(self.failed(error))
                await write(self.end, more=False)
            except (ClientDisconnected, OSError):
                # TimeoutError is an OSError: a peer that reads nothing would hold its buffers for ever.
                if abort := scope.get("state", {}).get("abort_connection"):
                    abort()
            except Exception as error:
                _log.exception("a stream failed")
                await write(self.failed(error) + self.end, more=False)
