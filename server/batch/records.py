"""What a batch writes for each line: OpenAI's record, as one line of ASCII JSON."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from typing import Any

from ..errors import error_body, to_api_error
from ..json_text import json_text
from .entry import LineError

RECORD_HEAD = b'{"id":"batch_req_'  # every record begins so


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one line.

    Attributes:
        number: The line's.
        custom_id: The id that this line has used up; ``None`` where it is no line's, or an earlier line's.
        data: The record as it is written: one line, its end included.
        failed: Whether it is an error record.
    """

    number: int
    custom_id: str | None
    data: bytes
    failed: bool

    @property
    def key(self) -> bytes | None:
        """The id in 16 bytes, for an index of bounded width."""
        return None if self.custom_id is None else id_key(self.custom_id)


def id_key(custom_id: str) -> bytes:
    return hashlib.sha256(custom_id.encode()).digest()[:16]


def answered(number: int, custom_id: str, body: dict[str, Any]) -> Result:
    """The model answered. To be called in a thread: the body may be large."""
    return Result(number, custom_id, _record(custom_id, _response(200, body), None), failed=False)


def refused(number: int, custom_id: str, error: Exception) -> Result:
    """The request was one, but was refused or failed: what an HTTP client would have been told."""
    response = _response(to_api_error(error).status, error_body(error))
    return Result(number, custom_id, _record(custom_id, response, None), failed=True)


def unreadable(number: int, error: LineError) -> Result:
    """There was no request to run."""
    told = {"code": error.code, "message": str(error), "param": error.param, "line": number}
    return Result(number, error.custom_id, _record(error.custom_id, None, told), failed=True)


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": str(uuid.uuid4()), "body": body}


def _record(custom_id: str | None, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    record = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}
    # ASCII, since some readers split lines at U+2028 and the like too.
    return json_text(record, ascii_only=True) + b"\n"
