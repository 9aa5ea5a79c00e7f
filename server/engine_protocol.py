"""The engine as the HTTP layer sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from foveate.sparse_attn.protocol import Scheme

from .mass import MassHistogram
from .request import GenerationRequest

if TYPE_CHECKING:  # it imports the libraries of models
    from .document_cache import DocumentCache

EngineState = Literal["loading", "ready", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Numbers of the engine at one moment. Those after ``heartbeat_age_seconds`` only grow.

    Attributes:
        running: Requests in the batch.
        waiting: Requests not yet in the batch.
        pages_total: Pages in the pool.
        pages_free: Pages that hold nothing.
        pages_cached: Pages kept for prefix reuse alone.
        pages_used: Pages that requests hold.
        heartbeat_age_seconds: Since the step loop last turned; it turns when idle too.
        preemptions: Requests put back to waiting because pages ran out.
        aborted: Requests that the caller cut off.
        generated_tokens: Tokens sampled.
        prompt_tokens: Tokens of admitted prompts.
        cached_tokens: Those of them found in the prefix cache.
        keys_read: Key reads done, over queries, heads and layers.
        keys_dense: Key reads that dense attention would have done.
        bad_logits: Requests ended because the model gave logits that are not finite.
        steps: Forward passes.
        mass_kept: Attention mass that audited selections kept, by scheme.
        disk: Numbers of the document cache, by name; see ``document_cache.py``.
    """

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_used: int
    heartbeat_age_seconds: float
    preemptions: int
    aborted: int
    generated_tokens: int
    prompt_tokens: int
    cached_tokens: int
    keys_read: float
    keys_dense: float
    bad_logits: int
    steps: int
    mass_kept: Mapping[str, MassHistogram] = field(default_factory=dict)
    disk: Mapping[str, float] = field(default_factory=dict)


class EngineLike(Protocol):
    """What the HTTP layer needs of an engine. Every method may be called from any thread."""

    @property
    def model_name(self) -> str: ...

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together, at most."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of the logits: every token id must be below it."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights and KV."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The ``transformers`` tokenizer."""
        ...

    @property
    def default_scheme(self) -> Scheme: ...

    @property
    def documents(self) -> DocumentCache | None:
        """Pages of prompts on disk; ``None`` where none are kept."""
        ...

    @property
    def created(self) -> int:
        """Unix time of loading, in seconds."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """What answers depend on beside the request, by name: a batch does not go on where one of it has changed."""
        ...

    @property
    def state(self) -> EngineState: ...

    def submit(self, *requests: GenerationRequest) -> None:
        """Takes a request; its events then end in exactly one ``Finished`` or ``Failed``.

        Raises:
            EngineError: the request was not taken (see ``exceptions.py``); no event follows.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request; an unknown id is ignored."""
        ...

    def build_scheme(self, attention: dict[str, object] | None) -> Scheme:
        """The scheme of a request's ``attention`` field; ``None`` is the default.

        Raises:
            SchemeError: no such scheme or option, or a profile is missing.
        """
        ...

    def schemes(self) -> list[dict[str, Any]]:
        """Names and options of the registered schemes, as JSON values."""
        ...

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def snapshot(self) -> EngineSnapshot: ...

    def shutdown(self, drain_seconds: float) -> None:
        """Takes no more requests, waits so long for those in flight, fails the rest; blocks."""
        ...
