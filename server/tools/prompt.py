"""Tools for models whose chat template knows nothing of them: in words, in the messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .schemas import Tool

_INTRODUCTION = (
    "You can call the functions below. To call one, answer with nothing but a JSON object on one line: "
    '{"name": "FUNCTION", "arguments": {...}}. To call several, write one such line for each.'
)


def in_words(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same chat in system, user and assistant messages without calls.

    Calls become the text in which ``plain`` answers write them, and results become the user's words.

    Args:
        messages: As templates read them.
        tools: Those on offer; may be empty.
    """
    told: list[dict[str, Any]] = []
    if tools:
        functions = [json.dumps(tool.for_template()["function"], ensure_ascii=False) for tool in tools]
        text = "\n".join([_INTRODUCTION, *functions])
        first = messages[0] if messages and messages[0]["role"] == "system" else None
        told.append({"role": "system", "content": f"{first['content']}\n\n{text}" if first else text})
        messages = messages[1:] if first else messages
    names: dict[str, str] = {}
    after_result = False
    for message in messages:
        if message["role"] == "tool":
            name = names.get(message["tool_call_id"], message["tool_call_id"])
            text = f"Result of {name}: {message['content']}"
            if after_result:
                told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n{text}"}
            else:
                told.append({"role": "user", "content": text})
        else:
            calls = message.get("tool_calls", [])
            names |= {call["id"]: call["function"]["name"] for call in calls}
            lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            content = "\n".join([*([message["content"]] if message["content"] else []), *lines])
            told.append({**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content})
        after_result = message["role"] == "tool"
    return told
