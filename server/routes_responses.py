"""``POST /v1/responses``: OpenAI's newer endpoint, without its state."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .constraint import constraint
from .errors import ApiError
from .generation import Generation, in_one_piece, opened
from .openapi import body_schema
from .prompts import chat_prompt, check_messages
from .responses_answer import ResponsesAnswer, TypedEventStream, responses_usage
from .schemas_responses import ResponsesBody, as_chat, renamed
from .state import ServerState, state_of
from .tools.use import tool_use
from .validation import parse_request, validate

router = APIRouter()


@router.post("/v1/responses", openapi_extra=body_schema(ResponsesBody))
async def responses(request: Request) -> Response:
    state = state_of(request)
    state.served()
    generation = await prepare(state, await parse_request(request))
    stream, answer = await opened(request, generation), generation.answer
    if generation.body.stream:
        assert isinstance(answer, ResponsesAnswer)
        return TypedEventStream(stream, answer.events(stream), state.settings.write_seconds, answer)
    return await in_one_piece(request, stream, generation)


async def prepare(state: ServerState, data: dict[str, Any]) -> Generation:
    """The JSON body ``data`` of a response, checked and read.

    Raises:
        ApiError: 400, 404 for another model, 503 while no request is taken.
    """
    check_messages(data, "input", state.settings.max_messages)
    body = validate(ResponsesBody, data)
    chat = as_chat(body, data)
    served = state.served_as(body.model)
    try:
        prompt = await chat_prompt(chat, served, state.text)
        use = tool_use(chat, served.chat.family, served.chat.special)
        grammar = await constraint(served, lambda: chat.grammar() if use is None else use.grammar(chat.grammar()))
    except ApiError as error:
        raise renamed(error) from None
    answer = ResponsesAnswer(served, body, None if use is None else use.talk())
    visible = () if use is None else use.visible_ids
    return Generation(served.engine, chat, [prompt], answer, responses_usage, grammar, visible)
