"""``POST /v1/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answers import FINGERPRINT, Choice, completion_logprobs
from .generation import Generation, respond
from .openapi import body_schema
from .prompts import Prompt, completion_prompts
from .request import Delta
from .schemas import CompletionBody
from .state import Served, ServerState, state_of
from .validation import parse_request, validate

router = APIRouter()


@router.post("/v1/completions", openapi_extra=body_schema(CompletionBody))
async def completions(request: Request) -> Response:
    state = state_of(request)
    state.served()
    return await respond(request, await prepare(state, await parse_request(request)))


async def prepare(state: ServerState, data: dict[str, Any]) -> Generation:
    """The JSON body ``data`` of a completion, checked and read.

    Raises:
        ApiError: 400, 404 for another model, 503 while no request is taken.
    """
    body = validate(CompletionBody, data)
    served = state.served_as(body.model)
    prompts = await completion_prompts(body, served.engine, state.text, state.settings.max_sequences)
    answer = CompletionAnswer(served, body, prompts)
    return Generation(served.engine, body, [prompt.token_ids for prompt in prompts], answer)


class CompletionAnswer:
    """Writes OpenAI's ``text_completion`` objects; a stream has the same shape as the whole."""

    def __init__(self, served: Served, body: CompletionBody, prompts: list[Prompt]) -> None:
        self._tokens = served.tokens
        self._with_logprobs = body.logprobs is not None
        self._echo = [""] * len(prompts) * body.n
        if body.echo:
            self._echo = [prompt.text for prompt in prompts for _ in range(body.n)]
        self._pending_echo = dict(enumerate(self._echo))
        self._offsets = [0] * len(self._echo)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.engine.model_name,
            "system_fingerprint": FINGERPRINT,
        }

    def chunks(self, choice: int, delta: Delta) -> Iterator[dict[str, Any]]:
        text = self._pending_echo.pop(choice, "") + delta.text
        if not (text or delta.logprobs or delta.finish_reason):
            return
        logprobs = None
        if self._with_logprobs:
            logprobs = completion_logprobs(delta.logprobs or (), self._tokens, self._offsets[choice])
            self._offsets[choice] += sum(map(len, logprobs["tokens"]))
        yield {**self._head, "choices": [_choice(choice, text, logprobs, delta.finish_reason)]}

    def bare_chunk(self) -> dict[str, Any]:
        return {**self._head, "choices": []}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        return {**self._head, "choices": [self._whole(choice) for choice in choices]}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        logprobs = completion_logprobs(choice.logprobs, self._tokens, 0) if self._with_logprobs else None
        return _choice(choice.index, self._echo[choice.index] + choice.text, logprobs, choice.finish_reason)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
