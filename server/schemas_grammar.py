"""Fields that constrain the whole answer: OpenAI's, vLLM's, and vLLM's older ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from .grammar.source import (
    GrammarRefused,
    GrammarSource,
    choice_source,
    grammar_source,
    json_source,
    regex_source,
)
from .validation import Body

_ANY_OBJECT = {"type": "object"}
_SCHEMA: dict[str, Any] = {"type": ["object", "string", "boolean"]}
_WRITERS: Mapping[str, Callable[[Any, str], GrammarSource]] = {
    "json": json_source,
    "regex": regex_source,
    "choice": choice_source,
    "grammar": grammar_source,
}


class JsonSchemaFormat(Body):
    """``response_format.json_schema``. The answer keeps to ``schema`` whether or not ``strict`` is set."""

    name: str = Field("", max_length=64)
    description: str | None = None
    schema_: Any = Field(alias="schema", json_schema_extra={"type": ["object", "boolean"]})
    strict: bool = False


class ResponseFormat(Body):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Body):
    """``structured_outputs``: one of these."""

    json_: Any = Field(None, alias="json", json_schema_extra=_SCHEMA)
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = Field(None, fail_fast=True)
    grammar: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_others(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, value in data.items():
                if name not in ("json", "json_object", "regex", "choice", "grammar") and value not in (None, False):
                    raise ValueError(f"{str(name)[:64]!r} is not supported")
        return data


class GrammarBody(Body):
    """The fields of a request that constrain its answer; at most one of them may be used."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = Field(None, json_schema_extra=_SCHEMA)
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, fail_fast=True)
    guided_grammar: str | None = None

    def grammar(self) -> GrammarSource | None:
        """What constrains the answer, ``None`` if nothing does.

        Raises:
            GrammarRefused: it is too large, or there are two constraints.
        """
        found: list[tuple[str, str, Any]] = []
        form = self.response_format
        if form is not None and form.type != "text":
            if form.type == "json_object":
                found.append(("json", "response_format", _ANY_OBJECT))
            elif form.json_schema is None:
                raise GrammarRefused("json_schema is missing", "response_format.json_schema")
            else:
                found.append(("json", "response_format.json_schema.schema", form.json_schema.schema_))
        given = self.structured_outputs
        if given is not None:
            options = {"json": given.json_, "regex": given.regex, "choice": given.choice, "grammar": given.grammar}
            if given.json_object:
                found.append(("json", "structured_outputs.json_object", _ANY_OBJECT))
            found += [
                (kind, f"structured_outputs.{kind}", value) for kind, value in options.items() if value is not None
            ]
            if not found or not found[-1][1].startswith("structured_outputs"):
                raise GrammarRefused(
                    "one of json, json_object, regex, choice and grammar is needed", "structured_outputs"
                )
        for kind in _WRITERS:
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                found.append((kind, f"guided_{kind}", value))
        if not found:
            return None
        if len(found) > 1:
            raise GrammarRefused(f"{found[0][1]} constrains the answer already", found[1][1])
        kind, param, value = found[0]
        return _WRITERS[kind](value, param)
