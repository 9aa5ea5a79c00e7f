"""``/v1/batches``: one request for many."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import Field, field_validator

from ..errors import ApiError
from ..openapi import body_schema
from ..schemas_labels import Metadata
from ..validation import Body, read_body
from .endpoints import ENDPOINTS
from .objects import batch_object, page
from .routes import MAX_ID_CHARS, Id, found, owner_of, service_of
from .store import StoredBatch

MAX_OPEN_BATCHES = 100  # of one key

router = APIRouter()


class BatchBody(Body):
    """``POST /v1/batches``."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "output_expires_after": ((), "files are kept until they are deleted"),
    }

    input_file_id: str = Field(max_length=MAX_ID_CHARS)
    endpoint: str = Field(json_schema_extra={"enum": [*sorted(ENDPOINTS)]})
    completion_window: str = Field(pattern=r"^[1-9][0-9]{0,3}[hd]$")
    metadata: Metadata | None = None

    @field_validator("endpoint")
    @classmethod
    def _is_served(cls, value: str) -> str:
        if value not in ENDPOINTS:
            raise ValueError(f"it must be {' or '.join(sorted(ENDPOINTS))}")
        return value


@router.post("/v1/batches", openapi_extra=body_schema(BatchBody))
async def create(request: Request) -> JSONResponse:
    service, owner = service_of(request), owner_of(request)
    body = await read_body(request, BatchBody)

    def add() -> StoredBatch:
        store = service.store
        file = found(store.file(owner, body.input_file_id), "file", "input_file_id")
        if file.purpose != "batch":
            raise ApiError(
                400, "input_file_id: this file's purpose is not batch", param="input_file_id", code="invalid_value"
            )
        if len(store.open_batches(owner)) >= MAX_OPEN_BATCHES:
            raise ApiError(
                429,
                f"{MAX_OPEN_BATCHES} batches wait or run already.",
                type="rate_limit_error",
                code="too_many_batches",
                headers={"retry-after": "60"},
            )
        made = store.add_batch(owner, body.endpoint, body.completion_window, file, body.metadata)
        return found(made, "file", "input_file_id")

    made = await asyncio.to_thread(add)
    service.wake()
    return JSONResponse(batch_object(service, made))


@router.get("/v1/batches")
async def batches(request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: Id = None) -> JSONResponse:
    service, owner = service_of(request), owner_of(request)

    def look() -> list[dict[str, Any]]:
        start = None if after is None else found(service.store.batch(owner, after), "batch", "after")
        return [batch_object(service, item) for item in service.store.batches(owner, start, limit + 1)]

    return JSONResponse(page(await asyncio.to_thread(look), limit))


@router.get("/v1/batches/{batch_id}")
async def batch(request: Request, batch_id: str) -> JSONResponse:
    return await _told(request, batch_id)


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel(request: Request, batch_id: str) -> JSONResponse:
    service = service_of(request)
    store = service.store
    item = found(await asyncio.to_thread(store.batch, owner_of(request), batch_id), "batch")
    ended = ("failed", "completed", "cancelled", "cancelling", "finalizing")
    if await asyncio.to_thread(store.advance, item.id, "cancelling", ended):
        service.cancel(item)
    item = found(await asyncio.to_thread(store.batch, owner_of(request), batch_id), "batch")
    if item.status not in ("cancelling", "cancelled"):
        raise ApiError(400, f"A batch that is {item.status} cannot be cancelled.", code="invalid_value")
    return JSONResponse(await asyncio.to_thread(batch_object, service, item))


async def _told(request: Request, batch_id: str) -> JSONResponse:
    service = service_of(request)

    def look() -> dict[str, Any]:
        return batch_object(service, found(service.store.batch(owner_of(request), batch_id), "batch"))

    return JSONResponse(await asyncio.to_thread(look))
