"""How errors reach a client: one table, one body shape, for plain answers and for streams.

The body is OpenAI's: ``{"error": {"message", "type", "param", "code"}}``. A client sees our own
words only; the text of an unexpected exception stays in the log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from foveate.sparse_attn.errors import CalibrationMissing, SchemeError, UnknownScheme

from . import exceptions as engine_errors

CLIENT_GONE = 499  # nginx's word for a client that left before it was answered; nobody reads it


class ApiError(Exception):
    """A refusal by the HTTP layer itself, complete with what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.headers = param, code, dict(headers or {})


@dataclass(frozen=True, slots=True)
class _Row:
    """What a client is told; ``message=None`` is the error's own text, written for callers."""

    status: int
    type: str
    code: str
    message: str | None = None
    param: str | None = None
    headers: tuple[tuple[str, str], ...] = ()


_BAD = "invalid_request_error"
_OURS = "server_error"
_RETRY = (("retry-after", "1"),)

# The first row whose class matches counts, so a class stands before its base.
_TABLE: tuple[tuple[type[Exception], _Row], ...] = (
    (engine_errors.ContextOverflow, _Row(400, _BAD, "context_length_exceeded")),
    (engine_errors.PoolTooSmall, _Row(400, _BAD, "kv_cache_too_small")),
    (engine_errors.RequestRefused, _Row(400, _BAD, "invalid_value")),
    (engine_errors.QueueFull, _Row(429, "rate_limit_error", "queue_full")),
    (
        engine_errors.EngineDead,
        _Row(503, "service_unavailable", "engine_stopped", "The engine takes no requests.", None, _RETRY),
    ),
    (engine_errors.RequestAborted, _Row(503, _OURS, "aborted", "The request was cut off.")),
    (engine_errors.BadLogits, _Row(500, _OURS, "bad_logits", "The model gave values that are not finite.")),
    (engine_errors.NoTokenLeft, _Row(400, _BAD, "no_token_left")),
    (engine_errors.RequestFailed, _Row(500, _OURS, "request_failed", "The server failed at this request.")),
    (engine_errors.StepFailed, _Row(500, _OURS, "step_failed", "Computing this request failed.")),
    (UnknownScheme, _Row(400, _BAD, "unknown_scheme", None, "attention")),
    (CalibrationMissing, _Row(400, _BAD, "calibration_missing", None, "attention")),
    (SchemeError, _Row(400, _BAD, "invalid_scheme_option", None, "attention")),
    (Exception, _Row(500, _OURS, "internal_error", "The server failed at this request.")),
)
_HTTP_WORDS = {
    404: ("There is nothing at this path.", "not_found"),
    405: ("This path does not take this method.", "method_not_allowed"),
}
_SHOWN_CHARS = 64


def to_api_error(error: Exception) -> ApiError:
    """What a client is told about ``error``."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        message, code = _HTTP_WORDS.get(error.status_code, ("The request was refused.", "refused"))
        return ApiError(error.status_code, message, code=code, headers=error.headers)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return invalid(first, first["loc"][1:])  # its first part says where in the request: in the query
    row = next(row for cls, row in _TABLE if isinstance(error, cls))
    headers = dict(row.headers)
    if isinstance(error, engine_errors.QueueFull):
        headers["retry-after"] = str(math.ceil(error.retry_seconds))
    return ApiError(
        row.status,
        str(error) if row.message is None else row.message,
        type=row.type,
        param=getattr(error, "param", None) if isinstance(error, engine_errors.InvalidRequest) else row.param,
        code=row.code,
        headers=headers,
    )


def invalid(found: Mapping[str, Any], location: Sequence[str | int]) -> ApiError:
    """The refusal of one value.

    Args:
        found: What pydantic found wrong, one of its ``errors()``.
        location: Where the value stands; ``param`` names it.
    """
    param = _path(location)
    message = str(found["ctx"]["error"]) if found["type"] == "value_error" else found["msg"]
    code = "missing_required_parameter" if found["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None, code=code)


def _path(location: Sequence[str | int]) -> str:
    """``("messages", 0, "content")`` as ``messages[0].content``."""
    path = ""
    for part in location:
        # A key may be the client's own, and as long as the body.
        path += f"[{part}]" if isinstance(part, int) else f".{part[:_SHOWN_CHARS]}" if path else part[:_SHOWN_CHARS]
    return path


def error_body(error: Exception) -> dict[str, Any]:
    """The JSON body for ``error``, in a plain answer or as one event of a stream."""
    told = to_api_error(error)
    return {"error": {"message": told.message, "type": told.type, "param": told.param, "code": told.code}}


def error_response(error: Exception) -> JSONResponse:
    told = to_api_error(error)
    return JSONResponse(error_body(told), status_code=told.status, headers=told.headers)


def methods_of(app: FastAPI, path: str) -> set[str]:
    """What may be asked of ``path``; HEAD wherever there is GET. Empty for a path that nothing describes."""
    methods: set[str] = set()
    for template, operations in app.openapi()["paths"].items():
        if compile_path(template)[0].match(path):
            methods |= {method.upper() for method in operations}
    return methods | ({"HEAD"} if "GET" in methods else set())


def install_handlers(app: FastAPI) -> None:
    """Routes every exception of ``app`` through the table."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error)
        if response.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # The router knows the methods of the first route that has the path, and there may be others.
            methods = methods_of(app, request.scope["path"])
            response.headers["allow"] = ", ".join(sorted(methods)) or response.headers.get("allow", "")
        return response

    for cls in (ApiError, engine_errors.EngineError, SchemeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(cls, handle)
