"""What is done for every HTTP request, whatever comes of it: id, count, line in the log, trace, last resort for errors.

A plain ASGI layer around ``Limits``, so that refusals are seen too.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .current_request import CURRENT, CurrentRequest
from .errors import CLIENT_GONE, error_response
from .limits import OPEN_PATHS
from .logs import FIELDS
from .metrics import ServerMetrics
from .tracing import Tracing

MAX_LABEL_BYTES = 128
_MAX_PATH = 256

_log = logging.getLogger(__name__)


class Access:
    """Wraps ``app``. The body and the query of a request are never logged, its headers neither."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        current = CurrentRequest(_label(scope["headers"]))
        began, status = time.monotonic(), 0
        if self._tracing is not None and scope["path"] not in OPEN_PATHS:
            current.trace = self._tracing.begin(scope["method"], scope["headers"])

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                label = (b"x-request-id", current.label.encode())
                message = {**message, "headers": [*message.get("headers", ()), label]}
                if status >= 400:
                    self._metrics.rejected.labels(str(status)).inc()
            await send(message)

        before = CURRENT.set(current)
        try:
            await self._app(scope, receive, labelled)
        except Exception as error:
            if status:
                raise  # nothing can be said any more: the connection ends
            _log.exception("a request failed")
            await error_response(error)(scope, receive, labelled)
        finally:
            self._tell(scope, current, status or CLIENT_GONE, time.monotonic() - began)
            CURRENT.reset(before)

    def _tell(self, scope: Scope, current: CurrentRequest, status: int, seconds: float) -> None:
        # Probes come every few seconds, and what they find is in the metrics.
        level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.WARNING if status >= 500 else logging.INFO
        # As it was sent: decoded, a path may hold line ends.
        path = (scope.get("raw_path") or scope["path"].encode()).decode("ascii", "backslashreplace")
        path = path.partition("?")[0][:_MAX_PATH]
        fields = {"status": status, "duration_ms": round(seconds * 1000, 1), **current.fields}
        _log.log(level, "%s %s", scope["method"], path, extra={FIELDS: fields})
        # The route as it is written in the code: a label of what clients send would never stop growing.
        route = getattr(scope.get("route"), "path", None)
        self._metrics.http.labels(route or "none", str(status)).inc()
        if current.trace is not None:
            current.trace.end(status, route, current.label)


def _label(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id if it is fit to be shown, else a new one. It names nothing inside the server."""
    given = next((value for name, value in headers if name.lower() == b"x-request-id"), b"")
    fit = 0 < len(given) <= MAX_LABEL_BYTES and all(0x20 <= byte < 0x7F for byte in given)
    return given.decode("ascii") if fit else str(uuid.uuid4())
