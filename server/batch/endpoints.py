"""The paths that a line may ask for. Each line goes the way of an HTTP body to that path, but for the HTTP."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from math import inf
from typing import Any

from .. import routes_chat, routes_completions, routes_responses
from ..errors import ApiError
from ..generation import Generation, collect, submit
from ..metrics import ServerMetrics
from ..state import ServerState
from ..streaming import ResponseStream

# Of a line that asks for none; HTTP requests have 0. A line's own orders the lines, within such a distance.
BATCH_PRIORITY = 2**30
_REACH = 1000

Prepare = Callable[[ServerState, dict[str, Any]], Awaitable[Generation]]

ENDPOINTS: Mapping[str, Prepare] = {
    "/v1/completions": routes_completions.prepare,
    "/v1/chat/completions": routes_chat.prepare,
    "/v1/responses": routes_responses.prepare,
}


async def prepare(state: ServerState, url: str, body: dict[str, Any]) -> Generation:
    """The body of a line, checked and read.

    Raises:
        ApiError: it is refused.
    """
    if body.get("stream"):
        raise ApiError(400, "stream: a batch has no streams", param="stream", code="unsupported_parameter")
    return await ENDPOINTS[url](state, body)


async def answer(state: ServerState, generation: Generation, owner: str, metrics: ServerMetrics) -> dict[str, Any]:
    """The answer to one line, however long it waits where the line sets no ``timeout``.

    Raises:
        EngineError: the engine refused or failed.
        SchemeError: it asks for no scheme, or for a wrong option.
    """
    asked = generation.body.timeout
    stream = ResponseStream(generation.engine, metrics, asked or inf, full_seconds=inf, asked=asked is not None)
    try:
        await submit(stream, generation, state, owner, _priority(generation.body.priority))
        return await collect(stream, generation)
    finally:
        stream.close()


def _priority(asked: int) -> int:
    return BATCH_PRIORITY + max(-_REACH, min(asked, _REACH))
