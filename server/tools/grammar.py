"""Grammars that make an answer calls of tools, or calls or something else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..grammar.source import BLANKS, MAX_TOOLS_BYTES, GrammarRefused, GrammarSource
from .families import Family
from .schemas import Tool

MAX_FORCED_CALLS = 16  # a weak model would go on calling until its context is full


def calls_only(
    family: Family,
    tools: Sequence[Tool],
    several: bool,
    special: Mapping[str, int],
    answer: GrammarSource | None = None,
) -> GrammarSource:
    """Answers that call ``tools``, at least once.

    A tool that is not ``strict`` may have a schema that cannot be held to the letter: keywords that are not
    implemented are then let go.

    Args:
        family: How calls are written.
        tools: At least one.
        several: Whether more than one call is allowed.
        special: Ids of the model's special tokens.
        answer: What the answer may be instead, as JSON.

    Raises:
        GrammarRefused: the schemas are too large together.
    """
    rules = []
    for number, tool in enumerate(tools):
        options = {"whitespace_pattern": BLANKS, "lenient": not tool.function.strict}
        schema = json.dumps({**tool.function.parameters, "x-guidance": options}, ensure_ascii=False)
        head = _quoted(f'{{"name": {json.dumps(tool.function.name)}, "{family.arguments}": ')
        rules.append(f"t{number}: {head} a{number} {_quoted('}')}\na{number}: %json {schema}")
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
        schema = json.loads(answer.text)
        options = {"whitespace_pattern": BLANKS, "lenient": False}
        rules.append(f"answer: %json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}")
    text = "\n".join([f"start: calls{' | answer' if answer else ''}", *rules])
    if len(text.encode()) > MAX_TOOLS_BYTES:
        raise GrammarRefused(f"all schemas together have at most {MAX_TOOLS_BYTES} bytes", "tools")
    return GrammarSource("lark", text, "tools" if answer is None else answer.param)


def _marker(text: str, special: Mapping[str, int]) -> str:
    return f"<[{special[text]}]>" if text in special else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text)
