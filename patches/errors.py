"""Errors of attaching to a model.

PatchError
├── UnsupportedModel     its attention is not one that pages can serve; the message says why
│   └── UnsupportedRotary    its rotary embedding is of an unknown kind
├── UnsupportedCall      this forward pass asks for something that paged attention does not do
├── QuantizationError    its weights cannot be quantised so
├── AttachError          attached already, used after detaching, or its attention was changed between
└── CacheExhausted       the KV pool is full (also an ``OutOfPages``); the message says what to pass
"""

from __future__ import annotations

from foveate.kv_cache.errors import OutOfPages


class PatchError(Exception):
    """Base of every error that ``foveate.patches`` raises."""


class UnsupportedModel(PatchError, ValueError):
    """The model's attention is not one that pages can serve."""


class UnsupportedRotary(UnsupportedModel):
    """The model's rotary embedding is of an unknown kind."""


class UnsupportedCall(PatchError, ValueError):
    """A forward pass asks for something that paged attention does not do."""


class QuantizationError(PatchError, ValueError):
    """The model's weights cannot be quantised so."""


class AttachError(PatchError, RuntimeError):
    """The model is attached already, something is used after detaching, or its attention was changed between."""


class CacheExhausted(PatchError, OutOfPages):  # type: ignore[misc, unused-ignore]
    """The KV pool of an attached model is full."""

    def __init__(self, cause: OutOfPages, num_pages: int, page_size: int) -> None:
        OutOfPages.__init__(self, cause.wanted, cause.available)
        self.args = (
            f"the KV cache is full: {cause.wanted} more pages wanted, {cause.available} available of {num_pages} "
            f"({num_pages * page_size} tokens). Pass attach(..., num_pages=) with more pages (one page holds "
            f"{page_size} tokens; count prompt and answer of every sequence and beam), or drop caches that "
            "earlier calls returned.",
        )
