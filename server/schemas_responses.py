"""Body of ``POST /v1/responses``, and the chat that it stands for.

The subset without state: a response is neither stored nor taken up again. What both endpoints have
is checked once, by the body of chat completions; a refusal names the field of this endpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from .errors import ApiError
from .sampling_limits import MAX_LOGPROBS
from .schemas import INT32_MAX, MAX_NAME_CHARS, TEXT_ONLY, GenerationBody
from .schemas_chat import ChatBody
from .schemas_labels import LabelledBody
from .schemas_responses_items import InputItem, Item, OfferedTool, messages_of
from .tools.schemas import MAX_TOOLS
from .validation import Body, validate

LOGPROBS = "message.output_text.logprobs"
_STATELESS = "responses are not stored; send the whole conversation as input"

# Chat's names for fields that have others here.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    "reasoning_effort": "reasoning.effort",
}
# Fields of chat that mean nothing here, and would be lost without a word.
_CHAT_ONLY = (
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "logprobs",
    "prompt_logprobs",
    "response_format",
    "reasoning_effort",
    "return_progress",
    "add_generation_prompt",
    "continue_final_message",
)


class TextOptions(Body):
    """``format`` as chat's ``response_format``, but flat."""

    format: dict[str, Any] = Field({"type": "text"}, max_length=16)
    verbosity: str | None = Field(None, max_length=16)

    @field_validator("format")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        json.dumps(value, allow_nan=False)  # the answer repeats it, and 1e999 is read as infinity
        return value

    def response_format(self) -> dict[str, Any]:
        if self.format.get("type") != "json_schema":
            return self.format
        return {"type": "json_schema", "json_schema": {k: v for k, v in self.format.items() if k != "type"}}


class ReasoningOptions(Body):
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "summary": ((), "reasoning is not summarised"),
        "generate_summary": ((), "reasoning is not summarised"),
    }

    effort: str | None = Field(None, max_length=32)


_TOOL_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "name"],
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
        },
    ]
}


def _items_of(value: Any) -> Any:
    if not isinstance(value, (str, list)) or not value:
        raise ValueError("input is a string or a list of items, and not empty")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesBody(LabelledBody):
    """``POST /v1/responses``."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **GenerationBody.refused,
        "previous_response_id": ((), _STATELESS),
        "conversation": ((), _STATELESS),
        "store": ((False,), "responses are not stored; send store=false"),
        "background": ((False,), "responses are not made in the background"),
        "background_options": ((), "responses are not made in the background"),
        "prompt": ((), "prompts are not stored here"),
        "context_management": (([],), "the context is never changed"),
        "truncation": (("disabled",), "prompts are never cut; shorten the input"),
        "max_tool_calls": ((), "this server runs no tools of its own"),
        "image": ((), TEXT_ONLY),
        "access_programs": ((), "there are none"),
        **{name: ((), "is not a field of this endpoint") for name in _CHAT_ONLY},
    }

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    input: Annotated[list[Item], BeforeValidator(_items_of, json_schema_input_type=str | list[InputItem])]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field([], max_length=16)
    text: TextOptions = Field(default_factory=lambda: TextOptions.model_validate({}))
    reasoning: ReasoningOptions = Field(default_factory=lambda: ReasoningOptions.model_validate({}))
    tools: list[OfferedTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Annotated[Any, WithJsonSchema(_TOOL_CHOICE)] = "auto"
    parallel_tool_calls: bool = True

    @field_validator("tool_choice")
    @classmethod
    def _names_a_function(cls, value: Any) -> Any:
        if value in ("none", "auto", "required"):
            return value
        if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(value.get("name"), str):
            raise ValueError('tool_choice is "none", "auto", "required", or {"type": "function", "name": ...}')
        return {"type": "function", "name": value["name"]}

    @field_validator("reasoning", mode="before")
    @classmethod
    def _no_summary(cls, value: Any) -> Any:
        for name, (_, reason) in ReasoningOptions.refused.items():
            if isinstance(value, dict) and value.get(name) is not None:
                raise ValueError(f"{name}: {reason}")
        return value

    @field_validator("include")
    @classmethod
    def _each_once(cls, value: list[str]) -> list[str]:
        return list(dict.fromkeys(value))

    @field_validator("stream_options")
    @classmethod
    def _usage_is_always_there(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and value.include_usage:
            raise ValueError("include_usage: the last event always holds the usage")
        return value

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in self.include


def as_chat(body: ResponsesBody, data: dict[str, Any]) -> ChatBody:
    """The chat completion that ``body``, checked from ``data``, asks for.

    Raises:
        ApiError: 400, ``param`` is the name that the field has here.
    """
    if body.top_logprobs and not body.with_logprobs:
        raise ApiError(400, f'top_logprobs: needs include=["{LOGPROBS}"]', param="top_logprobs", code="invalid_value")
    messages = messages_of(body.input)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    own = set(ResponsesBody.model_fields) | set(ResponsesBody.refused)
    shared = {name: value for name, value in data.items() if name not in own}
    chat = {
        **shared,
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": body.with_logprobs,
        "top_logprobs": body.top_logprobs,
        "response_format": body.text.response_format(),
        "verbosity": body.text.verbosity,
        "reasoning_effort": body.reasoning.effort,
        "tools": [tool.as_in_chat() for tool in body.tools],
        "tool_choice": _choice_in_chat(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "stream": body.stream,
        "sse_ping_interval": body.sse_ping_interval,
    }
    try:
        return validate(ChatBody, chat)
    except ApiError as error:
        raise renamed(error) from None


def _choice_in_chat(choice: Any) -> Any:
    return {"type": "function", "function": {"name": choice["name"]}} if isinstance(choice, dict) else choice


def renamed(error: ApiError) -> ApiError:
    """The same refusal with the names that fields have here."""
    name, rest = error.param or "", ""
    for end, char in enumerate(name):
        if char in ".[":
            name, rest = name[:end], name[end:]
            break
    here, message = error.param, error.message
    if name in _NAMES:
        here = _NAMES[name] + rest.removeprefix(".json_schema")  # a format is flat here
        if message.startswith(name + rest):
            message = here + message.removeprefix(name + rest)
    if error.code == "invalid_grammar":  # of two that were given, it names the other
        message = message.replace("response_format.json_schema", "text.format").replace(
            "response_format", "text.format"
        )
    return ApiError(error.status, message, type=error.type, param=here, code=error.code, headers=error.headers)
