"""From a request's ``attention`` field to a scheme that fits the model."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.protocol import Scheme

from .loader import LoadedModel

_KEPT = 1024  # schemes with different options; a client can make up any number of them


class SchemeBuilder:
    """Builds schemes for one model; equal choices give the same object, so that they share kernel calls.

    Args:
        loaded: The model, with its profiles.
        default: The server's own choice; dense if ``None``.
    """

    def __init__(self, loaded: LoadedModel, default: str | dict[str, Any] | None) -> None:
        self._loaded = loaded
        self._default = {"scheme": "dense", **_options(default or {})}
        self._kept = lru_cache(maxsize=_KEPT)(self._make)

    def build(self, attention: str | dict[str, Any] | None) -> Scheme:
        """The scheme of a request, by its name or with options; ``None`` is the default.

        Raises:
            SchemeError: no such scheme or option, or it does not fit this model.
        """
        given = _options(self._default if attention is None else attention)
        name = given.pop("scheme", self._default["scheme"])
        return self._kept(name, json.dumps(given, sort_keys=True))

    def _make(self, name: str, options: str) -> Scheme:
        scheme = registry.build(name, self._loaded.profiles, **json.loads(options))
        if scheme.moves_positions and self._loaded.rotary is None:
            raise SchemeConfigError(
                f"{name} moves positions, but the rotary embedding of this model is of a kind that cannot be moved"
            )
        return scheme


def _options(attention: str | dict[str, Any]) -> dict[str, Any]:
    return {"scheme": attention} if isinstance(attention, str) else dict(attention)
