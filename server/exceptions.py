"""Errors that the engine raises to whoever starts it or submits a request.

EngineError
├── ModelNotLoaded      weights or tokenizer cannot be read; the message says why
├── RequestRefused      this request can never run
│   ├── InvalidRequest      a value is out of range; ``param`` names it
│   ├── ContextOverflow     prompt and answer do not fit the model's context
│   └── PoolTooSmall        prompt and answer do not fit the KV pool
├── QueueFull           too much is waiting already; try again later
├── EngineDead          the engine has stopped
├── RequestAborted      the caller cut the request off
├── BadLogits           the model gave NaN for this request
├── NoTokenLeft         what the request forbids leaves no token to draw
├── RequestFailed       the server failed at this request alone
└── StepFailed          the step that computed this request failed
"""

from __future__ import annotations

import math


class EngineError(Exception):
    """Base of every error of the engine."""


class ModelNotLoaded(EngineError):
    """Weights or tokenizer cannot be read, or are not whole."""


class RequestRefused(EngineError):
    """This request can never run as it is.

    Attributes:
        request_id: Of the request, where several came at once.
    """

    request_id: str | None = None


class InvalidRequest(RequestRefused):
    """A value is out of range."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextOverflow(RequestRefused):
    """Prompt and answer do not fit the model's context."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context: int) -> None:
        super().__init__(
            f"This model's maximum context length is {context} tokens. However, you requested "
            f"{prompt_tokens + max_tokens} tokens ({prompt_tokens} in the prompt, {max_tokens} in the "
            "completion). Please reduce the length of the prompt or the completion."
        )


class PoolTooSmall(RequestRefused):
    """Prompt and answer do not fit the KV pool."""

    def __init__(self, tokens: int, capacity: int) -> None:
        super().__init__(
            f"The request needs room for {tokens} tokens, but the KV cache holds {capacity}. "
            "Start the server with a larger --kv-cache-gib, or shorten the prompt or max_tokens."
        )


class QueueFull(EngineError):
    """Too much is waiting already.

    Args:
        waiting: What waits, as a message says it.
        retry_seconds: When there may be room again.
    """

    def __init__(self, waiting: str, retry_seconds: float) -> None:
        super().__init__(f"the queue is full ({waiting}); try again in about {math.ceil(retry_seconds)} s")
        self.retry_seconds = retry_seconds


class EngineDead(EngineError):
    """The engine has stopped and takes no more requests."""


class RequestAborted(EngineError):
    """The caller cut the request off."""


class BadLogits(EngineError):
    """The model gave logits that are not finite for this request."""


class NoTokenLeft(EngineError):
    """What the request forbids leaves no token to draw."""


class RequestFailed(EngineError):
    """The server failed at something that concerns this request alone: its sampling, its text, its pages."""


class StepFailed(EngineError):
    """The forward pass that computed this request failed."""
