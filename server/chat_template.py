"""A chat as token ids, by the model's own template."""

from __future__ import annotations

import copy
import re
import threading
from contextlib import suppress
from typing import Any, Literal

from jinja2 import Environment
from jinja2.exceptions import TemplateError

from .errors import ApiError
from .schemas_chat import ChatPromptBody
from .tools.families import FAMILIES, ParserName, family_of, reads_tools
from .tools.prompt import in_words

MAX_SPELLED = 4096


class ChatTemplate:
    """Renders chats for one tokenizer; may be called from several threads.

    A control token spelled in a message is text there, never control. Encoding it so changes a
    setting of the tokenizer for a moment, which other threads would see: such chats go, one at a
    time, through a copy of the tokenizer, made when the first one comes.

    Args:
        tokenizer: The ``transformers`` tokenizer.
        tool_parser: How the model writes calls of tools; ``auto`` sees that from its template.

    Attributes:
        family: How the model writes calls of tools.
        special: Ids of its special tokens.
    """

    def __init__(self, tokenizer: Any, tool_parser: Literal["auto"] | ParserName = "auto") -> None:
        self._tokenizer = tokenizer
        template = _tool_template(tokenizer)
        self._reads_tools = reads_tools(template)
        self.family = family_of(template) if tool_parser == "auto" else FAMILIES[tool_parser]
        self.special = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._careful: Any = None
        self._lock = threading.Lock()
        self._control = _control_tokens(tokenizer)

    def render(self, body: ChatPromptBody) -> list[int]:
        """Token ids of the chat.

        Raises:
            ApiError: 400, the model has no template, or it cannot take these messages.
        """
        if not self._tokenizer.chat_template:
            raise ApiError(
                400,
                "This model has no chat template. Use /v1/completions, or a model made for chat.",
                param="messages",
                code="no_chat_template",
            )
        variables = self._variables(body)
        messages, tools = self._chat(body)
        spelled = self._spelled([messages, tools, variables])
        if spelled > MAX_SPELLED:  # each costs calls of the tokenizer
            raise ApiError(
                400, f"messages: more than {MAX_SPELLED} control tokens", param="messages", code="invalid_value"
            )
        if not spelled:
            return self._apply(self._tokenizer, body, messages, tools, variables, sanitize=False)
        with self._lock:
            if self._careful is None:
                self._careful = copy.deepcopy(self._tokenizer)
            return self._apply(self._careful, body, messages, tools, variables, sanitize=True)

    def _variables(self, body: ChatPromptBody) -> dict[str, Any]:
        variables: dict[str, Any] = dict(body.chat_template_kwargs)
        if body.reasoning_effort is not None:
            if "reasoning_effort" not in self._tokenizer.get_chat_template():
                raise ApiError(
                    400,
                    "reasoning_effort: this model's chat template does not read it",
                    param="reasoning_effort",
                    code="unsupported_parameter",
                )
            variables["reasoning_effort"] = body.reasoning_effort
        return variables

    def _chat(self, body: ChatPromptBody) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the template is to read them."""
        messages = [message.for_template() for message in body.messages]
        tools = body.offered_tools
        if not self._reads_tools and (
            tools or any(message.tool_calls or message.tool_call_id for message in body.messages)
        ):
            return in_words(messages, tools), None
        return messages, [tool.for_template() for tool in tools] or None

    def _spelled(self, values: list[Any]) -> int:
        """How many control tokens stand in the strings in ``values``.

        Raises:
            ApiError: 400, one stands in a key, where it could not be told from control.
        """
        count = 0
        while values:
            value = values.pop()
            if isinstance(value, str):
                count += sum(1 for _ in self._control.finditer(value))
            elif isinstance(value, dict):
                if any(map(self._control.search, value)):
                    raise ApiError(400, "messages: a key holds a control token", param="messages", code="invalid_value")
                values += value.values()
            elif isinstance(value, list):
                values += value
        return count

    def _apply(
        self,
        tokenizer: Any,
        body: ChatPromptBody,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        sanitize: bool,
    ) -> list[int]:
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=body.opens_answer,
                continue_final_message=body.continue_final_message,
                sanitize_control_tokens=sanitize,
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


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Finds control tokens: what is special, stands in a template, or is named by the tokenizer as one.

    Other added tokens are words, such as Gemma's thousands, its tags of HTML among them. These are at least the tokens
    that ``apply_chat_template`` takes for text where they stand in a message.
    """
    templates = tokenizer.chat_template or ""
    written = "\0".join(map(_written, templates.values() if isinstance(templates, dict) else [templates]))
    named = tokenizer.chat_control_tokens or ()
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in written or token.content in named)
    ]
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _written(template: str) -> str:
    """The source of a template, and its strings as it means them: with escapes, or in parts, they may spell a token."""
    strings = []
    with suppress(TemplateError):  # a broken one is told of when it is used
        for _, kind, text in Environment().lex(template):
            if kind == "string":
                strings.append(text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape"))
    return f"{template}\0{''.join(strings)}"


def _tool_template(tokenizer: Any) -> str:
    """The template that a chat with tools goes through; empty if there is none."""
    templates = tokenizer.chat_template or ""
    if isinstance(templates, dict):
        return str(templates.get("tool_use", templates.get("default", "")))
    return str(templates)
