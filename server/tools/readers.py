"""Readers of answers: which part of a growing text is content, which is calls.

Where the model is free, a call goes out once it is complete: only then is it known to be one, and whatever turns out
to be none goes out as the text that it is. Where a grammar forces calls, they go out as they grow.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Protocol

from .calls import CallArguments, CallBegins, CallEnds, Content, JsonEnd, Part, call_named, calls_of, load
from .families import Family

_NAME_BEFORE = re.compile(r"\s*([a-zA-Z0-9_.-]{1,64})(?:\[CALL_ID\][a-zA-Z0-9]{1,64})?(?:\[ARGS\])?\s*(?=\{)")
_MAX_BEFORE = 256  # characters between a marker and the brace behind it
_HEAD = re.compile(r'\{"name": "([a-zA-Z0-9_.-]{1,64})", "(?:arguments|parameters)": (?=\{)')
_BETWEEN = " \t\r\n;,"


class Reader(Protocol):
    """Takes the text of one choice, piece by piece."""

    def push(self, text: str) -> list[Part]:
        """What ``text`` makes certain."""
        ...

    def finish(self) -> list[Part]:
        """The rest, at the end of the answer."""
        ...


def reader_of(family: Family, names: Collection[str], forced: bool) -> Reader:
    """A reader for one choice.

    Args:
        family: How the model writes calls.
        names: Functions that there are.
        forced: Whether ``grammar.calls_only`` holds the answer.
    """
    if forced:
        return ForcedReader()
    return MarkedReader(family, names) if family.begin else WholeReader(family, names)


class ForcedReader:
    """Calls as the server's own grammar writes them, and nothing else."""

    def __init__(self) -> None:
        self._held = ""
        self._end: JsonEnd | None = None

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        self._held += text
        while self._held:
            if self._end is None:
                head = _HEAD.search(self._held)
                if head is None:
                    break
                parts.append(CallBegins(head[1]))
                self._held = self._held[head.end() :]
                self._end = JsonEnd()
            end = self._end.find(self._held)
            piece, self._held = self._held[:end], self._held[len(self._held) if end is None else end :]
            if piece:
                parts.append(CallArguments(piece))
            if end is not None:
                parts.append(CallEnds())
                self._end = None
        return parts

    def finish(self) -> list[Part]:
        return []


class MarkedReader:
    """Text with calls behind a marker."""

    def __init__(self, family: Family, names: Collection[str]) -> None:
        self._family = family
        self._names = names
        self._held = ""  # begins with the marker once that is complete
        self._seen = 0  # characters of it that were looked at
        self._end: JsonEnd | None = None  # of the JSON behind the marker, while it grows
        self._start = 0  # where that begins
        self._call: list[Part] | None = None  # read, but what must follow it is not there yet

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._step(parts, last=False):
            pass
        return parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        while self._step(parts, last=True):
            pass
        if self._held:
            parts.append(Content(self._held))
            self._held = ""
        return parts

    def _step(self, parts: list[Part], last: bool) -> bool:
        """Moves on in the held text; false when more text is needed."""
        begin = self._family.begin
        if not self._held.startswith(begin):
            return self._skip_text(parts)
        if self._call is not None:
            return self._close(parts, last)
        if self._end is None:
            return self._find_json(parts)
        end = self._end.find(self._held, self._seen)
        self._seen = len(self._held)
        if end is None:
            return False
        name = _NAME_BEFORE.match(self._held, len(begin)) if self._family.listed else None
        value = load(self._held[self._start : end])
        self._call = call_named(name[1], value) if name and name[1] in self._names else calls_of(value, self._names)
        self._seen = end
        if self._call is None or (name and name[1] not in self._names):
            self._release(parts, end)
        return True

    def _skip_text(self, parts: list[Part]) -> bool:
        """Lets go what stands before a marker, or cannot become one."""
        begin = self._family.begin
        at = self._held.find(begin)
        if at < 0:
            at = next(
                (
                    i
                    for i in range(max(0, len(self._held) - len(begin) + 1), len(self._held))
                    if begin.startswith(self._held[i:])
                ),
                len(self._held),
            )
        if at:
            self._release(parts, at)
        return self._held.startswith(begin)

    def _find_json(self, parts: list[Part]) -> bool:
        """Finds the brace or bracket behind the marker."""
        begin = self._family.begin
        rest = self._held[len(begin) : len(begin) + _MAX_BEFORE + 1]
        blank = len(rest) - len(rest.lstrip())
        start = rest[blank : blank + 1]
        if start == "{" or (start == "[" and self._family.listed):
            self._start = len(begin) + blank
        elif self._family.listed and (name := _NAME_BEFORE.match(rest)):
            self._start = len(begin) + name.end()
        elif len(rest) > _MAX_BEFORE or (start and not self._family.listed) or "{" in rest:
            self._release(parts, len(begin))
            return True
        else:
            return False
        self._end, self._seen = JsonEnd(), self._start
        return True

    def _close(self, parts: list[Part], last: bool) -> bool:
        """Takes the marker behind a call; one that ends the answer may lack it."""
        rest, end = self._held[self._seen :], self._family.end
        text = rest.lstrip()
        if end and not text.startswith(end):
            if not (last and not text) and not (end.startswith(text) and not last):
                self._release(parts, self._seen)
                return True
            if not last:
                return False
        assert self._call is not None
        parts += self._call
        self._forget(self._seen + (len(rest) - len(text) + len(end) if end else 0))
        return True

    def _release(self, parts: list[Part], length: int) -> None:
        parts.append(Content(self._held[:length]))
        self._forget(length)

    def _forget(self, length: int) -> None:
        self._held = self._held[length:]
        self._seen, self._end, self._call = 0, None, None


class WholeReader:
    """An answer that is calls as a whole, or text."""

    def __init__(self, family: Family, names: Collection[str]) -> None:
        self._begin = family.optional_begin
        self._names = names
        self._held = ""
        self._is_text = False
        self._first: JsonEnd | None = None
        self._seen = 0

    def push(self, text: str) -> list[Part]:
        if self._is_text:
            return [Content(text)] if text else []
        self._held += text
        if self._first is None:
            start = self._json_start()
            if start is None:
                return []
            if start < 0:
                return self._release()
            self._first, self._seen = JsonEnd(), start
        if self._seen >= 0:
            start = self._seen
            end = self._first.find(self._held, start)
            self._seen = len(self._held)
            if end is not None:
                # What comes behind the first value is only looked at in the end.
                self._seen = -1
                if self._calls(self._held[:end]) is None:
                    return self._release()
        return []

    def finish(self) -> list[Part]:
        return self._calls(self._held) or ([Content(self._held)] if self._held else [])

    def _release(self) -> list[Part]:
        self._is_text = True
        text, self._held = self._held, ""
        return [Content(text)] if text else []

    def _json_start(self) -> int | None:
        """Where JSON begins; -1 if the answer is text, ``None`` if that is not known yet."""
        text = self._held.lstrip()
        if not text:
            return None
        if self._begin and text.startswith(self._begin):
            text = text[len(self._begin) :].lstrip()
            if not text:
                return None
        elif self._begin.startswith(text):
            return None
        return len(self._held) - len(text) if text[0] in "{[" else -1

    def _calls(self, text: str) -> list[Part] | None:
        """The calls that ``text`` is; ``None`` if it is anything else."""
        text = text.strip()
        if self._begin:
            text = text.removeprefix(self._begin).strip()
        parts: list[Part] = []
        while text:
            if text[0] not in "{[":
                return None
            end = JsonEnd().find(text)
            calls = None if end is None else calls_of(load(text[:end]), self._names)
            if calls is None:
                return None
            parts += calls
            text = text[end:].lstrip(_BETWEEN)
        return parts or None
