"""One request for generation from its checked body to its answer, streamed or in one piece."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from .answers import Answer, Choice, progress_body, usage_body
from .engine_protocol import EngineLike
from .keys import OWNER
from .request import Delta, Finished, Progress, Usage
from .schemas import GenerationBody
from .sse import PING_SECONDS, EventStream
from .state import state_of
from .streaming import ClientDisconnected, ResponseStream

_CLIENT_GONE = 499  # nginx's word for it; nobody reads it


async def respond(
    request: Request, engine: EngineLike, body: GenerationBody, prompts: list[list[int]], answer: Answer
) -> Response:
    """Runs ``prompts`` and writes what comes through ``answer``.

    Raises:
        EngineError: the engine refused, or failed before an answer in one piece was complete.
        SchemeError: ``body.attention`` names no scheme or a wrong option.
    """
    state = state_of(request)
    scheme = await state.text.run(engine.build_scheme, body.attention)
    limits = state.settings
    stream = ResponseStream(engine, state.metrics, limits.request_seconds, limits.write_seconds)
    # Owners of different keys never share prefix pages, or the time to the first token would tell on them.
    stream.submit(prompts, body.sampling(), scheme, f"{request.scope.get(OWNER, '')}/{body.cache_salt}")
    if body.stream:
        return EventStream(stream, _stream(stream, body, prompts, answer), limits.write_seconds)
    try:
        async with stream.watching(request.receive):
            return JSONResponse(await _collect(stream, body, len(prompts), answer))
    except ClientDisconnected:
        return Response(status_code=_CLIENT_GONE)


async def _collect(stream: ResponseStream, body: GenerationBody, prompts: int, answer: Answer) -> dict[str, Any]:
    choices = [Choice(index) for index in range(prompts * body.n)]
    usages: list[Usage] = []
    async for item in stream.events(PING_SECONDS):
        match item:
            case (prompt, Delta() as delta):
                choices[prompt * body.n + delta.index].add(delta)
            case (_, Finished(usage)):
                usages.append(usage)
    return {**answer.whole(choices), "usage": usage_body(usages)}


async def _stream(
    stream: ResponseStream, body: GenerationBody, prompts: list[list[int]], answer: Answer
) -> AsyncIterator[dict[str, Any] | None]:
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    no_usage = {"usage": None} if wants_usage else {}
    total = sum(map(len, prompts))
    latest: dict[int, Progress] = {}
    usages: list[Usage] = []
    async for item in stream.events(PING_SECONDS):
        match item:
            case None:
                yield None
            case (prompt, Progress() as progress):
                latest[prompt] = progress
                if body.return_progress:
                    yield {
                        **answer.bare_chunk(),
                        "prompt_progress": progress_body(latest.values(), total),
                        **no_usage,
                    }
            case (prompt, Delta() as delta):
                for chunk in answer.chunks(prompt * body.n + delta.index, delta):
                    yield chunk | no_usage
            case (_, Finished(usage)):
                usages.append(usage)
    if wants_usage:
        yield {**answer.bare_chunk(), "usage": usage_body(usages)}
