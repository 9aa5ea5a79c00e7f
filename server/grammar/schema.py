"""JSON schemas as the grammar library must be told them, and what of them it would not hold to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import floor
from typing import Any, Literal

# Blanks between the parts of a JSON text: without a bound, a weak model may write nothing else for ever.
BLANKS = r" |\n[ \t]{0,40}"
# With all escapes "\u0061" is a name other than "a" to the library, and so escapes the schema of the property "a".
_ESCAPES = 'nrbtf\\"'

# What a value within a schema is: a schema or a keyword's value, a mapping of names to schemas, or a part of an answer.
Place = Literal["schema", "names", "data"]
_NAMES = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_DATA = frozenset({"const", "enum"})
# Keywords that are about a schema, and no text of an answer.
_REMARKS = frozenset({"title", "description", "$comment", "examples", "default"})


def for_library(schema: Mapping[str, Any], lenient: bool) -> str:
    """A schema as JSON, with the library's options in it.

    Args:
        schema: As the request has it. Options of its own would let keywords go, and are overwritten.
        lenient: Whether keywords that are not implemented are let go.
    """
    options: dict[str, Any] = {"whitespace_pattern": BLANKS, "lenient": lenient}
    if not any(char < " " and char not in "\n\r\b\t\f" for text in texts(schema) for char in text):
        options["json_allowed_escapes"] = _ESCAPES
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def texts(schema: Any) -> Iterator[str]:
    """Texts, names and patterns that an answer may have to hold."""
    for value, _ in _walk(schema):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value


def not_held(schema: Any) -> str | None:
    """Why answers could break ``schema`` without the library's saying so; ``None`` if they cannot.

    It computes with floats, takes an open bound for a closed one where no whole number lies between the two, and
    forgets ``prefixItems`` beside ``additionalItems`` (llguidance 1.9).
    """
    for value, place in _walk(schema):
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and (abs(value) >= 2**63 or int(float(value)) != value)
        ):
            return f"it holds {value if abs(value) < 10**30 else 'a whole number'}, which a float cannot hold"
        if place != "schema" or not isinstance(value, dict):
            continue
        if "additionalItems" in value and "prefixItems" in value:
            return "additionalItems has no meaning beside prefixItems; items says what comes behind them"
        if value.get("type") != "integer" and _open_bound_leaks(value):
            return "an exclusive bound is not implemented where the other bound is less than 1 away"
    return None


def _open_bound_leaks(schema: Mapping[str, Any]) -> bool:
    numbers = {
        key: value for key, value in schema.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    above, below = numbers.get("exclusiveMinimum"), numbers.get("exclusiveMaximum")
    least = max((numbers[key] for key in ("minimum", "exclusiveMinimum") if key in numbers), default=None)
    most = min((numbers[key] for key in ("maximum", "exclusiveMaximum") if key in numbers), default=None)
    if least is None or most is None:
        return False
    return (above is not None and above == floor(above) >= 0 and most < above + 1) or (
        below is not None and below == floor(below) <= 0 and least > below - 1
    )


def _walk(schema: Any) -> Iterator[tuple[Any, Place]]:
    """Every value within a schema, itself included, but remarks."""
    left: list[tuple[Any, Place]] = [(schema, "schema")]
    while left:
        value, place = left.pop()
        yield value, place
        if isinstance(value, list):
            left += [(inner, place) for inner in value]
        elif isinstance(value, dict):
            left += [
                (inner, _place_of(key, place))
                for key, inner in value.items()
                if place != "schema" or key not in _REMARKS
            ]


def _place_of(key: str, place: Place) -> Place:
    if place == "schema":
        return "names" if key in _NAMES else "data" if key in _DATA else "schema"
    return "schema" if place == "names" else "data"
