"""What a request must satisfy before the application sees it: host, origin, key, size, encoding, speed.

A plain ASGI layer outside the application, since limits must hold while a body is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response
from .keys import ADMIN, OWNER, KeyRing, unauthorized
from .names import OWN_NAMES, host_in, is_address, is_loopback
from .settings import Settings

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
LINGER_SECONDS = 2.0
FORM_BYTES = 2**20  # what a form may take beside the file in it
_TIMEOUT = 408
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_MAX_LENGTH_DIGITS = 18  # Python refuses to read numbers of thousands of digits


class Limits:
    """Wraps ``app``; every refusal closes the connection, since the body was not read to its end."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: KeyRing) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        origins = settings.cors_origin
        self._any_host = not is_loopback(settings.host) or "*" in origins
        self._hosts = frozenset(host_in(origin.partition("://")[2]) for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        try:
            self._check_headers(scope, headers)
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_key(scope, headers)
            if is_upload(scope, self._settings):
                await self._app(scope, receive, send)
                return
            body = await self._read(headers, receive)
        except ApiError as error:
            await refuse(error, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _check_headers(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size > self._settings.max_header_bytes:
            raise ApiError(431, f"The headers are larger than {self._settings.max_header_bytes} bytes.")
        if sum(name == b"host" for name, _ in headers) > 1:
            raise ApiError(400, "There is more than one Host header.", code="invalid_http")
        for name, value in headers:
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise ApiError(415, "Send the body as it is, without Content-Encoding.", code="unsupported_encoding")
            if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
                raise ApiError(400, "The only Transfer-Encoding is chunked.", code="unsupported_encoding")
            if name == b"content-length" and value.isdigit():
                digits = value.lstrip(b"0")
                if len(digits) > _MAX_LENGTH_DIGITS or int(digits or b"0") > body_limit(scope, self._settings):
                    raise self._too_large(body_limit(scope, self._settings))

    def _check_host(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuses pages whose own name points to this machine ("DNS rebinding").

        A browser takes the server for such a page's own, so the page reads every answer, and no origin tells it from
        ours. Only its name does, which a browser always sends. A name can be made to point here, an address cannot.
        """
        if self._any_host or self._keys.locked:
            return
        for name, value in headers:
            if name == b"host" and not self._knows(host_in(value.decode("latin-1"))):
                raise ApiError(
                    403,
                    "Without API keys this server is asked as localhost, or by its address. Where clients know it by "
                    "another name, start it with API keys, or with --cors-origin and the origin that has the name.",
                    type="permission_error",
                    code="host_refused",
                )

    def _knows(self, host: str) -> bool:
        return host in OWN_NAMES or host.endswith(".localhost") or is_address(host) or host in self._hosts

    def _check_origin(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        """Refuses what a page of another origin sends: a browser sends a form anywhere without asking there first."""
        allowed = self._settings.cors_origin
        if scope["method"] in _SAFE_METHODS or "*" in allowed:
            return
        for name, value in headers:
            if name == b"origin" and value.decode("latin-1") not in (*allowed, _own_origin(scope, headers)):
                raise ApiError(
                    403,
                    "A page of this origin may not call the server. Start it with --cors-origin to let the page in.",
                    type="permission_error",
                    code="origin_refused",
                )

    def _check_key(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> None:
        """Every path but ``OPEN_PATHS`` needs a key, unknown paths too."""
        if scope["path"] in OPEN_PATHS:
            return
        caller = self._keys.caller(next((value for name, value in headers if name == b"authorization"), b""))
        if self._keys.locked and not caller.owner:
            raise unauthorized()
        scope[OWNER], scope[ADMIN] = caller.owner, caller.admin

    async def _read(self, headers: list[tuple[bytes, bytes]], receive: Receive) -> bytes | None:
        """The whole body, or ``None`` when the client left before its end."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._settings.max_body_bytes:
                        raise self._too_large(self._settings.max_body_bytes)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(_TIMEOUT, "The body did not arrive in time.", code="body_timeout") from None

    def _too_large(self, limit: int) -> ApiError:
        return ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")


def _own_origin(scope: Scope, headers: list[tuple[bytes, bytes]]) -> str:
    """Where the client sees this server."""
    host = next((value for name, value in headers if name == b"host"), b"")
    return f"{scope.get('scheme', 'http')}://{host.decode('latin-1')}"


def is_upload(scope: Mapping[str, Any], settings: Settings) -> bool:
    """Whether a body goes to the disk as it comes; its route holds it to its limits."""
    return settings.batch_dir is not None and scope["method"] == "POST" and scope["path"] == "/v1/files"


def body_limit(scope: Mapping[str, Any], settings: Settings) -> int:
    """Bytes that a body may have."""
    return settings.max_file_bytes + FORM_BYTES if is_upload(scope, settings) else settings.max_body_bytes


async def refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answers at once and closes, but lets a client that is still sending come to an end and read the answer."""
    response = error_response(error)
    response.headers["connection"] = "close"
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    with suppress(TimeoutError):
        async with asyncio.timeout(0 if error.status == _TIMEOUT else LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the read body once, then whatever comes after it (a disconnect)."""
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
