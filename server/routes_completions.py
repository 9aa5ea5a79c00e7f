"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answers import FINGERPRINT, Choice, answer_id
from .completion_logprobs import CompletionLogprobs, Lists, echoed, joined, prompt_logprobs, sliced
from .constraint import constraint
from .generation import Generation, respond
from .openapi import body_schema
from .prompts import Prompt, check_scores, completion_prompts
from .request import Delta, TokenLogprob
from .schemas import CompletionBody
from .state import Served, ServerState, state_of
from .validation import parse_request, validate

router = APIRouter()

ECHOED_TOKENS = 512  # of a prompt with log-probabilities, in one event of a stream


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
    check_scores(body, [prompt.token_ids for prompt in prompts])
    grammar = await constraint(served, body.grammar)
    answer = CompletionAnswer(served, body, prompts)
    return Generation(served.engine, body, [prompt.token_ids for prompt in prompts], answer, grammar=grammar)


class CompletionAnswer:
    """Writes OpenAI's ``text_completion`` objects; a stream has the same shape as the whole."""

    def __init__(self, served: Served, body: CompletionBody, prompts: list[Prompt]) -> None:
        self._tokens = served.tokens
        self._body = body
        self._prompts = prompts
        self._scores: list[list[TokenLogprob]] = [[] for _ in prompts]
        self._echo = [prompt.text if body.echo else "" for prompt in prompts for _ in range(body.n)]
        self._logprobs = [CompletionLogprobs(self._tokens, body.skip_special_tokens, len(echo)) for echo in self._echo]
        self._begun: set[int] = set()
        self._head = {
            "id": answer_id("cmpl", body.request_id),
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.engine.model_name,
            "system_fingerprint": FINGERPRINT,
        }

    def scored(self, prompt: int, entries: Sequence[TokenLogprob]) -> None:
        self._scores[prompt] += entries

    def chunks(self, choice: int, delta: Delta) -> Iterator[dict[str, Any]]:
        if choice not in self._begun:
            self._begun.add(choice)
            yield from self._echoed_chunks(choice)
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._logprobs[choice].lists(delta.logprobs or ())
        yield self._chunk(choice, delta.text, logprobs, delta.finish_reason)

    def bare_chunk(self) -> dict[str, Any]:
        return {**self._head, "choices": []}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        return {**self._head, "choices": [self._whole(choice) for choice in choices]}

    def _whole(self, choice: Choice) -> dict[str, Any]:
        body, prompt = self._body, choice.index // self._body.n
        logprobs = None
        if body.logprobs is not None:
            logprobs = self._logprobs[choice.index].lists(choice.logprobs)
            if body.echo:
                logprobs = joined(self._echoed(prompt), logprobs)
        whole = _choice(choice.index, self._echo[choice.index] + choice.text, logprobs, choice.finish_reason)
        if body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(self._scores[prompt], body.prompt_logprobs, self._tokens)
        return whole

    def _echoed(self, prompt: int) -> Lists:
        given = self._prompts[prompt]
        return echoed(given.token_ids, given.text, self._scores[prompt], self._body.logprobs or 0, self._tokens)

    def _echoed_chunks(self, choice: int) -> Iterator[dict[str, Any]]:
        """The whole text at once, and its log-probabilities in pieces."""
        text = self._echo[choice]
        if self._body.echo and self._body.logprobs is not None:
            for part in sliced(self._echoed(choice // self._body.n), ECHOED_TOKENS):
                yield self._chunk(choice, text, part)
                text = ""
        elif text:
            yield self._chunk(choice, text)

    def _chunk(
        self, choice: int, text: str, logprobs: Lists | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        return {**self._head, "choices": [_choice(choice, text, logprobs, finish_reason)]}


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
