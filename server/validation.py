"""From bytes to a checked request body: the one way in for every endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema
from starlette.requests import Request

from .errors import ApiError, invalid


class Body(BaseModel):
    """Base of request bodies.

    Keys that are not known are ignored, since clients send many. Known ones are honoured or
    refused: ``refused`` maps a field to the values that change nothing and the reason why any
    other value is refused. ``null`` is the same as leaving a field out.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The schema with what pydantic cannot know: ``null`` leaves a field out, and what is refused."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema.setdefault("properties", {})
        for name, own in properties.items():
            if name not in schema.get("required", ()) and {"type": "null"} not in own.get("anyOf", ()):
                kept = {key: own.pop(key) for key in ("default", "title", "description") if key in own}
                properties[name] = {"anyOf": [own, {"type": "null"}], **kept}
        for name, (harmless, reason) in cls.refused.items():
            properties[name] = {"enum": [*harmless, None], "description": f"Refused otherwise: {reason}."}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


BodyT = TypeVar("BodyT", bound=Body)


def at_most(count: int) -> BeforeValidator:
    """Counts an object's members before one of them is checked: pydantic writes an error for each of a million."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"at most {count} members")
        return value

    return BeforeValidator(check)


def parse_json(data: bytes, what: str = "body") -> dict[str, Any]:
    """A JSON object. NaN, Infinity, bad UTF-8, lone surrogates and deep nesting are refused.

    Args:
        what: The word for ``data`` in messages.

    Raises:
        ApiError: 400.
    """
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The {what} is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The {what} must be a JSON object.", code="invalid_json")
    return value


def validate(model: type[BodyT], data: dict[str, Any]) -> BodyT:
    """``data`` as a ``model``.

    Raises:
        ApiError: 400, ``param`` names the field.
    """
    for name, (harmless, reason) in model.refused.items():
        value = data.get(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in harmless):
            raise ApiError(400, f"{name}: {reason}", param=name, code="unsupported_parameter")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise invalid(first, first["loc"]) from None


async def parse_request(request: Request) -> dict[str, Any]:
    """The JSON body of ``request``, not yet checked.

    Only ``application/json`` is taken: a web page of another origin cannot send that to a local
    server without asking first.

    Raises:
        ApiError: 400, or 415 for another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "Send the body with 'Content-Type: application/json'.", code="unsupported_media_type")
    return parse_json(await request.body())


async def read_body(request: Request, model: type[BodyT]) -> BodyT:
    """The checked JSON body of ``request``.

    Raises:
        ApiError: 400, or 415 for another content type.
    """
    return validate(model, await parse_request(request))
