"""Body of ``POST /v1/responses``, and the chat that it stands for.

The subset without state: a response is neither stored nor taken up again. What both endpoints have
is checked once, by the body of chat completions; a refusal names the field of this endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from .errors import ApiError
from .sampling_limits import MAX_LOGPROBS
from .schemas import INT32_MAX, MAX_NAME_CHARS
from .schemas_chat import MAX_PARTS, ChatBody
from .schemas_labels import LabelledBody
from .validation import Body, validate

LOGPROBS = "message.output_text.logprobs"
_STATELESS = "responses are not stored; send the whole conversation as input"
_NO_TOOLS = "tools are not supported by this endpoint; see /v1/chat/completions"
_TEXT_ONLY = "this server reads and writes text only"

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
    "verbosity",
    "functions",
    "function_call",
    "return_progress",
    "add_generation_prompt",
    "continue_final_message",
)


class TextOptions(Body):
    """``format`` as chat's ``response_format``, but flat."""

    format: dict[str, Any] = Field({"type": "text"}, max_length=16)
    verbosity: str | None = Field(None, max_length=16)

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


_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["input_text", "output_text", "text"]}, "text": {"type": "string"}},
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": MAX_PARTS, "items": _PART}]}


class InputMessage(Body):
    """One message of the input; what an earlier answer held is taken as it was."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[dict[str, Any]], WithJsonSchema(_CONTENT)]

    @field_validator("content", mode="before")
    @classmethod
    def _text_or_parts(cls, value: Any) -> Any:
        if not isinstance(value, (str, list)):
            raise ValueError("content is a string or a list of parts")
        if isinstance(value, list) and len(value) > MAX_PARTS:
            raise ValueError(f"content has at most {MAX_PARTS} parts")
        for part in value if isinstance(value, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
                raise ValueError(f'a part is {{"type": "input_text", "text": "..."}}; {_TEXT_ONLY}')
        return value

    def as_message(self) -> dict[str, Any]:
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": [{"type": "text", "text": part["text"]} for part in self.content]}


def _messages_of(value: Any) -> Any:
    if not isinstance(value, (str, list)) or not value:
        raise ValueError("input is a string or a list of messages, and not empty")
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesBody(LabelledBody):
    """``POST /v1/responses``."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "previous_response_id": ((), _STATELESS),
        "conversation": ((), _STATELESS),
        "store": ((False,), "responses are not stored; send store=false"),
        "background": ((False,), "responses are not made in the background"),
        "background_options": ((), "responses are not made in the background"),
        "prompt": ((), "prompts are not stored here"),
        "context_management": (([],), "the context is never changed"),
        "truncation": (("disabled",), "prompts are never cut; shorten the input"),
        "tools": (([],), _NO_TOOLS),
        "tool_choice": (("none", "auto"), _NO_TOOLS),
        "max_tool_calls": ((), _NO_TOOLS),
        "image": ((), _TEXT_ONLY),
        "access_programs": ((), "there are none"),
        **{name: ((), "is not a field of this endpoint") for name in _CHAT_ONLY},
    }

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    input: Annotated[list[InputMessage], BeforeValidator(_messages_of, json_schema_input_type=str | list[InputMessage])]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field([], max_length=16)
    text: TextOptions = Field(default_factory=lambda: TextOptions.model_validate({}))
    reasoning: ReasoningOptions = Field(default_factory=lambda: ReasoningOptions.model_validate({}))
    parallel_tool_calls: bool = True

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
    messages = [message.as_message() for message in body.input]
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
        "stream": body.stream,
        "sse_ping_interval": body.sse_ping_interval,
    }
    try:
        return validate(ChatBody, chat)
    except ApiError as error:
        raise renamed(error) from None


def renamed(error: ApiError) -> ApiError:
    """The same refusal with the name that the field has here."""
    name, rest = error.param or "", ""
    for end, char in enumerate(name):
        if char in ".[":
            name, rest = name[:end], name[end:]
            break
    if name not in _NAMES:
        return error
    here = _NAMES[name] + rest.removeprefix(".json_schema")  # a format is flat here
    message = error.message
    if message.startswith(name + rest):
        message = here + message.removeprefix(name + rest)
    return ApiError(error.status, message, type=error.type, param=here, code=error.code)
