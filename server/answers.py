"""The parts that completions and chat answers share: usage, progress, log-probabilities."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from foveate import __version__

from .request import Delta, FinishReason, Progress, TokenLogprob, Usage
from .token_text import TokenText

FINGERPRINT = f"foveate-{__version__}"
_LOWEST_LOGPROB = -9999.0


@dataclass(slots=True)
class Choice:
    """A choice as it grows, for an answer in one piece."""

    index: int
    deltas: list[Delta] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]

    @property
    def finish_reason(self) -> FinishReason | None:
        return next((delta.finish_reason for delta in reversed(self.deltas) if delta.finish_reason), None)


class Answer(Protocol):
    """How one endpoint writes what the engine says."""

    def scored(self, prompt: int, entries: Sequence[TokenLogprob]) -> None:
        """Takes log-probabilities of the next tokens of a prompt; all of them come before its first ``Delta``."""
        ...

    def chunks(self, choice: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """Stream events for ``delta``; none if it shows nothing yet."""
        ...

    def bare_chunk(self) -> dict[str, Any]:
        """A stream event without choices, for usage and progress."""
        ...

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """The answer in one piece, without usage."""
        ...


def answer_id(prefix: str, request_id: str | None) -> str:
    """The id of an answer: a new one, or the client's own label."""
    return f"{prefix}-{request_id or uuid.uuid4().hex}"


def usage_body(usages: Iterable[Usage]) -> dict[str, Any]:
    """The sum over the prompts of one answer.

    The fractions of keys read are weighted by the keys that dense attention would have read: a
    prompt of n tokens of which c were cached reads in proportion to n^2 - c^2. The attention mass
    kept is a mean over the tokens that were audited, ``None`` if none was.
    """
    usages = list(usages)
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    weights = [(usage.prompt_tokens + usage.completion_tokens) ** 2 - usage.cached_tokens**2 for usage in usages]
    read = sum(weight * usage.keys_read_fraction for weight, usage in zip(weights, usages, strict=True))
    audited = sum(usage.audited_tokens for usage in usages)
    kept = sum(usage.mass_kept * usage.audited_tokens for usage in usages if usage.mass_kept is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        "attention": {
            "scheme": usages[0].scheme,
            "keys_read_fraction": round(read / max(sum(weights), 1), 6),
            "pages": sum(usage.pages for usage in usages),
            "mass_kept": round(kept / audited, 6) if audited else None,
        },
    }


def progress_body(latest: Iterable[Progress], total: int) -> dict[str, int]:
    """How far prefill has come over all prompts, of ``total`` tokens."""
    latest = list(latest)
    return {
        "total": total,
        "cached": sum(progress.cached for progress in latest),
        "processed": sum(progress.processed for progress in latest),
        "time_ms": round(1000 * max(progress.elapsed_seconds for progress in latest)),
    }


def chat_logprobs(entries: Iterable[TokenLogprob], tokens: TokenText) -> dict[str, Any]:
    """The list of chat, each token with its bytes."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text, spelled = tokens.of(token_id)
        return {"token": text, "logprob": finite(logprob), "bytes": spelled}

    return {
        "content": [
            {**one(entry.token_id, entry.logprob), "top_logprobs": [one(*pair) for pair in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def finite(logprob: float) -> float:
    """``logprob``, or the least that is written: JSON has no infinity."""
    return max(logprob, _LOWEST_LOGPROB)
