"""Grammars that make an answer calls of tools, or calls or something else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..grammar.schema import for_library, not_held
from ..grammar.source import MAX_TOOLS_BYTES, GrammarRefused, GrammarSource
from .families import Family
from .schemas import Tool

MAX_FORCED_CALLS = 16  # a weak model would go on calling until its context is full
_ANY_OBJECT = {"type": "object"}


def calls_only(
    family: Family,
    tools: Sequence[Tool],
    several: bool,
    special: Mapping[str, int],
    answer: GrammarSource | None = None,
    loosened: frozenset[str] = frozenset(),
) -> GrammarSource:
    """Answers that call ``tools``, at least once.

    A tool that is not ``strict`` may have a schema that cannot be held to the letter: keywords that are not
    implemented are then let go, and where the rest cannot be held to either, its arguments are any object.

    Args:
        family: How calls are written.
        tools: At least one.
        several: Whether more than one call is allowed.
        special: Ids of the model's special tokens.
        answer: What the answer may be instead, as JSON.
        loosened: Names of tools whose arguments may be any object.

    Raises:
        GrammarRefused: a strict schema cannot be held to, or the schemas are too large together.
    """
    param = "tools" if answer is None else answer.param
    names = [tool.function.name for tool in tools]
    schemas = [_ANY_OBJECT if tool.function.name in loosened else _held_schema(tool) for tool in tools]
    written = [for_library(schema, not tool.function.strict) for schema, tool in zip(schemas, tools, strict=True)]
    rules = []
    for number, tool in enumerate(tools):
        head = _quoted(f'{{"name": {json.dumps(tool.function.name)}, "{family.arguments}": ')
        rules.append(f"t{number}: {head} a{number} {_quoted('}')}\na{number}: %json {written[number]}")
    call = "(" + " | ".join(f"t{number}" for number in range(len(tools))) + ")"
    if not family.listed:
        begin = f"{_marker(family.begin, special)} {_quoted(chr(10))} " if family.begin else ""
        end = f" {_quoted(chr(10))} {_marker(family.end, special)}" if family.end else ""
        call = f"{begin}{call}{end}"
    rules.append(f"call: {call}")
    calls = f"call ({_quoted(family.between)} call){{0,{MAX_FORCED_CALLS - 1}}}" if several else "call"
    if family.listed:
        calls = f"{_marker(family.begin, special)} {_quoted('[')} {calls} {_quoted(']')}"
    rules.append(f"calls: {calls}")
    if answer is not None:
        rules.append(f"answer: %json {for_library(json.loads(answer.text), lenient=False)}")
    text = "\n".join([f"start: calls{' | answer' if answer else ''}", *rules])
    if len(text.encode()) > MAX_TOOLS_BYTES:
        raise GrammarRefused(f"all schemas together have at most {MAX_TOOLS_BYTES} bytes", "tools")
    again = partial(calls_only, family, tools, several, special, answer)
    return GrammarSource(
        "lark",
        text,
        param,
        schemas=(*(json.dumps(schema) for schema in schemas), *([answer.text] if answer else ())),
        parts={
            name: GrammarSource(
                "lark",
                f"start: a\na: %json {own}",
                "tools",
                schemas=(json.dumps(schema),),
                loosened=None if tool.function.strict else again,
            )
            for name, tool, schema, own in zip(names, tools, schemas, written, strict=True)
        },
        loosened=again,
    )


def _held_schema(tool: Tool) -> Mapping[str, Any]:
    """What the arguments of ``tool`` can be held to."""
    reason = not_held(tool.function.parameters)
    if reason is None:
        return tool.function.parameters
    if tool.function.strict:
        raise GrammarRefused(f"{tool.function.name} is strict, but {reason}", "tools")
    return _ANY_OBJECT


def _marker(text: str, special: Mapping[str, int]) -> str:
    return f"<[{special[text]}]>" if text in special else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text)
