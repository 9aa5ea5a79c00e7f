"""``/openapi.json``: routes read their bodies and write their answers themselves, so FastAPI does not see them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from .openapi_answers import ANSWERS, ERROR
from .validation import Body

_METHODS = ("get", "post", "put", "delete")


def body_schema(*models: type[Body]) -> dict[str, Any]:
    """``openapi_extra`` for a route whose body is one of ``models``."""
    schemas = [_inlined(TypeAdapter(model).json_schema()) for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_app(app: FastAPI, locked: bool) -> None:
    """Completes what ``app`` says of itself: its answers, the one shape of errors, and the key it asks for.

    Args:
        app: With all its routes.
        locked: Whether requests need a key.
    """

    def build() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, methods in document["paths"].items():
                for method in _METHODS:
                    if method in methods:
                        _complete(methods[method], path, method)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape, which no error here has
                schemas.pop(name, None)
            schemas["Error"] = ERROR
            if locked:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], path: str, method: str) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for statuses, words in (("4XX", "The request was refused."), ("5XX", "The server failed, or takes no requests.")):
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses[statuses] = {"description": words, "content": content}
    if path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    elif (path, method) in ANSWERS:
        schema, streams = ANSWERS[path, method]
        responses["200"]["content"] = {"application/json": {"schema": schema}}
        if streams:
            responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Puts definitions where they are used; an OpenAPI document has no ``$defs`` of its own."""
    definitions: dict[str, Any] = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return walk(definitions[node["$ref"].rpartition("/")[2]])
        return {key: walk(value) for key, value in node.items()}

    inlined: dict[str, Any] = walk(schema)
    return inlined
