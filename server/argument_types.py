"""Types of command line values, with errors in the caller's terms. Loads no model library, since help needs them."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

from foveate.sparse_attn import registry


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values with commas between; each counts once, in the order given."""

    def parse(text: str) -> list[Any]:
        return list(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return parse


def one_of(names: tuple[str, ...], what: str) -> Callable[[str], str]:
    """One of ``names``; the error lists them and calls them ``what``."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"there is no {what} {text!r}; there are: {', '.join(names)}")
        return text

    return parse


def readable(text: str) -> str:
    """Text for a model; bytes of an argument that are no UTF-8 come as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not valid UTF-8") from None
    return text


def whole(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def policy(text: str) -> dict[str, Any]:
    """An attention policy as JSON: ``{"scheme": NAME, option: value, ...}``."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(given, dict) or given.get("scheme") not in registry.names():
        raise argparse.ArgumentTypeError(
            f'a policy is {{"scheme": NAME, option: value, ...}}; schemes: {", ".join(registry.names())}'
        )
    return given


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
