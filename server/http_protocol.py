"""Bounds on a connection that no ASGI layer can set: headers while they are still being read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bounded_protocol(
    max_header_bytes: int, body_limit: Callable[[Scope], int], read_seconds: float
) -> type[HttpToolsProtocol]:
    """uvicorn's httptools protocol, with limits.

    Headers beyond ``max_header_bytes`` get a 431, headers that are not complete after ``read_seconds``
    end the connection, and so does a message whose bytes on the wire (chunk sizes, extensions and
    trailers counted) go beyond what its headers and body could need.
    """

    class BoundedProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._in_headers = True
            self._wire_bytes = 0
            self._max_wire_bytes = max_header_bytes
            self._timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self._wire_bytes += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self._in_headers and self._wire_bytes > max_header_bytes:
                self.transport.write(_TOO_LARGE)
                self.transport.close()
            elif self._wire_bytes > self._max_wire_bytes:
                self.transport.abort()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_headers = True
            self._start_timer()
            # For a peer that stops reading: closing would wait for it.
            self.scope["state"]["abort_connection"] = self.transport.abort

        def on_headers_complete(self) -> None:
            self._in_headers = False
            self._stop_timer()
            super().on_headers_complete()
            # A chunk of 1 byte takes 6 on the wire.
            self._max_wire_bytes = max_header_bytes + 6 * body_limit(self.scope)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_headers = True
            self._wire_bytes = 0

        def _start_timer(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(read_seconds, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedProtocol
