"""What the routes of files and of batches share."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import Query, Request

from ..errors import ApiError
from ..keys import OWNER
from .service import BatchService

MAX_ID_CHARS = 64
Id = Annotated[str | None, Query(max_length=MAX_ID_CHARS)]
T = TypeVar("T")


def service_of(request: Request) -> BatchService:
    """The server's batches.

    Raises:
        ApiError: 400, it has none.
    """
    service: BatchService | None = request.app.state.batches
    if service is None:
        raise ApiError(
            400, "This server keeps no files. Start it with --batch-dir DIRECTORY.", code="batch_dir_missing"
        )
    return service


def owner_of(request: Request) -> str:
    owner: str = request.scope.get(OWNER, "")
    return owner


def found(item: T | None, kind: str, param: str | None = None) -> T:
    """``item``, if there is one.

    Raises:
        ApiError: 404.
    """
    if item is None:
        raise ApiError(404, f"There is no such {kind}.", param=param, code=f"{kind}_not_found")
    return item
