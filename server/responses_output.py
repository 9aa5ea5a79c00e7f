"""The items that a response is made of, as they grow: messages and calls of functions."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .request import TokenLogprob

Event = dict[str, Any]


class OutputItems:
    """The items of one response, one after another, and the events that tell of them.

    Args:
        event: Makes an event of a type and fields.
        logprobs: Writes log-probabilities.

    Attributes:
        items: Those that ended.
    """

    def __init__(
        self, event: Callable[..., Event], logprobs: Callable[[Sequence[TokenLogprob]], list[dict[str, Any]]]
    ) -> None:
        self.items: list[dict[str, Any]] = []
        self._event, self._logprobs = event, logprobs
        self._item: dict[str, Any] | None = None  # the one that grows
        self._texts: list[str] = []
        self._entries: list[TokenLogprob] = []

    def begin_message(self) -> Iterator[Event]:
        message_id = f"msg-{uuid.uuid4().hex}"
        yield from self._begin({"type": "message", "id": message_id, "role": "assistant", "content": []})
        yield self._event("response.content_part.added", **self._part_place, part=self._part("", ()))

    def text(self, text: str, entries: Sequence[TokenLogprob]) -> Iterator[Event]:
        """Text for the reader goes on."""
        if self._item is None or self._item["type"] != "message":
            yield from self.end("completed")
            yield from self.begin_message()
        self._texts.append(text)
        self._entries += entries
        logprobs = self._logprobs(entries)
        yield self._event("response.output_text.delta", **self._part_place, delta=text, logprobs=logprobs)

    def begin_call(self, call_id: str, name: str) -> Iterator[Event]:
        """A call begins, and what came before has ended."""
        yield from self.end("completed")
        item_id = f"fc-{uuid.uuid4().hex}"
        yield from self._begin(
            {"type": "function_call", "id": item_id, "call_id": call_id, "name": name, "arguments": ""}
        )

    def arguments(self, text: str) -> Iterator[Event]:
        """The arguments of the call go on."""
        self._texts.append(text)
        yield self._event("response.function_call_arguments.delta", **self._place, delta=text)

    def end(self, status: str) -> Iterator[Event]:
        """The item that grows, if one does, has ended; ``status``: ``completed`` or ``incomplete``."""
        if self._item is None:
            return
        text = "".join(self._texts)
        if self._item["type"] == "message":
            part = self._part(text, self._entries)
            yield self._event(
                "response.output_text.done", **self._part_place, text=text, logprobs=self._logprobs(self._entries)
            )
            yield self._event("response.content_part.done", **self._part_place, part=part)
            ended = {**self._item, "status": status, "content": [part]}
        else:
            name = self._item["name"]
            yield self._event("response.function_call_arguments.done", **self._place, name=name, arguments=text)
            ended = {**self._item, "status": status, "arguments": text}
        yield self._event("response.output_item.done", output_index=len(self.items), item=ended)
        self.items.append(ended)
        self._item, self._texts, self._entries = None, [], []

    @property
    def is_empty(self) -> bool:
        """Whether no item has begun."""
        return self._item is None and not self.items

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        self._item = {**item, "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=len(self.items), item=self._item)

    @property
    def _place(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.items)}

    @property
    def _part_place(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}

    def _part(self, text: str, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(entries)}
