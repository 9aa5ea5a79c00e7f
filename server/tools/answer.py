"""Chat answers with calls of tools."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..answers import Choice
from ..request import Delta
from .calls import CallArguments, CallBegins, CallEnds, Content, Part
from .readers import Reader

_DIGITS = string.ascii_letters + string.digits


@dataclass(slots=True)
class ToolWriter:
    """Turns the parts of one choice into deltas of OpenAI's shape.

    Blanks between content and calls belong to neither, and are left out.

    Attributes:
        reader: Reads this choice.
        several: Whether calls after the first one count.
        digits_of_id: See ``Family``.
        num_calls: Calls that began.
    """

    reader: Reader
    several: bool
    digits_of_id: int
    num_calls: int = 0
    _blanks: str = ""
    _open: bool = False
    _skipping: bool = False

    def deltas(self, text: str, last: bool) -> list[dict[str, Any]]:
        """What the client is told of new text; after the last there is no more."""
        parts = self.reader.push(text)
        if last:
            parts += self.reader.finish()
        told = [delta for part in parts for delta in self._delta(part)]
        if last and self._blanks and not self.num_calls:
            told.append({"content": self._blanks})
        return told

    @property
    def calls_are_whole(self) -> bool:
        """Whether there are calls, and none was cut short."""
        return self.num_calls > 0 and not self._open

    def _delta(self, part: Part) -> Iterator[dict[str, Any]]:
        if isinstance(part, Content):
            text = self._blanks + part.text
            shown = text.rstrip()
            self._blanks = text[len(shown) :]
            if shown:
                yield {"content": shown}
            return
        self._blanks = ""
        if isinstance(part, CallBegins):
            self._skipping = self.num_calls > 0 and not self.several
            if not self._skipping:
                self._open = True
                self.num_calls += 1
                function = {"name": part.name, "arguments": ""}
                yield self._call({"id": self._new_id(), "type": "function", "function": function})
        elif isinstance(part, CallArguments):
            if not self._skipping:
                yield self._call({"function": {"arguments": part.text}})
        elif isinstance(part, CallEnds):
            self._open = False

    def _call(self, told: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": self.num_calls - 1, **told}]}

    def _new_id(self) -> str:
        if self.digits_of_id:
            return "".join(secrets.choice(_DIGITS) for _ in range(self.digits_of_id))
        return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(slots=True)
class ToolTalk:
    """The writers of all choices of one answer.

    Attributes:
        make: Makes the writer of one choice.
    """

    make: Callable[[], ToolWriter]
    _writers: dict[int, ToolWriter] = field(default_factory=dict)

    def deltas(self, choice: int, delta: Delta) -> list[dict[str, Any]]:
        """What the client of a stream is told of ``delta``."""
        if choice not in self._writers:
            self._writers[choice] = self.make()
        return self._writers[choice].deltas(delta.text, last=delta.finish_reason is not None)

    def finish_reason(self, choice: int, reason: str) -> str:
        """``tool_calls`` where an answer that came to its end called tools."""
        writer = self._writers.get(choice)
        return "tool_calls" if reason == "stop" and writer is not None and writer.calls_are_whole else reason

    def message(self, choice: Choice) -> tuple[dict[str, Any], str | None]:
        """The fields of a whole message that say what it holds, and why it ended."""
        writer = self.make()
        content, calls = "", []
        for told in writer.deltas(choice.text, last=True):
            content += told.get("content", "")
            for call in told.get("tool_calls", ()):
                if "id" in call:
                    calls.append({key: value for key, value in call.items() if key != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        reason: str | None = choice.finish_reason
        if reason == "stop" and writer.calls_are_whole:
            reason = "tool_calls"
        if not calls:
            return {"content": content}, reason
        return {"content": content or None, "tool_calls": calls}, reason
