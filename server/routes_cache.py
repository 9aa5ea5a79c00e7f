"""What an administrator may see and remove of the document cache."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from .errors import ApiError
from .keys import require_admin
from .state import state_of

if TYPE_CHECKING:  # it imports the libraries of models
    from .document_cache import DocumentCache

router = APIRouter()

MOST_ENTRIES = 1000
_ID = re.compile(r"[0-9a-f]{32}")


@router.get("/v1/cache")
async def list_entries(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MOST_ENTRIES)] = 100,
    after: Annotated[str, Query(max_length=64)] = "",
) -> JSONResponse:
    """Documents, the latest used first: sizes and times, nothing of their contents."""
    documents = _documents(request)
    return JSONResponse(await asyncio.to_thread(documents.describe, limit, after))


@router.delete("/v1/cache")
async def delete_all(request: Request) -> JSONResponse:
    gone = await _delete(_documents(request), None)
    return JSONResponse({"object": "list", "deleted": True, "count": len(gone)})


@router.delete("/v1/cache/{id}")
async def delete_one(request: Request, id: str) -> JSONResponse:
    documents = _documents(request)
    if not _ID.fullmatch(id):
        raise _unknown()
    try:
        await _delete(documents, id)
    except KeyError:
        raise _unknown() from None
    return JSONResponse({"id": id, "object": "cache.entry", "deleted": True})


def _documents(request: Request) -> DocumentCache:
    """
    Raises:
        ApiError: 401 or 403 without an admin key, 503 while no model is served, 404 where nothing is kept on disk.
    """
    require_admin(request)
    documents = state_of(request).served().engine.documents
    if documents is None:
        raise ApiError(404, "No document cache is kept here: start the server with --cache-dir.", code="cache_disabled")
    return documents


async def _delete(documents: DocumentCache, id: str | None) -> list[str]:
    try:
        return await asyncio.to_thread(documents.delete, id)
    except TimeoutError:
        raise ApiError(503, "The disk takes too long; ask again.", type="server_error", code="cache_busy") from None
    except OSError:
        message = "The disk does not let go of all files; what is left is still listed."
        raise ApiError(503, message, type="server_error", code="cache_not_removed") from None


def _unknown() -> ApiError:
    return ApiError(404, "There is no such entry in the cache.", param="id", code="cache_entry_not_found")
