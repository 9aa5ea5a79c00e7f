"""The HTTP request that the code at hand works for: what the log says of it, and where its trace goes."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .request import Usage
    from .tracing import RequestTrace


@dataclass(slots=True)
class CurrentRequest:
    """One HTTP request.

    Attributes:
        label: Its ``x-request-id``: the client's own if that is fit to be shown, else made here.
        fields: What its line in the log says beside method, path, status and duration.
        trace: Its span, where traces are made.
    """

    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    trace: RequestTrace | None = None

    def add(self, usage: Usage) -> None:
        """Counts one more prompt of it."""
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            self.fields[name] = self.fields.get(name, 0) + getattr(usage, name)
        self.fields["scheme"] = usage.scheme


CURRENT: ContextVar[CurrentRequest | None] = ContextVar("foveate_request", default=None)
