"""What the input of a response is made of, and the chat messages that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from .schemas_chat import MAX_PARTS
from .tools.schemas import Function
from .validation import Body

_TEXT_ONLY = "this server reads and writes text only"
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"enum": ["input_text", "output_text", "text"]}, "text": {"type": "string"}},
}
_TEXT = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "maxItems": MAX_PARTS, "items": _PART}]})


def _text_or_parts(value: Any) -> str | list[dict[str, Any]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("a text is a string or a list of parts")
    if len(value) > MAX_PARTS:
        raise ValueError(f"a text has at most {MAX_PARTS} parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise ValueError(f'a part is {{"type": "input_text", "text": "..."}}; {_TEXT_ONLY}')
    return [{"type": "text", "text": part["text"]} for part in value]


Text = Annotated[str | list[dict[str, Any]], PlainValidator(_text_or_parts), _TEXT]


class InputMessage(Body):
    """One message; what an earlier answer held is taken as it was."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class FunctionCall(Body):
    """A call that an earlier answer made."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(max_length=64)
    arguments: str


class FunctionCallOutput(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: Text


InputItem = InputMessage | FunctionCall | FunctionCallOutput
_ITEMS: Mapping[str, type[InputItem]] = {
    "message": InputMessage,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
}


class _Kind(Body):
    type: Literal["message", "function_call", "function_call_output"] = "message"


def _item(value: Any) -> InputItem:
    """``value`` as the item that its type says: so an error has the path that the client wrote."""
    return _ITEMS[_Kind.model_validate(value).type].model_validate(value)


Item = Annotated[InputItem, PlainValidator(_item, json_schema_input_type=InputItem)]


class FunctionTool(Function):
    """``tools[]``: as in chat, but flat."""

    type: Literal["function"]

    def as_in_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class _FunctionKind(Body):
    type: Literal["function"]


def _tool(value: Any) -> FunctionTool:
    """``value`` as a tool; of one of another kind, the kind is what is wrong, and not its fields."""
    _FunctionKind.model_validate(value)
    return FunctionTool.model_validate(value)


OfferedTool = Annotated[FunctionTool, PlainValidator(_tool, json_schema_input_type=FunctionTool)]


def messages_of(items: Iterable[InputItem]) -> list[dict[str, Any]]:
    """The messages of a chat. Calls that follow what the assistant said, or each other, are of one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case InputMessage():
                messages.append({"role": item.role, "content": item.content})
            case FunctionCall():
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case FunctionCallOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    return messages
