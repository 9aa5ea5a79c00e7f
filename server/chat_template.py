"""A chat as token ids, by the model's own template."""

from __future__ import annotations

import copy
import threading
from typing import Any

from jinja2.exceptions import TemplateError

from .errors import ApiError
from .schemas_chat import ChatPromptBody

MAX_SPELLED = 4096


class ChatTemplate:
    """Renders chats for one tokenizer; may be called from several threads.

    A control token spelled in a message is text there, never control. Encoding it so changes a
    setting of the tokenizer for a moment, which other threads would see: such chats go, one at a
    time, through a copy of the tokenizer, made when the first one comes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._careful: Any = None
        self._lock = threading.Lock()
        self._control = [token for token in tokenizer.added_tokens_encoder if token and not token.isspace()]

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
        spelled = self._spelled(body, variables)
        if spelled > MAX_SPELLED:  # each costs calls of the tokenizer
            raise ApiError(
                400, f"messages: more than {MAX_SPELLED} control tokens", param="messages", code="invalid_value"
            )
        if not spelled:
            return self._apply(self._tokenizer, body, variables, sanitize=False)
        with self._lock:
            if self._careful is None:
                self._careful = copy.deepcopy(self._tokenizer)
            return self._apply(self._careful, body, variables, sanitize=True)

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

    def _spelled(self, body: ChatPromptBody, variables: dict[str, Any]) -> int:
        texts = [message.content for message in body.messages]
        texts += [message.name for message in body.messages if message.name]
        texts += [value for value in variables.values() if isinstance(value, str)]
        return sum(text.count(token) for text in texts for token in self._control)

    def _apply(self, tokenizer: Any, body: ChatPromptBody, variables: dict[str, Any], sanitize: bool) -> list[int]:
        try:
            ids: list[int] = tokenizer.apply_chat_template(
                [message.for_template() for message in body.messages],
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
