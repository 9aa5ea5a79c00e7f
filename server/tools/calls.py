"""From text to calls: what counts as one, and where JSON in a growing text ends."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of ``name``; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the last call's arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The last call is complete."""


Part = Content | CallBegins | CallArguments | CallEnds


class JsonEnd:
    """Finds where a JSON object or list ends, in text that comes in pieces; each character is looked at once."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str, start: int = 0) -> int | None:
        """The index behind the end, if it lies in ``text[start:]``, which goes on where the last piece ended."""
        for index in range(start, len(text)):
            char = text[index]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None


def load(text: str) -> Any:
    """``text`` as strict JSON; ``None`` if it is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def call_of(value: Any, names: Collection[str]) -> list[Part] | None:
    """The parts of a call, if ``value`` is one of a function in ``names`` with an object of arguments."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or value["name"] not in names:
        return None
    return call_named(value["name"], value.get("arguments", value.get("parameters")))


def call_named(name: str, arguments: Any) -> list[Part] | None:
    """The parts of a call of ``name``, if its arguments are an object."""
    if isinstance(arguments, str):
        arguments = load(arguments)
    if not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a number such as 1e999
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
        text = json.dumps(arguments)
    return [CallBegins(name), CallArguments(text), CallEnds()]


def calls_of(value: Any, names: Collection[str]) -> list[Part] | None:
    """As ``call_of``, for one call or a list of them; one that is wrong makes the list wrong."""
    parts: list[Part] = []
    for item in value if isinstance(value, list) else [value]:
        call = call_of(item, names)
        if call is None:
            return None
        parts += call
    return parts or None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
