"""Times one request through the engine: its first token, and the gaps between the others."""

from __future__ import annotations

import queue
import statistics
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from foveate.patches.parts import PartClock
from foveate.sparse_attn.protocol import Scheme

from ..engine import Engine
from ..request import Delta, Event, Failed, Finished, GenerationRequest, Progress, SamplingParams, Usage

_Note = tuple[float, Mapping[str, float], Event]


class TooLong(Exception):
    """A request was cut off at its limit.

    Attributes:
        processed: Prompt tokens that were computed by then.
    """

    def __init__(self, seconds: float, processed: int) -> None:
        super().__init__(f"cut off after {seconds:g} s, {processed} prompt tokens done")
        self.processed = processed


@dataclass(frozen=True, slots=True)
class Timing:
    """
    Attributes:
        first_seconds: From submission to the first token.
        gaps_seconds: Between one token and the next.
        usage: As the engine tells it.
        prefill_parts: Seconds by part up to the first token; empty if nobody watched.
        decode_parts: Seconds by part from there to the last token.
    """

    first_seconds: float
    gaps_seconds: tuple[float, ...]
    usage: Usage
    prefill_parts: Mapping[str, float] = field(default_factory=dict)
    decode_parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def gap_seconds(self) -> float | None:
        """Median gap; ``None`` for an answer of one token."""
        return statistics.median(self.gaps_seconds) if self.gaps_seconds else None


def time_request(
    engine: Engine,
    prompt: list[int],
    new_tokens: int,
    scheme: Scheme,
    *,
    limit_seconds: float | None = None,
    clock: PartClock | None = None,
    on_progress: Callable[[int], Any] = lambda tokens: None,
) -> Timing:
    """Runs a prompt alone and notes when each token comes, in the engine's own thread.

    Args:
        engine: Idle; without prefix reuse, or the second time is not that of the first.
        prompt: Token ids.
        new_tokens: Tokens of the greedy answer; the end-of-text token does not end it.
        scheme: Built by the engine.
        limit_seconds: The request is aborted by then, at the end of a step.
        clock: Read at the first token and at the last.
        on_progress: Called with the number of prompt tokens computed since the last call.

    Raises:
        TooLong: it was aborted.
        EngineError: it failed.
    """
    notes: queue.SimpleQueue[_Note] = queue.SimpleQueue()

    def note(event: Event) -> None:
        notes.put((time.perf_counter(), dict(clock.seconds) if clock else {}, event))

    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    request = GenerationRequest(uuid.uuid4().hex, prompt, params, scheme, note)
    before: Mapping[str, float] = dict(clock.seconds) if clock else {}
    start = time.perf_counter()
    deadline = None if limit_seconds is None else start + limit_seconds
    times: list[float] = []
    parts: list[Mapping[str, float]] = []
    processed, cut_off = 0, False
    engine.submit(request)
    try:
        while True:
            try:
                left = None if deadline is None or cut_off else max(deadline - time.perf_counter(), 0)
                at, seconds, event = notes.get(timeout=left)
            except queue.Empty:
                engine.abort(request.request_id)
                cut_off = True
                continue
            if isinstance(event, Progress):
                on_progress(event.processed - processed)
                processed = event.processed
            elif isinstance(event, Delta):
                times.append(at)
                parts.append(seconds)
            elif isinstance(event, Finished):
                break
            elif isinstance(event, Failed):
                if cut_off and limit_seconds is not None:
                    raise TooLong(limit_seconds, processed)
                raise event.error
    except KeyboardInterrupt:
        engine.abort(request.request_id)
        raise
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Timing(times[0] - start, gaps, event.usage, _between(before, parts[0]), _between(parts[0], parts[-1]))


def _between(before: Mapping[str, float], after: Mapping[str, float]) -> Mapping[str, float]:
    return {part: seconds - before[part] for part, seconds in after.items()}
