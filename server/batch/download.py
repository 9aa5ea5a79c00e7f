"""A stored file on its way to a client."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import ApiError, error_response

_PIECE_BYTES = 256 * 2**10


class FileDownload(Response):
    """Sends a file piece by piece until its client leaves. One that does not read for ``write_seconds`` is cut off."""

    media_type = "application/jsonl"

    def __init__(self, path: Path, name: str, write_seconds: float) -> None:
        super().__init__(headers={"content-disposition": f'attachment; filename="{name}"'})
        self._path = path
        self._write_seconds = write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            file = await asyncio.to_thread(self._path.open, "rb")
        except FileNotFoundError:  # deleted a moment ago
            await error_response(ApiError(404, "There is no such file.", code="file_not_found"))(scope, receive, send)
            return
        with file:
            size = (await asyncio.to_thread(self._path.stat)).st_size
            self.headers["content-length"] = str(size)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            gone = asyncio.create_task(_leaving(receive))  # sending would not tell: what comes too late is dropped
            try:
                while size > 0 and (piece := await asyncio.to_thread(file.read, min(size, _PIECE_BYTES))):
                    if gone.done():
                        return
                    size -= len(piece)
                    async with asyncio.timeout(self._write_seconds):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except OSError:  # TimeoutError is one
                if abort := scope.get("state", {}).get("abort_connection"):
                    abort()
            finally:
                gone.cancel()
                await asyncio.wait([gone])


async def _leaving(receive: Receive) -> None:
    """Ends when the client leaves, or cannot be heard any more."""
    with suppress(OSError):
        while (await receive())["type"] != "http.disconnect":
            pass
