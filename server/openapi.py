"""Request bodies in ``/openapi.json``: routes read their body themselves, so FastAPI does not see it."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from .validation import Body


def body_schema(*models: type[Body]) -> dict[str, Any]:
    """``openapi_extra`` for a route whose body is one of ``models``."""
    schemas = [_inlined(TypeAdapter(model).json_schema()) for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


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
