"""Offline generation: the server's engine without the server."""

from __future__ import annotations

import atexit
import gc
import os
import queue
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from .engine import Engine
from .exceptions import EngineDead, EngineError, InvalidRequest, QueueFull, RequestRefused
from .options import EngineOptions
from .request import (
    Delta,
    Event,
    EventSink,
    Failed,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    SamplingParams,
    TokenLogprob,
    Usage,
)

# How soon a call whose prompts found the queue full of another's tries again, at most.
RETRY_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice of one prompt.

    Attributes:
        text: Generated text.
        token_ids: Generated ids, the one that ended the text left out.
        finish_reason: ``stop`` or ``length``.
        usage: Of the whole request, all its choices together.
        logprobs: Of each generated token; ``None`` if ``SamplingParams.logprobs`` is.
        prompt_logprobs: Of each token of the prompt but the first; ``None`` if ``SamplingParams.prompt_logprobs`` is.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


class LLM:
    """A model with foveate's attention, for scripts and notebooks.

        with LLM("smollm2-135m") as llm:
            print(llm.generate(["The capital of France is"])[0].text)

    Calls may come from several threads. What is still open when the interpreter ends is closed then.

    Args:
        model: Packaged name, local directory or hub id.
        engine_options: Fields of ``EngineOptions``.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, model: str | os.PathLike[str], **engine_options: Any) -> None:
        self._run(Engine.load(EngineOptions(os.fspath(model), **engine_options)))

    @classmethod
    def over(cls, engine: Engine) -> LLM:
        """The same over an engine that runs already; ``close`` stops it."""
        llm = cls.__new__(cls)
        llm._run(engine)
        return llm

    def _run(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        _OPEN.add(self)

    @property
    def engine(self) -> Engine:
        """
        Raises:
            EngineDead: this LLM was closed.
        """
        if self._engine is None:
            raise EngineDead("this LLM is closed")
        return self._engine

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        sampling: SamplingParams | None = None,
        attention: str | dict[str, Any] | None = None,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> list[Completion]:
        """Completes prompts, batched as memory allows.

        Args:
            prompts: Texts, or lists of token ids. One text, or one flat list of ids, is one prompt.
            sampling: The same for all prompts; greedy is ``SamplingParams(temperature=0)``.
            attention: Policy: a scheme's name, or such as ``{"scheme": "streaming", "budget_tokens": 1024}``.
            on_event: Called with the prompt's index and each of its events, from the caller's thread.

        Returns:
            ``n`` completions per prompt, in order.

        Raises:
            EngineError: a prompt was refused or failed, which of several is said; the others of the call are given up.
            SchemeError: no such scheme or option.
        """
        engine = self.engine
        params = sampling or SamplingParams()
        scheme = engine.build_scheme(attention)
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        several = _several(prompts)
        waiting: list[tuple[int, str | Sequence[int]]] = list(enumerate(several))[::-1]
        refill = True
        running: dict[int, str] = {}
        texts: dict[tuple[int, int], list[Delta]] = {}
        scores: dict[int, tuple[TokenLogprob, ...]] = {}
        usages: dict[int, Usage] = {}
        try:
            while waiting or running:
                # Only as many as run at once: a long list of prompts must not fill the queue.
                requests: dict[int, GenerationRequest] = {}
                while refill and waiting and len(running) + len(requests) < engine.max_running:
                    number, prompt = waiting.pop()
                    try:
                        ids = _ids(engine, prompt)
                    except InvalidRequest as error:
                        _name(error, number, several)
                        raise
                    sink = _numbered(events, number)
                    requests[number] = GenerationRequest(uuid.uuid4().hex, ids, params, scheme, sink)
                refill = False  # until a place is free
                try:
                    if requests:
                        engine.submit(*requests.values())
                    running |= {number: request.request_id for number, request in requests.items()}
                except RequestRefused as error:
                    for number, request in requests.items():
                        if request.request_id == error.request_id:
                            _name(error, number, several)
                    raise
                except QueueFull as error:
                    waiting += [(number, request.prompt_token_ids) for number, request in requests.items()][::-1]
                    if not running:  # it is full of what others asked for
                        time.sleep(min(error.retry_seconds, RETRY_SECONDS))
                        refill = True
                        continue
                number, event = events.get()
                if isinstance(event, Failed | Finished):
                    del running[number]  # before on_event, whose error must not wait for events that will not come
                if on_event is not None:
                    on_event(number, event)
                if isinstance(event, Delta):
                    texts.setdefault((number, event.index), []).append(event)
                elif isinstance(event, PromptLogprobs):
                    scores[number] = scores.get(number, ()) + event.entries
                elif isinstance(event, Failed):
                    _name(event.error, number, several)
                    raise event.error
                elif isinstance(event, Finished):
                    usages[number] = event.usage
                    refill = True
        finally:
            for request_id in running.values():
                engine.abort(request_id)
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
                None if params.logprobs is None else tuple(one for delta in deltas for one in delta.logprobs or ()),
                None if params.prompt_logprobs is None else scores.get(number, ()),
            )
            for (number, _), deltas in sorted(texts.items())
        ]

    def close(self) -> None:
        """Stops the engine and lets go of model and cache; their memory is free unless others hold them."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown(0)
            del engine
            gc.collect()  # a model is full of cycles

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_OPEN: weakref.WeakSet[LLM] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """An engine's thread must not be at work while the interpreter is taken apart."""
    for llm in tuple(_OPEN):
        llm.close()


def _several(prompts: str | Sequence[int] | Sequence[str | Sequence[int]]) -> list[str | Sequence[int]]:
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    if several and all(isinstance(one, int) for one in several):
        return [cast(list[int], several)]
    return cast(list[str | Sequence[int]], several)


def _ids(engine: Engine, prompt: str | Sequence[int]) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text is no valid Unicode: half of a surrogate pair at character {error.start}", param="prompt"
        ) from None
    return engine.tokenize(prompt, True)


def _name(error: Exception, number: int, several: Sequence[object]) -> None:
    """Makes ``error`` say which of several prompts it is about."""
    if len(several) > 1 and isinstance(error, EngineError) and not isinstance(error, EngineDead):
        error.args = (f"prompt {number}: {error}",)


def _numbered(events: queue.SimpleQueue[tuple[int, Event]], number: int) -> EventSink:
    return lambda event: events.put((number, event))
