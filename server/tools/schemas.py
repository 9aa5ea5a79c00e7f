"""Tools as a request offers them, and calls as a message repeats them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator

from ..grammar.source import MAX_SCHEMA_BYTES, GrammarRefused, check_depth
from ..validation import Body

MAX_TOOLS = 128
MAX_CALLS = 128
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class Function(Body):
    """``tools[].function``. No ``parameters`` means that it takes none."""

    name: str = Field(pattern=_NAME)
    description: str = Field("", max_length=2**16)
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}, "additionalProperties": False})
    strict: bool = False

    @field_validator("parameters")
    @classmethod
    def _object_of_bounded_size(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("type", "object") != "object":
            raise ValueError('the type of parameters is "object"')
        try:
            check_depth(value, "parameters")
        except GrammarRefused as error:
            raise ValueError(str(error)) from None
        if len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) > MAX_SCHEMA_BYTES:
            raise ValueError(f"a schema has at most {MAX_SCHEMA_BYTES} bytes")
        return {"type": "object", **value}


class Tool(Body):
    """``tools[]``."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        told = self.function
        described = {"description": told.description, "parameters": told.parameters}
        return {"type": "function", "function": {"name": told.name, **described}}


class ChosenFunction(Body):
    name: str = Field(max_length=64)


class NamedChoice(Body):
    """``tool_choice`` as an object."""

    type: Literal["function"]
    function: ChosenFunction


class CalledFunction(Body):
    name: str = Field(max_length=64)
    arguments: str

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it: with the arguments as an object, if they are one."""
        try:
            arguments = json.loads(self.arguments)
        except (ValueError, RecursionError):
            arguments = self.arguments
        return {"name": self.name, "arguments": arguments}


class ToolCall(Body):
    """``messages[].tool_calls[]``."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it."""
        return {"id": self.id, "type": "function", "function": self.function.for_template()}
