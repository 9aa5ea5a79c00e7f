"""``/v1/files``: inputs that clients bring, and outputs that they fetch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from ..errors import CLIENT_GONE, ApiError
from ..limits import FORM_BYTES, refuse
from ..settings import Settings
from ..state import state_of
from .download import FileDownload
from .objects import file_object, page
from .routes import Id, found, owner_of, service_of
from .service import BatchService
from .store import Order, StoredFile
from .upload import receive_form, too_large

# A body may take read_seconds, and a second more for each of these: the slowest link that is worth its connection.
_BYTES_PER_SECOND = 16 * 2**10

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}

router = APIRouter()


@router.post("/v1/files", openapi_extra=_FORM)
async def upload(request: Request) -> Response:
    service = service_of(request)
    settings = state_of(request).settings
    body = _Body(request, settings)
    try:
        with service.uploading(owner_of(request)):
            return JSONResponse(file_object(await _receive(request, body, service, settings)))
    except ClientDisconnect:
        return Response(status_code=CLIENT_GONE)
    except ApiError as error:
        if body.ended:
            raise
        return _Refusal(error)


async def _receive(request: Request, body: _Body, service: BatchService, settings: Settings) -> StoredFile:
    store = service.store
    path = store.upload_path()
    wanted = room = _most_bytes(request, settings)
    try:
        room = await asyncio.to_thread(store.begin_upload, path, wanted, settings.max_stored_bytes)
        form = await receive_form(request.headers.get("content-type", ""), body.pieces(), path, room)
        if form.filename is None:
            raise ApiError(400, "file: no file came", param="file", code="missing_required_parameter")
        purpose = form.fields.get("purpose")
        if purpose != "batch":
            code = "missing_required_parameter" if purpose is None else "invalid_value"
            raise ApiError(400, 'purpose: it must be "batch"', param="purpose", code=code)
        if "expires_after[seconds]" in form.fields:
            raise ApiError(
                400,
                "expires_after: files are kept until they are deleted",
                param="expires_after",
                code="unsupported_parameter",
            )
        return await asyncio.to_thread(store.add_file, owner_of(request), purpose, form.filename, path)
    except ApiError as error:
        if error.code == "file_too_large" and room < wanted:
            most = settings.max_stored_bytes
            raise ApiError(
                413,
                f"All files together may have {most} bytes (--max-stored-bytes). Delete some, or wait for uploads.",
                code="storage_full",
            ) from None
        raise
    finally:
        await asyncio.to_thread(store.end_upload, path)


def _most_bytes(request: Request, settings: Settings) -> int:
    """Bytes that the file may have: no more than the body, where the client says how long that is."""
    length = request.headers.get("content-length", "")
    return min(settings.max_file_bytes, int(length)) if length.isdecimal() else settings.max_file_bytes


class _Body:
    """A body as it comes.

    Attributes:
        ended: Whether all of it came.
    """

    def __init__(self, request: Request, settings: Settings) -> None:
        self.ended = False
        self._stream = request.stream()
        self._settings = settings

    async def pieces(self) -> AsyncIterator[bytes]:
        """Pieces until the end.

        Raises:
            ApiError: 413, or 408 where it comes too slowly.
            ClientDisconnect: the client left.
        """
        received = 0
        start = asyncio.get_running_loop().time()
        while True:
            until = start + self._settings.read_seconds + received / _BYTES_PER_SECOND
            try:
                async with asyncio.timeout_at(until):
                    piece = await anext(self._stream, None)
            except TimeoutError:
                raise ApiError(408, "The body did not arrive in time.", code="body_timeout") from None
            if piece is None:
                self.ended = True
                return
            received += len(piece)
            if received > self._settings.max_file_bytes + FORM_BYTES:
                raise too_large(self._settings.max_file_bytes)
            if piece:
                yield piece


class _Refusal(Response):
    """An answer to a body that was not read to its end."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(status_code=error.status)
        self._error = error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await refuse(self._error, receive, send)


@router.get("/v1/files")
async def files(
    request: Request,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    after: Id = None,
    order: Order = "desc",
) -> JSONResponse:
    store, owner = service_of(request).store, owner_of(request)

    def look() -> list[StoredFile]:
        start = None if after is None else found(store.file(owner, after), "file", "after")
        return store.files(owner, purpose, start, limit + 1, order)

    return JSONResponse(page([file_object(file) for file in await asyncio.to_thread(look)], limit))


@router.get("/v1/files/{file_id}")
async def file(request: Request, file_id: str) -> JSONResponse:
    return JSONResponse(file_object(await _file(request, file_id)))


@router.get("/v1/files/{file_id}/content")
async def content(request: Request, file_id: str) -> Response:
    file = await _file(request, file_id)
    path = service_of(request).store.file_path(file.id)
    return FileDownload(path, f"{file.id}.jsonl", state_of(request).settings.write_seconds)


@router.delete("/v1/files/{file_id}")
async def delete(request: Request, file_id: str) -> JSONResponse:
    file = await _file(request, file_id)
    user = await asyncio.to_thread(service_of(request).store.remove_file, file)
    if user is not None:
        raise ApiError(400, f"Batch {user.id} still reads this file; cancel it first.", code="file_in_use")
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


async def _file(request: Request, file_id: str) -> StoredFile:
    return found(await asyncio.to_thread(service_of(request).store.file, owner_of(request), file_id), "file")
