"""Offline generation: the server's engine without the server."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from .engine import Engine
from .exceptions import QueueFull
from .options import EngineOptions
from .request import Delta, Event, EventSink, Failed, Finished, GenerationRequest, SamplingParams, Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice of one prompt.

    Attributes:
        text: Generated text.
        token_ids: Generated ids, the one that ended the text left out.
        finish_reason: ``stop`` or ``length``.
        usage: Of the whole request, all its choices together.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage


class LLM:
    """A model with foveate's attention, for scripts and notebooks.

        with LLM("smollm2-135m") as llm:
            print(llm.generate(["The capital of France is"])[0].text)

    Args:
        model: Packaged name, local directory or hub id.
        engine_options: Fields of ``EngineOptions``.
    """

    def __init__(self, model: str, **engine_options: Any) -> None:
        self.engine = Engine.load(EngineOptions(model, **engine_options))

    @classmethod
    def over(cls, engine: Engine) -> LLM:
        """The same over an engine that runs already; ``close`` stops it."""
        llm = cls.__new__(cls)
        llm.engine = engine
        return llm

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling: SamplingParams | None = None,
        attention: dict[str, Any] | None = None,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> list[Completion]:
        """Completes prompts, batched as memory allows.

        Args:
            prompts: Texts, or lists of token ids.
            sampling: The same for all prompts; greedy is ``SamplingParams(temperature=0)``.
            attention: Policy, such as ``{"scheme": "streaming", "budget_tokens": 1024}``.
            on_event: Called with the prompt's index and each of its events, from the caller's thread.

        Returns:
            ``n`` completions per prompt, in order.

        Raises:
            EngineError: a prompt was refused or failed; the others of the call are given up.
            SchemeError: no such scheme or option.
        """
        params = sampling or SamplingParams()
        scheme = self.engine.build_scheme(attention)
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        waiting: list[tuple[int, str | list[int]]] = list(enumerate(prompts))[::-1]
        refill = True
        running: dict[int, str] = {}
        texts: dict[tuple[int, int], list[Delta]] = {}
        usages: dict[int, Usage] = {}
        try:
            while waiting or running:
                # Only as many as run at once: a long list of prompts must not fill the queue.
                requests: dict[int, GenerationRequest] = {}
                while refill and waiting and len(running) + len(requests) < self.engine.max_running:
                    number, prompt = waiting.pop()
                    ids = self.engine.tokenize(prompt, True) if isinstance(prompt, str) else prompt
                    sink = _numbered(events, number)
                    requests[number] = GenerationRequest(uuid.uuid4().hex, list(ids), params, scheme, sink)
                refill = False  # until a place is free
                try:
                    if requests:
                        self.engine.submit(*requests.values())
                    running |= {number: request.request_id for number, request in requests.items()}
                except QueueFull:
                    if not running:
                        raise
                    waiting += [(number, request.prompt_token_ids) for number, request in requests.items()][::-1]
                number, event = events.get()
                if isinstance(event, Failed | Finished):
                    del running[number]  # before on_event, whose error must not wait for events that will not come
                if on_event is not None:
                    on_event(number, event)
                if isinstance(event, Delta):
                    texts.setdefault((number, event.index), []).append(event)
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Finished):
                    usages[number] = event.usage
                    refill = True
        finally:
            for request_id in running.values():
                self.engine.abort(request_id)
            while running:
                number, event = events.get()
                if isinstance(event, Failed | Finished):
                    del running[number]
        return [
            Completion(
                "".join(delta.text for delta in deltas),
                tuple(token for delta in deltas for token in delta.token_ids),
                deltas[-1].finish_reason or "stop",
                usages[number],
            )
            for (number, _), deltas in sorted(texts.items())
        ]

    def close(self) -> None:
        """Stops the engine and frees its memory."""
        self.engine.shutdown(0)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _numbered(events: queue.SimpleQueue[tuple[int, Event]], number: int) -> EventSink:
    return lambda event: events.put((number, event))
