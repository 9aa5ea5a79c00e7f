"""From a request's prompt or messages to token ids.

Lengths are checked before the costly step: a text of more than ``MAX_BYTES_PER_TOKEN`` bytes for
each token of the context is refused unread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .engine_protocol import EngineLike
from .errors import ApiError
from .schemas import CompletionBody, GenerationBody
from .schemas_chat import ChatPromptBody
from .state import Served
from .text_worker import TextWorker

MAX_BYTES_PER_TOKEN = 8
# Log-probabilities of prompts in one answer. One costs about 30 bytes of JSON, and more while it is made.
MAX_SCORES = 1_000_000
# Tool calls and parts of content in all messages of a request; more where more messages are allowed.
MAX_INSIDE = 8192


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and their text."""

    token_ids: list[int]
    text: str


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
            ids = check_token_ids(item, engine, "prompt")
            prompts.append(Prompt(ids, await worker.run(engine.tokenizer.decode, ids) if body.echo else ""))
        if not prompts[-1].token_ids:
            raise _bad_prompt("prompt must not be empty")
    return prompts


async def tokenize_text(text: str, add_special_tokens: bool, engine: EngineLike, worker: TextWorker) -> list[int]:
    _check_bytes(len(text.encode()), engine, "prompt")
    return await worker.run(engine.tokenize, text, add_special_tokens)


def check_messages(data: dict[str, Any], name: str, limit: int) -> None:
    """Whether the body, not yet checked, holds too many messages, or these too many calls and parts in all.

    Checking 100,000 messages takes two seconds, in which the server does nothing else.

    Raises:
        ApiError: 400.
    """
    messages = data.get(name)
    if not isinstance(messages, list):
        return
    if len(messages) > limit:
        raise ApiError(400, f"{name}: at most {limit}", param=name, code="invalid_value")
    members = (value for message in messages if isinstance(message, dict) for value in message.values())
    most = max(MAX_INSIDE, limit)
    if sum(len(value) for value in members if isinstance(value, list)) > most:
        told = f"{name}: at most {most} calls and parts of content in all"
        raise ApiError(400, told, param=name, code="invalid_value")


async def chat_prompt(body: ChatPromptBody, served: Served, worker: TextWorker) -> list[int]:
    """Token ids of a chat.

    Raises:
        ApiError: 400.
    """
    _check_bytes(body.num_bytes, served.engine, "messages")
    return await worker.run(served.chat.render, body)


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
        raise ApiError(400, f"{param}: token ids are whole numbers from 0 to {engine.vocab_size - 1}", param=param)
    return value


def check_scores(body: GenerationBody, prompts: list[list[int]]) -> None:
    """Whether the answer has something to say, and not too much, of its prompts.

    Raises:
        ApiError: 400.
    """
    echoes = isinstance(body, CompletionBody) and body.echo
    if body.token_limit == 0 and not echoes and body.prompt_logprobs is None:
        raise ApiError(
            400, "max_tokens: 0 needs echo=true or prompt_logprobs", param="max_tokens", code="invalid_value"
        )
    if body.prompt_alternatives is not None:
        scores = sum(map(len, prompts)) * (1 + body.prompt_alternatives) * body.n
        if scores > MAX_SCORES:
            param = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
            raise ApiError(
                400,
                f"{param}: {scores} log-probabilities of prompt tokens, alternatives and choices counted in; "
                f"the most is {MAX_SCORES}",
                param=param,
                code="invalid_value",
            )


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
