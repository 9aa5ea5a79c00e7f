"""From a request's prompt or messages to token ids.

Lengths are checked before the costly step: a text of more than ``MAX_BYTES_PER_TOKEN`` bytes for
each token of the context is refused unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from .engine_protocol import EngineLike
from .errors import ApiError
from .schemas import CompletionBody
from .schemas_chat import ChatPromptBody
from .text_worker import TextWorker

MAX_BYTES_PER_TOKEN = 8
MAX_CONTROL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text they came from (``None`` when the client sent ids)."""

    token_ids: list[int]
    text: str | None


async def completion_prompts(body: CompletionBody, engine: EngineLike, worker: TextWorker, limit: int) -> list[Prompt]:
    """Prompts of a completion, at most ``limit``.

    Raises:
        ApiError: 400.
    """
    given = body.prompt
    if isinstance(given, str) or (given and type(given[0]) is int):
        given = [given]
    if not given:
        raise _bad_prompt("prompt must not be empty")
    if len(given) * body.n > limit:
        raise _bad_prompt(f"prompts times n is {len(given) * body.n}, the most is {limit}")
    prompts = []
    for item in given:
        if isinstance(item, str):
            ids = await tokenize_text(item, body.add_special_tokens, engine, worker)
            prompts.append(Prompt(ids, item))
        else:
            prompts.append(Prompt(check_token_ids(item, engine, "prompt"), None))
        if not prompts[-1].token_ids:
            raise _bad_prompt("prompt must not be empty")
    return prompts


async def tokenize_text(text: str, add_special_tokens: bool, engine: EngineLike, worker: TextWorker) -> list[int]:
    _check_bytes(len(text.encode()), engine, "prompt")
    return await worker.run(engine.tokenize, text, add_special_tokens)


async def chat_prompt(body: ChatPromptBody, engine: EngineLike, worker: TextWorker, max_messages: int) -> list[int]:
    """Token ids of a chat, by the model's own template.

    Control tokens spelled in a message are text there, never control.

    Raises:
        ApiError: 400.
    """
    if len(body.messages) > max_messages:
        raise ApiError(400, f"messages: at most {max_messages}", param="messages", code="invalid_value")
    _check_bytes(sum(len(message.content.encode()) for message in body.messages), engine, "messages")
    return await worker.run(render_chat, engine.tokenizer, body)


def render_chat(tokenizer: Any, body: ChatPromptBody) -> list[int]:
    """``chat_prompt`` without its checks of length; blocks."""
    if not tokenizer.chat_template:
        raise ApiError(
            400,
            "This model has no chat template. Use /v1/completions, or a model made for chat.",
            param="messages",
            code="no_chat_template",
        )
    messages = [message.for_template() for message in body.messages]
    control_tokens = [token for token in tokenizer.all_special_tokens if token]
    spelled = sum(message["content"].count(token) for message in messages for token in control_tokens)
    if spelled > MAX_CONTROL_TOKENS:  # each costs a call of the tokenizer
        raise ApiError(400, f"messages: more than {MAX_CONTROL_TOKENS} control tokens", param="messages")
    variables = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in tokenizer.get_chat_template():
            raise ApiError(
                400,
                "reasoning_effort: this model's chat template does not read it",
                param="reasoning_effort",
                code="unsupported_parameter",
            )
        variables["reasoning_effort"] = body.reasoning_effort
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=body.opens_answer,
            continue_final_message=body.continue_final_message,
            sanitize_control_tokens=True,
            return_dict=False,
            **variables,
        )
    except Exception as error:
        # Only what the template itself says (its raise_exception) is meant for callers.
        reason = f": {error}" if type(error) is TemplateError else ""
        raise ApiError(
            400,
            f"The chat template of this model cannot take these messages{reason}.",
            param="messages",
            code="chat_template_failed",
        ) from error
    return ids


def check_token_ids(value: Any, engine: EngineLike, param: str) -> list[int]:
    """A client's token ids.

    Raises:
        ApiError: 400: not a list of ints, an id outside the vocabulary, or more than the context.
    """
    if not isinstance(value, list):
        raise ApiError(400, f"{param}: strings and lists of token ids cannot be mixed", param=param)
    if len(value) > engine.context_length:
        raise too_long(f"{len(value)} tokens", engine, param)
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) >= engine.vocab_size):
        raise ApiError(
            400, f"{param}: token ids are whole numbers from 0 to {engine.vocab_size - 1}", param=param
        )
    return value


def too_long(given: str, engine: EngineLike, param: str) -> ApiError:
    return ApiError(
        400,
        f"This model's maximum context length is {engine.context_length} tokens. However, your request has {given}.",
        param=param,
        code="context_length_exceeded",
    )


def _check_bytes(count: int, engine: EngineLike, param: str) -> None:
    if count > MAX_BYTES_PER_TOKEN * engine.context_length:
        raise too_long(f"{count} bytes of text", engine, param)


def _bad_prompt(message: str) -> ApiError:
    return ApiError(400, message, param="prompt", code="invalid_value")
