"""How families of models write calls of tools, and which one a chat template belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ParserName = Literal["hermes", "llama3_json", "mistral", "plain"]
_READS_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True, slots=True)
class Family:
    """One way to write calls.

    Attributes:
        name: Value of the setting ``tool_parser``.
        begin: What stands before each call, or before all of them; empty if the whole answer is calls or text.
        end: What stands behind each.
        arguments: Key of the arguments.
        between: What separates two calls, where the server writes the grammar.
        listed: Calls are one JSON list.
        optional_begin: May stand before an answer that is calls.
        markers: Tokens that must stay in the text for calls to be found.
        digits_of_id: An id is so many letters and digits; 0 for OpenAI's kind.
    """

    name: ParserName
    begin: str = ""
    end: str = ""
    arguments: str = "arguments"
    between: str = "\n"
    listed: bool = False
    optional_begin: str = ""
    markers: tuple[str, ...] = ()
    digits_of_id: int = 0


# hermes: Qwen 2.5 and 3, Hermes 2 Pro, SmolLM3. llama3_json: Llama 3.1 to 3.3. mistral: the ids of its templates have
# nine characters.
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("hermes", "<tool_call>", "</tool_call>", markers=("<tool_call>", "</tool_call>")),
        Family(
            "llama3_json",
            arguments="parameters",
            between="; ",
            optional_begin="<|python_tag|>",
            markers=("<|python_tag|>",),
        ),
        Family(
            "mistral",
            "[TOOL_CALLS]",
            between=", ",
            listed=True,
            markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
            digits_of_id=9,
        ),
        Family("plain"),
    )
}


def reads_tools(template: str) -> bool:
    """Whether a chat template writes the tools that it is given."""
    return _READS_TOOLS.search(template) is not None


def family_of(template: str) -> Family:
    """The family that a chat template belongs to; ``plain`` for those of no known one."""
    if "[TOOL_CALLS]" in template:
        return FAMILIES["mistral"]
    if "<tool_call>" in template and "<function=" not in template:  # Qwen3-Coder's calls are no JSON
        return FAMILIES["hermes"]
    if reads_tools(template) and ("<|python_tag|>" in template or '"parameters": dictionary' in template):
        return FAMILIES["llama3_json"]
    return FAMILIES["plain"]
