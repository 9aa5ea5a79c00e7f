"""From drawn tokens to events: text, finish reasons, usage, and the engine's running totals."""

from __future__ import annotations

import logging
import time
from collections.abc import Set
from math import isfinite

from .mass import MassHistogram
from .request import Delta, Event, FinishReason, Progress, Usage
from .sampling import Sampled
from .sequence import Chunk, RequestGroup, Sequence

log = logging.getLogger(__name__)


class Outbox:
    """Makes events and counts what they say.

    Attributes:
        steps: Forward passes.
        generated_tokens: Tokens drawn.
        prompt_tokens: Tokens of prompts that were computed.
        cached_tokens: Those of them found in the prefix cache.
        keys_read: Key reads done.
        keys_dense: Key reads of dense attention.
        mass_kept: Attention mass kept, by scheme. Replaced as a whole, so that other threads may read it.
        bad_logits: Requests ended by logits that are not finite.
        aborted: Requests cut off by their caller.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.generated_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.keys_read = 0.0
        self.keys_dense = 0.0
        self.mass_kept: dict[str, MassHistogram] = {}
        self.bad_logits = 0
        self.aborted = 0

    def count_step(
        self, chunks: list[Chunk], keys_read: list[tuple[float, float]], mass_kept: list[float | None]
    ) -> None:
        """Books one step's key reads, and the attention mass they kept, to the requests that caused them."""
        self.steps += 1
        for chunk, (read, dense), mass in zip(chunks, keys_read, mass_kept, strict=True):
            group = chunk.sequence.group
            group.keys_read += read
            group.keys_dense += dense
            self.keys_read += read
            self.keys_dense += dense
            if chunk.ends_sequence and not chunk.sequence.num_generated:
                self.prompt_tokens += len(group.request.prompt_token_ids)
                self.cached_tokens += group.cached_tokens
            if chunk.count > 1:
                continue  # an answer that is read again was measured before
            if mass is not None and isfinite(mass):  # bad logits end their request, and must not end the metric
                group.mass_kept += mass
                group.audited_tokens += 1
                name = group.request.scheme.name
                self.mass_kept = {**self.mass_kept, name: self.mass_kept.get(name, MassHistogram()).plus(mass)}

    def tell_progress(self, chunk: Chunk) -> bool:
        """Says how far a prompt has come; False if the caller's function failed."""
        group = chunk.sequence.group
        elapsed = time.monotonic() - group.request.arrival
        total = len(group.request.prompt_token_ids)
        processed, waited = min(chunk.start + chunk.count, total), group.waited_seconds or 0.0
        return self.send(group, Progress(total, group.cached_tokens, processed, elapsed, waited))

    def delta(self, sequence: Sequence, drawn: Sampled, eos_token_ids: Set[int]) -> Delta:
        """The event of the token that was just added to ``sequence``."""
        group = sequence.group
        params = group.request.sampling
        self.generated_tokens += 1
        group.generated_tokens += 1
        token = drawn.token_id
        reason: FinishReason | None = None
        ends = not params.ignore_eos or params.grammar is not None  # with a grammar it is drawn only where all must end
        if token in params.stop_token_ids or (token in eos_token_ids and ends):
            # The token that ends a text is not part of it.
            return Delta(sequence.index, self._rest(sequence), (), None, "stop")
        text, stopped = sequence.stopping.push(
            sequence.detokenizer.push(token), active=sequence.num_generated >= params.min_tokens
        )
        if stopped:
            reason = "stop"
        elif sequence.sampler.is_complete:
            reason = "stop"
            text += self._rest(sequence)
        elif sequence.num_generated >= group.max_tokens:
            reason = "length"
            text += self._rest(sequence)
        logprobs = None if drawn.logprob is None else (drawn.logprob,)
        return Delta(sequence.index, text, (token,), logprobs, reason)

    @staticmethod
    def _rest(sequence: Sequence) -> str:
        """Text held back so far, at the end of a sequence."""
        text, stopped = sequence.stopping.push(sequence.detokenizer.flush(), active=True)
        return text if stopped else text + sequence.stopping.flush()

    def usage(self, group: RequestGroup) -> Usage:
        request = group.request
        return Usage(
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=group.generated_tokens,
            cached_tokens=group.cached_tokens,
            scheme=request.scheme.name,
            keys_read_fraction=group.keys_read / group.keys_dense if group.keys_dense else 1.0,
            pages=group.pages,
            mass_kept=group.mass_kept / group.audited_tokens if group.audited_tokens else None,
            audited_tokens=group.audited_tokens,
        )

    def send(self, group: RequestGroup, event: Event) -> bool:
        """Hands an event to the caller; False if the caller's function failed."""
        try:
            group.request.on_event(event)
        except Exception:
            log.exception("a caller could not take an event; its request ends")
            return False
        return True
