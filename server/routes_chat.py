"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answers import FINGERPRINT, Choice, answer_id, chat_logprobs
from .completion_logprobs import prompt_logprobs
from .constraint import constraint
from .errors import ApiError
from .generation import Generation, respond
from .openapi import body_schema
from .prompts import chat_prompt, check_messages, check_scores
from .request import Delta, TokenLogprob
from .schemas_chat import ChatBody
from .state import Served, ServerState, state_of
from .tools.answer import ToolTalk
from .tools.use import tool_use
from .validation import parse_request, validate

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody))
async def chat_completions(request: Request) -> Response:
    state = state_of(request)
    state.served()
    return await respond(request, await prepare(state, await parse_request(request)))


async def prepare(state: ServerState, data: dict[str, Any]) -> Generation:
    """The JSON body ``data`` of a chat, checked and read.

    Raises:
        ApiError: 400, 404 for another model, 503 while no request is taken.
    """
    check_messages(data, "messages", state.settings.max_messages)
    body = validate(ChatBody, data)
    served = state.served_as(body.model)
    if body.n > state.settings.max_sequences:
        raise ApiError(400, f"n: at most {state.settings.max_sequences}", param="n", code="invalid_value")
    prompt = await chat_prompt(body, served, state.text)
    check_scores(body, [prompt])
    use = tool_use(body, served.chat.family, served.chat.special)
    if use is None:
        grammar = await constraint(served, body.grammar)
        return Generation(served.engine, body, [prompt], ChatAnswer(served, body), grammar=grammar)
    grammar = await constraint(served, lambda: use.grammar(body.grammar()))
    answer = ChatAnswer(served, body, use.talk())
    return Generation(served.engine, body, [prompt], answer, grammar=grammar, visible_ids=use.visible_ids)


class ChatAnswer:
    """Writes OpenAI's ``chat.completion`` and ``chat.completion.chunk`` objects."""

    def __init__(self, served: Served, body: ChatBody, tools: ToolTalk | None = None) -> None:
        self._tokens = served.tokens
        self._tools = tools
        self._with_logprobs = body.logprobs
        self._prompt_alternatives = body.prompt_logprobs
        self._scores: list[TokenLogprob] = []
        self._begun: set[int] = set()
        self._head = {
            "id": answer_id("chatcmpl", body.request_id),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": served.engine.model_name,
            "system_fingerprint": FINGERPRINT,
        }

    def scored(self, prompt: int, entries: Sequence[TokenLogprob]) -> None:
        self._scores += entries

    def chunks(self, choice: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """The role first, then content, and the reason of the end in a chunk of its own."""
        if choice not in self._begun:
            self._begun.add(choice)
            yield self._chunk(choice, {"role": "assistant", "content": ""})
        told: list[dict[str, Any]] = [{"content": delta.text}] if delta.text else []
        if self._tools is not None:
            told = self._tools.deltas(choice, delta)
        if delta.logprobs and not told:
            told = [{"content": ""}]
        for number, part in enumerate(told):
            yield self._chunk(choice, part, logprobs=None if number else self._logprobs(delta.logprobs or ()))
        if delta.finish_reason:
            reason: str = delta.finish_reason
            if self._tools is not None:
                reason = self._tools.finish_reason(choice, reason)
            yield self._chunk(choice, {}, finish_reason=reason)

    def bare_chunk(self) -> dict[str, Any]:
        return {**self._head, "choices": []}

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        scores = {}
        if self._prompt_alternatives is not None:
            scores["prompt_logprobs"] = prompt_logprobs(self._scores, self._prompt_alternatives, self._tokens)
        return {
            **self._head,
            **scores,
            "object": "chat.completion",
            "choices": [self._whole(choice) for choice in choices],
        }

    def _whole(self, choice: Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"content": choice.text}
        reason: str | None = choice.finish_reason
        if self._tools is not None:
            said, reason = self._tools.message(choice)
        return {
            "index": choice.index,
            "message": {"role": "assistant", **said, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": reason,
        }

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}],
        }

    def _logprobs(self, entries: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(entries, self._tokens) if self._with_logprobs else None
