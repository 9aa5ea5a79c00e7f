"""Bounds on a connection that no ASGI layer can set: headers while they are still being read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError, error_response

_INVALID = ApiError(400, "This is not a valid HTTP/1.1 request.", code="invalid_http")
_LATE = ApiError(408, "The headers did not arrive in time.", code="header_timeout")


def bounded_protocol(
    max_header_bytes: int, body_limit: Callable[[Mapping[str, Any]], int], read_seconds: float
) -> type[HttpToolsProtocol]:
    """uvicorn's httptools protocol, with limits.

    Headers beyond ``max_header_bytes`` get a 431, headers that are not complete after ``read_seconds``
    a 408, and a message whose bytes on the wire (chunk sizes, extensions and trailers counted) go
    beyond what its headers and body could need a 413. These, and what is no HTTP at all, are told in
    the shape of every other error, and end the connection.
    """
    too_large = ApiError(431, f"The headers are larger than {max_header_bytes} bytes.")
    too_long = ApiError(413, "The body is larger than the limit.", code="body_too_large")

    class BoundedProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._in_headers = True
            self._wire_bytes = 0
            self._max_wire_bytes = max_header_bytes
            self._timer: asyncio.TimerHandle | None = None
            self._refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            self._wire_bytes += len(data)
            super().data_received(data)
            if self.transport.is_closing():
                return
            if self._in_headers and self._wire_bytes > max_header_bytes:
                self._refuse(too_large)
            elif self._wire_bytes > self._max_wire_bytes:
                self._refuse(too_long)
            elif self._in_headers and (self.cycle is None or self.cycle.response_complete):
                # Empty lines before a message begin none, but uvicorn's timer for idle connections ends at any byte.
                self._start_timer()

        def send_400_response(self, msg: str) -> None:
            # The parser gives up on a long path before the bytes were counted.
            self._refuse(too_large if self._in_headers and self._wire_bytes > max_header_bytes else _INVALID)

        def _refuse(self, error: ApiError) -> None:
            """Says ``error`` and closes the connection, but never in the middle of another answer."""
            self._refused = True
            cycle = self.cycle
            if cycle is not None and not cycle.response_complete:
                if self._in_headers:  # it was the next message; the answer under way is the last one
                    cycle.keep_alive = False
                    return
                if cycle.response_started:
                    self.transport.abort()
                    return
            self.transport.write(_as_bytes(error))
            self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_headers = True
            self._start_timer()
            # For a peer that stops reading: closing would wait for it.
            self.scope["state"]["abort_connection"] = self.transport.abort

        def on_header(self, name: bytes, value: bytes) -> None:
            # uvicorn takes the trailers of a chunked body for headers: a proxy that checked those never saw them.
            if self._in_headers:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._in_headers = False
            self._stop_timer()
            # A chunk of 1 byte takes 6 on the wire.
            self._max_wire_bytes = max_header_bytes + 6 * body_limit(self.scope)

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._in_headers = True
            self._wire_bytes = 0

        def _start_timer(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(read_seconds, self._late)

        def _late(self) -> None:
            if self._wire_bytes:
                self._refuse(_LATE)
            else:
                self.transport.abort()

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedProtocol


def _as_bytes(error: ApiError) -> bytes:
    """The whole HTTP message for an error that no application answers."""
    response = error_response(error)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [name + b": " + value for name, value in response.raw_headers]
    return b"\r\n".join([*lines, b"connection: close", b"", bytes(response.body)])
