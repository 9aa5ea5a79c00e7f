"""One request for generation from its checked body to its answer, streamed or in one piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from .answers import Answer, Choice, progress_body, usage_body
from .engine_protocol import EngineLike
from .errors import CLIENT_GONE
from .grammar.matcher import Grammar
from .json_text import json_text
from .keys import OWNER
from .request import Delta, Finished, Progress, PromptLogprobs, SamplingParams, Usage
from .schemas import GenerationBody
from .sse import PING_SECONDS, EventStream
from .state import ServerState, state_of
from .streaming import ClientDisconnected, ResponseStream


@dataclass(frozen=True, slots=True)
class Generation:
    """A request whose body was checked and whose prompts are token ids: everything but who waits for it.

    Attributes:
        engine: Runs it.
        body: As it was checked.
        prompts: Token ids, one list per prompt.
        answer: Writes what the engine says.
        usage: Writes what it cost.
        grammar: What each choice must look like.
        visible_ids: Special tokens that ``answer`` reads in the text.
    """

    engine: EngineLike
    body: GenerationBody
    prompts: list[list[int]]
    answer: Answer
    usage: Callable[[list[Usage]], dict[str, Any]] = usage_body
    grammar: Grammar | None = None
    visible_ids: tuple[int, ...] = ()

    def sampling(self) -> SamplingParams:
        """How the engine is to draw."""
        return replace(self.body.sampling(), grammar=self.grammar, visible_ids=self.visible_ids)


async def respond(request: Request, generation: Generation) -> Response:
    """Runs ``generation`` for the client of ``request``.

    Raises:
        EngineError: the engine refused, or failed before an answer in one piece was complete.
        SchemeError: ``body.attention`` names no scheme or a wrong option.
    """
    stream, body = await opened(request, generation), generation.body
    if body.stream:
        payloads = _stream(stream, body, generation.prompts, generation.answer)
        return EventStream(stream, payloads, state_of(request).settings.write_seconds)
    return await in_one_piece(request, stream, generation)


async def opened(request: Request, generation: Generation) -> ResponseStream:
    """The events of ``generation``, which runs from now on."""
    state, body = state_of(request), generation.body
    limits = state.settings
    asked = body.timeout is not None and body.timeout < limits.request_timeout
    seconds = body.timeout if asked and body.timeout is not None else limits.request_timeout
    stream = ResponseStream(generation.engine, state.metrics, seconds, limits.write_seconds, asked)
    await submit(stream, generation, state, request.scope.get(OWNER, ""))
    return stream


async def in_one_piece(request: Request, stream: ResponseStream, generation: Generation) -> Response:
    """The whole answer, unless the client leaves before."""
    try:
        async with stream.watching(request.receive):
            return await _rendered(await collect(stream, generation), generation.body)
    except ClientDisconnected:
        return Response(status_code=CLIENT_GONE)


async def submit(
    stream: ResponseStream, generation: Generation, state: ServerState, owner: str, priority: int | None = None
) -> None:
    """Gives the prompts of ``generation`` to the engine, for the holder of the key ``owner``.

    ``priority`` stands for the one that the body asks for.

    Raises:
        EngineError: the engine refused.
        SchemeError: ``body.attention`` names no scheme or a wrong option.
    """
    body = generation.body
    scheme = await state.text.run(generation.engine.build_scheme, body.attention)
    # Owners of different keys never share prefix pages, or the time to the first token would tell on them.
    salt = f"{owner}/{body.cache_salt}" if body.cache_prompt else None
    stream.submit(
        generation.prompts, generation.sampling(), scheme, salt, body.priority if priority is None else priority
    )


async def collect(stream: ResponseStream, generation: Generation) -> dict[str, Any]:
    """The answer in one piece, when everything has come.

    Raises:
        Exception: whatever ended a prompt before its end.
    """
    body = generation.body
    choices = [Choice(index) for index in range(len(generation.prompts) * body.n)]
    usages: list[Usage] = []
    async for item in stream.events(PING_SECONDS):
        match item:
            case (prompt, PromptLogprobs(entries)):
                generation.answer.scored(prompt, entries)
            case (prompt, Delta() as delta):
                choices[prompt * body.n + delta.index].deltas.append(delta)
            case (_, Finished(usage)):
                usages.append(usage)
    write = generation.answer.whole
    whole = await asyncio.to_thread(write, choices) if _may_be_large(body) else write(choices)
    return {**whole, "usage": generation.usage(usages)}


async def _rendered(whole: dict[str, Any], body: GenerationBody) -> Response:
    """The answer as JSON."""
    if not _may_be_large(body):
        return JSONResponse(whole)
    return Response(await asyncio.to_thread(json_text, whole), media_type="application/json")


def _may_be_large(body: GenerationBody) -> bool:
    """Whether an answer in one piece holds log-probabilities, of its tokens or of the prompt's."""
    return body.prompt_alternatives is not None or body.alternatives is not None


async def _chunks(answer: Answer, choice: int, delta: Delta, body: GenerationBody) -> Iterable[dict[str, Any]]:
    """The pieces for one delta, written in a thread where the first holds log-probabilities of a whole prompt."""
    if body.prompt_alternatives is None:
        return answer.chunks(choice, delta)
    return await asyncio.to_thread(lambda: list(answer.chunks(choice, delta)))


async def _stream(
    stream: ResponseStream, body: GenerationBody, prompts: list[list[int]], answer: Answer
) -> AsyncIterator[dict[str, Any] | None]:
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    no_usage = {"usage": None} if wants_usage else {}
    total = sum(map(len, prompts))
    latest: dict[int, Progress] = {}
    usages: list[Usage] = []
    async for item in stream.events(body.sse_ping_interval or PING_SECONDS):
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
            case (prompt, PromptLogprobs(entries)):
                answer.scored(prompt, entries)
            case (prompt, Delta() as delta):
                for chunk in await _chunks(answer, prompt * body.n + delta.index, delta, body):
                    yield chunk | no_usage
            case (_, Finished(usage)):
                usages.append(usage)
    if wants_usage:
        yield {**answer.bare_chunk(), "usage": usage_body(usages)}
