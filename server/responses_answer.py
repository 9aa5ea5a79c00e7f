"""OpenAI's ``response`` object, whole or as the typed events of a stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from .answers import Choice, answer_id, chat_logprobs, usage_body
from .errors import error_body
from .request import Delta, Finished, FinishReason, TokenLogprob, Usage
from .responses_output import Event, OutputItems
from .schemas_responses import ResponsesBody
from .sse import PING_SECONDS, EventStream, frame
from .state import Served
from .streaming import ResponseStream
from .tools.answer import ToolTalk


class ResponsesAnswer:
    """Writes one response.

    Args:
        served: The model.
        body: What was asked.
        tools: Reads calls of functions in the text; ``None`` where none may be called.
    """

    def __init__(self, served: Served, body: ResponsesBody, tools: ToolTalk | None = None) -> None:
        self._tokens = served.tokens
        self._tools = tools
        self._with_logprobs = body.with_logprobs
        self._ping_seconds = body.sse_ping_interval or PING_SECONDS
        self._numbers = itertools.count()
        self._output = OutputItems(self._event, self._logprobs)
        self._held: list[TokenLogprob] = []  # of text that may be a call
        self._head = {
            "id": answer_id("resp", body.request_id),
            "object": "response",
            "created_at": int(time.time()),
            "model": served.engine.model_name,
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            "service_tier": "default",
            "store": False,
            "temperature": body.temperature,
            "text": {"format": body.text.format, "verbosity": body.text.verbosity or "medium"},
            "tool_choice": body.tool_choice,
            "tools": [tool.model_dump() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def scored(self, prompt: int, entries: Sequence[TokenLogprob]) -> None:
        raise NotImplementedError("this endpoint does not score prompts")

    def chunks(self, choice: int, delta: Delta) -> Iterator[Event]:
        raise NotImplementedError("this endpoint has events of its own")

    def bare_chunk(self) -> Event:
        raise NotImplementedError("this endpoint has events of its own")

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer in one piece, without usage."""
        (choice,) = choices
        for delta in choice.deltas:  # one by one, so that log-probabilities go where a stream tells them
            for _ in self._told(delta):
                pass
        for _ in self._end(choice.finish_reason):
            pass
        return self._ended(choice.finish_reason)

    async def events(self, stream: ResponseStream) -> AsyncIterator[Event | None]:
        """The events of a stream in OpenAI's order; ``None`` is a keep-alive."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress", []))
        if self._tools is None:
            for event in self._output.begin_message():
                yield event
        reason: FinishReason | None = None
        usages: list[Usage] = []
        async for item in stream.events(self._ping_seconds):
            match item:
                case None:
                    yield None
                case (_, Delta() as delta):
                    for event in self._told(delta):
                        yield event
                    reason = delta.finish_reason or reason
                case (_, Finished(usage)):
                    usages.append(usage)
        for event in self._end(reason):
            yield event
        response = {**self._ended(reason), "usage": responses_usage(usages)}
        yield self._event(f"response.{response['status']}", response=response)

    def failure(self, error: Exception) -> Event:
        """The last event of a stream that did not end well."""
        told = error_body(error)["error"]
        failed = {"code": "server_error", "message": told["message"]}  # OpenAI's list of codes is closed
        return self._event("response.failed", response=self._response("failed", [], error=failed))

    def _told(self, delta: Delta) -> Iterator[Event]:
        """The events of what the model wrote."""
        if self._tools is None:
            if delta.text or delta.logprobs:
                yield from self._output.text(delta.text, delta.logprobs or ())
            return
        self._held += delta.logprobs or ()
        for part in self._tools.deltas(0, delta):
            if "content" in part:
                yield from self._output.text(part["content"], self._held)
            for call in part.get("tool_calls", ()):
                if "id" in call:
                    yield from self._output.begin_call(call["id"], call["function"]["name"])
                else:
                    yield from self._output.arguments(call["function"]["arguments"])
            self._held = []

    def _end(self, reason: FinishReason | None) -> Iterator[Event]:
        if self._output.is_empty:
            yield from self._output.begin_message()
        yield from self._output.end(_status(reason)[0])

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _ended(self, reason: FinishReason | None) -> dict[str, Any]:
        status, details = _status(reason)
        return self._response(status, self._output.items, incomplete_details=details)

    def _response(self, status: str, output: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        nothing = {"error": None, "incomplete_details": None, "usage": None}
        return {**self._head, **nothing, "status": status, "output": output, **fields}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = chat_logprobs(entries, self._tokens)["content"] if self._with_logprobs else []
        return content


class TypedEventStream(EventStream):
    """Events that carry their type in a line of their own. Nothing follows the last one: its type says that it is."""

    end = b""

    def __init__(
        self,
        stream: ResponseStream,
        payloads: AsyncIterator[Mapping[str, Any] | None],
        write_seconds: float,
        answer: ResponsesAnswer,
    ) -> None:
        super().__init__(stream, payloads, write_seconds)
        self._answer = answer

    def framed(self, payload: Mapping[str, Any]) -> bytes:
        return b"event: " + str(payload["type"]).encode("ascii") + b"\n" + frame(payload)

    def failed(self, error: Exception) -> bytes:
        return self.framed(self._answer.failure(error))


def responses_usage(usages: list[Usage]) -> dict[str, Any]:
    """What it cost, by the names of this endpoint."""
    usage = usage_body(usages)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "attention": usage["attention"],
    }


def _status(reason: FinishReason | None) -> tuple[str, dict[str, str] | None]:
    return ("incomplete", {"reason": "max_output_tokens"}) if reason == "length" else ("completed", None)
