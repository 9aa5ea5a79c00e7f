"""What one chat request does with tools: offers, forces, reads and writes calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..grammar.source import GrammarRefused, GrammarSource
from ..schemas_chat import ChatBody
from .answer import ToolTalk, ToolWriter
from .families import Family
from .grammar import calls_only
from .readers import reader_of
from .schemas import NamedChoice, Tool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """
    Attributes:
        family: How the model writes calls.
        special: Ids of the model's special tokens.
        tools: Those that may be called; not empty.
        forced: Whether the answer must be calls.
        several: Whether it may hold more than one.
    """

    family: Family
    special: Mapping[str, int]
    tools: Sequence[Tool]
    forced: bool
    several: bool

    def grammar(self, answer: GrammarSource | None) -> GrammarSource | None:
        """What constrains the answer; ``answer`` is what constrains it where it calls nothing.

        Raises:
            GrammarRefused: that is no JSON schema, or the schemas are too large.
        """
        if answer is not None and answer.kind != "json":
            raise GrammarRefused(
                'with tools an answer can only be constrained to JSON, or set tool_choice to "none"', answer.param
            )
        if self.forced:  # the answer holds calls alone: there is no text that could be JSON
            answer = None
        elif answer is None:
            return None
        return calls_only(self.family, self.tools, self.several, self.special, answer)

    def talk(self) -> ToolTalk:
        """Writes the choices of one answer."""
        names = frozenset(tool.function.name for tool in self.tools)
        return ToolTalk(
            lambda: ToolWriter(reader_of(self.family, names, self.forced), self.several, self.family.digits_of_id)
        )

    @property
    def visible_ids(self) -> tuple[int, ...]:
        """Special tokens without which calls could not be found in the text."""
        return tuple(self.special[marker] for marker in self.family.markers if marker in self.special)


def tool_use(body: ChatBody, family: Family, special: Mapping[str, int]) -> ToolUse | None:
    """What ``body`` wants of tools; ``None`` if nothing."""
    tools = body.offered_tools
    if not tools:
        return None
    choice = body.tool_choice
    if isinstance(choice, NamedChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        return ToolUse(family, special, tools, forced=True, several=False)
    return ToolUse(family, special, tools, choice == "required", body.parallel_tool_calls)
