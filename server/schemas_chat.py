"""Bodies of chat completions and of tokenize, which takes a chat too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from .sampling_limits import MAX_LOGPROBS
from .schemas import INT32_MAX, MAX_NAME_CHARS, NO_FUNCTIONS, TEXT_ONLY, GenerationBody
from .tools.schemas import MAX_CALLS, MAX_TOOLS, NamedChoice, Tool, ToolCall
from .validation import Body

# Variables that templates of known models read. A request may set these and no others: a template
# could use any other name for its own purposes (messages, tools, eos_token, ...).
TEMPLATE_VARIABLES = frozenset(
    {
        "custom_instructions",
        "date_string",
        "enable_thinking",
        "model_identity",
        "reasoning_effort",
        "thinking",
        "thinking_budget",
    }
)
MAX_VARIABLE_CHARS = 4096

_MESSAGE_REFUSED = {
    "function_call": NO_FUNCTIONS,
    "audio": TEXT_ONLY,
    "refusal": "refusals are not supported",
}


MAX_PARTS = 4096  # of one message
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": MAX_PARTS, "items": _PART}]}


class Message(Body):
    """One message. Content in parts becomes one text, a line break between parts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, WithJsonSchema(_CONTENT)]
    name: str | None = Field(None, max_length=MAX_NAME_CHARS)
    tool_calls: list[ToolCall] = Field([], max_length=MAX_CALLS)
    tool_call_id: str | None = Field(None, max_length=MAX_NAME_CHARS)

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, reason in _MESSAGE_REFUSED.items():
                if data.get(name) not in (None, []):
                    raise ValueError(f"{name}: {reason}")
            if data.get("role") == "assistant" and data.get("tool_calls"):
                return {**data, "content": data.get("content") or ""}
        return data

    @model_validator(mode="after")
    def _tool_fields_fit_the_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only a message of the assistant has them")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id: a message of role tool needs it, and no other has it")
        return self

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(value) > MAX_PARTS:
            raise ValueError(f"content has at most {MAX_PARTS} parts")
        texts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f'a part of the content is {{"type": "text", "text": "..."}}; {TEXT_ONLY}')
            texts.append(part["text"])
        return "\n".join(texts)

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it; they call a developer's message a system message."""
        role = "system" if self.role == "developer" else self.role
        told: dict[str, Any] = {"role": role, "content": self.content}
        if self.name is not None:
            told["name"] = self.name
        if self.tool_calls:
            told["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            told["tool_call_id"] = self.tool_call_id
        return told

    @property
    def num_bytes(self) -> int:
        """Of its text and its calls."""
        calls = sum(len(call.function.arguments.encode()) + len(call.function.name) for call in self.tool_calls)
        return len(self.content.encode()) + calls


class ChatPromptBody(Body):
    """The fields of which a chat's prompt is made."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, str | int | float | bool | None] = Field({})
    reasoning_effort: str | None = Field(None, max_length=32)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, value: list[Tool]) -> list[Tool]:
        if len({tool.function.name for tool in value}) < len(value):
            raise ValueError("two functions have the same name")
        return value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _is_offered(cls, value: Any, info: ValidationInfo) -> Any:
        tools = info.data.get("tools")
        if isinstance(value, dict):
            value = NamedChoice.model_validate(value)
        elif value not in ("none", "auto", "required"):
            named = '{"type": "function", "function": {"name": ...}}'
            raise ValueError(f'tool_choice is "none", "auto", "required", or {named}')
        if tools is None or value in ("none", "auto"):
            return value
        if not tools:
            raise ValueError("there are no tools to choose from")
        if isinstance(value, NamedChoice) and value.function.name not in {tool.function.name for tool in tools}:
            raise ValueError("there is no tool of this name")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _one_ending(cls, value: bool, info: ValidationInfo) -> bool:
        if value:
            messages = info.data.get("messages")
            if info.data.get("add_generation_prompt"):
                raise ValueError("continue_final_message and add_generation_prompt exclude each other")
            if messages and messages[-1].role != "assistant":
                raise ValueError("the last message must be the assistant's to be continued")
        return value

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _known_scalars(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        unknown = sorted(set(value) - TEMPLATE_VARIABLES)
        if unknown:
            raise ValueError(f"{unknown[0][:64]!r} cannot be set; these can: {', '.join(sorted(TEMPLATE_VARIABLES))}")
        for name, item in value.items():
            if isinstance(item, (dict, list)) or (isinstance(item, float) and not math.isfinite(item)):
                raise ValueError(f"{name} must be a string, number, boolean or null")
            if isinstance(item, str) and len(item) > MAX_VARIABLE_CHARS:
                raise ValueError(f"{name} has more than {MAX_VARIABLE_CHARS} characters")
        return value

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def num_bytes(self) -> int:
        """Of all that the template writes into the prompt, as far as that is the request's."""
        tools = sum(len(json.dumps(tool.for_template(), ensure_ascii=False).encode()) for tool in self.offered_tools)
        return tools + sum(message.num_bytes for message in self.messages)

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with the head of the assistant's answer."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class ChatBody(GenerationBody, ChatPromptBody):
    """``POST /v1/chat/completions``."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **GenerationBody.refused,
        "add_special_tokens": ((False,), "the chat template adds the special tokens"),
        "chat_template": ((), "a request cannot bring a template"),
    }

    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    parallel_tool_calls: bool = True

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs=true")
        return value

    @property
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeTextBody(Body):
    """``POST /tokenize`` with ``prompt``."""

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    prompt: str
    add_special_tokens: bool = True


class TokenizeChatBody(ChatPromptBody):
    """``POST /tokenize`` with ``messages``."""

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
