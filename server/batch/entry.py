"""From a line to the request in it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..errors import ApiError
from ..validation import parse_json
from .lines import Line

MAX_ID_CHARS = 512


class LineError(Exception):
    """A line that holds no request that could be run.

    Attributes:
        code: Short name of what is wrong.
        param: The field that is wrong, if one is.
        custom_id: The line's own id, as far as it could be read.
    """

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param, self.custom_id = code, param, custom_id


@dataclass(frozen=True, slots=True)
class Entry:
    """A request as a line gives it; its body is not checked yet."""

    custom_id: str
    url: str
    body: dict[str, Any]


def parse_line(line: Line, urls: Collection[str]) -> Entry:
    """The request in ``line``, to one of ``urls``.

    Raises:
        LineError: there is none.
    """
    if line.data is None:
        raise LineError("line_too_long", "The line is longer than a request's body may be (--max-body-bytes).")
    try:
        data = parse_json(line.data, "line")
    except ApiError as error:
        raise LineError("invalid_json", error.message) from None
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise LineError(
            "invalid_custom_id", f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters.", "custom_id"
        )
    if data.get("method") != "POST":
        raise LineError("invalid_method", 'method must be "POST".', "method", custom_id)
    url = data.get("url")
    if not isinstance(url, str) or url not in urls:
        raise LineError("invalid_url", f"url must be {' or '.join(sorted(urls))}.", "url", custom_id)
    body = data.get("body")
    if not isinstance(body, dict):
        raise LineError("invalid_body", "body must be a JSON object.", "body", custom_id)
    return Entry(custom_id, url, body)
