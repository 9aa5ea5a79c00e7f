"""What an answer must look like, as a request says it, and how large that may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .schema import not_held, texts

MAX_SCHEMA_BYTES = 64 * 2**10  # one object of 2,200 properties took 1.0 s to compile, and time grows with the square
MAX_GRAMMAR_BYTES = 64 * 2**10
MAX_TOOLS_BYTES = 256 * 2**10
MAX_REGEX_CHARS = 4096
MAX_OPTIONS = 1024
MAX_DEPTH = 64

# ``lark`` is a grammar that the server itself wrote around schemas of a request.
Kind = Literal["json", "regex", "choice", "grammar", "lark"]


class GrammarRefused(Exception):
    """A grammar that is wrong, too large, or takes too long; the text is meant for the caller."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """A constraint on a whole answer.

    Attributes:
        kind: How ``text`` is to be read.
        text: JSON Schema, regular expression, JSON list of strings, or a grammar in Lark's or llama.cpp's notation.
        param: The field of the request that it came from.
        schemas: JSON schemas that stand in a ``lark`` grammar.
        parts: By name, the functions whose calls a ``lark`` grammar describes, each alone.
        loosened: The same with any arguments for functions of these names, for where they are refused alone; ``None``
            in a part that must be held to.
    """

    kind: Kind
    text: str
    param: str
    schemas: tuple[str, ...] = ()
    parts: Mapping[str, GrammarSource] = field(default_factory=dict, compare=False)
    loosened: Callable[[frozenset[str]], GrammarSource] | None = field(default=None, compare=False)


def json_source(schema: Any, param: str) -> GrammarSource:
    """JSON that ``schema`` (an object, a boolean, or its JSON text) allows.

    Raises:
        GrammarRefused: it is no schema, too long or too deep.
    """
    if isinstance(schema, str):
        if len(schema.encode()) > MAX_SCHEMA_BYTES:
            raise GrammarRefused(f"a schema has at most {MAX_SCHEMA_BYTES} bytes", param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise GrammarRefused("the schema is not valid JSON", param) from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarRefused("no text satisfies it" if schema is False else "a schema is a JSON object", param)
    check_depth(schema, param)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except ValueError:  # 1e999 is read as infinity
        raise GrammarRefused("the schema holds NaN or a number too large for floats", param) from None
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarRefused("the schema holds half of a pair of surrogates", param) from None
    if size > MAX_SCHEMA_BYTES:
        raise GrammarRefused(f"a schema has at most {MAX_SCHEMA_BYTES} bytes", param)
    if reason := not_held(schema):
        raise GrammarRefused(reason, param)
    return GrammarSource("json", text, param)


def regex_source(pattern: str, param: str) -> GrammarSource:
    """Text that ``pattern`` matches as a whole.

    Raises:
        GrammarRefused: it is too long.
    """
    if len(pattern) > MAX_REGEX_CHARS:
        raise GrammarRefused(f"a regular expression has at most {MAX_REGEX_CHARS} characters", param)
    return GrammarSource("regex", pattern, param)


def choice_source(options: list[str], param: str) -> GrammarSource:
    """One of ``options``.

    Raises:
        GrammarRefused: there are none, too many, or they are too long.
    """
    if not options or not all(isinstance(option, str) and option for option in options):
        raise GrammarRefused("the options are a list of strings that are not empty", param)
    text = json.dumps(options, ensure_ascii=False)
    if len(options) > MAX_OPTIONS or len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarRefused(f"there are at most {MAX_OPTIONS} options of {MAX_GRAMMAR_BYTES} bytes in all", param)
    return GrammarSource("choice", text, param)


def grammar_source(text: str, param: str) -> GrammarSource:
    """Text that a context-free grammar derives, in Lark's notation (rule ``start``) or GBNF (rule ``root``).

    Raises:
        GrammarRefused: it is too long.
    """
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarRefused(f"a grammar has at most {MAX_GRAMMAR_BYTES} bytes", param)
    return GrammarSource("grammar", text, param)


def literals(source: GrammarSource) -> Iterator[str]:
    """Texts that an answer may have to hold, as far as they stand there in one piece; of a request's grammar none."""
    if source.kind == "regex":
        yield source.text.replace("\\", "")
    spoken = source.schemas if source.kind == "lark" else [source.text] if source.kind in ("choice", "json") else []
    for text in spoken:
        for literal in texts(json.loads(text)):
            yield literal.replace("\\", "")  # it may be a pattern


def check_depth(value: Any, param: str) -> None:
    """Refuses JSON values nested deeper than ``MAX_DEPTH``.

    Raises:
        GrammarRefused: it is.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise GrammarRefused(f"a schema is nested at most {MAX_DEPTH} deep", param)
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
