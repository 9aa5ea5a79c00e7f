"""Which requests the engine takes, and what it makes of them before they are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Several

from foveate.kv_cache.manager import KVCacheManager

from .detokenizer import Detokenizer
from .exceptions import ContextOverflow, InvalidRequest, PoolTooSmall, QueueFull
from .loader import LoadedModel
from .options import EngineOptions
from .request import GenerationRequest
from .sampling import SamplerRow, check_sampling
from .sampling_limits import check_priority
from .scheduler import Scheduler
from .sequence import RequestGroup, Sequence
from .stopping import StopChecker

# Part of the queue that requests may fill which are to wait behind others: a batch shall not keep those others out.
_BEHIND = 0.5
# Seconds that a client is told to wait, at least and at most. OpenAI's clients obey up to 120.
_LEAST_WAIT, _LONGEST_WAIT = 1.0, 120.0


class Admission:
    """Checks requests against a model and its cache. Every method may be called from any thread."""

    def __init__(self, loaded: LoadedModel, cache: KVCacheManager) -> None:
        self.identity = b""  # of the model, where pages outlive the engine
        self._loaded = loaded
        self._cache = cache
        self._eos = sorted(loaded.eos_token_ids)

    def admit(self, request: GenerationRequest) -> RequestGroup:
        """Checks a request, and makes its first sequence.

        Raises:
            InvalidRequest: a value is out of range.
            ContextOverflow: prompt and answer exceed the context.
            PoolTooSmall: they exceed the KV pool.
        """
        prompt, params = request.prompt_token_ids, request.sampling
        check_sampling(params, self._loaded.vocab_size)
        check_priority(request.priority)
        if not prompt:
            raise InvalidRequest("the prompt holds no token", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self._loaded.vocab_size:
            raise InvalidRequest(f"token ids must be from 0 to {self._loaded.vocab_size - 1}", param="prompt")
        room = self._loaded.context_length - len(prompt)
        most = min(room, self._cache.capacity_tokens - len(prompt))
        wanted = params.max_tokens if params.max_tokens is not None else max(most, 1)
        if wanted > room:
            raise ContextOverflow(len(prompt), wanted, self._loaded.context_length)
        if len(prompt) + wanted > self._cache.capacity_tokens:
            raise PoolTooSmall(len(prompt) + wanted, self._cache.capacity_tokens)
        group = RequestGroup(request, self._namespace(request), wanted)
        group.sequences.append(self.sequence(group, 0))
        return group

    def _namespace(self, request: GenerationRequest) -> bytes | None:
        if request.salt is None:
            return None
        policy = f"{request.scheme.identity}\0{request.salt}"
        return hashlib.sha256(self.identity + policy.encode("utf-8", "surrogatepass")).digest()

    def check_queue(
        self, groups: Several[RequestGroup], inbox: list[RequestGroup], scheduler: Scheduler, options: EngineOptions
    ) -> None:
        """Refuses requests that come at once if they would wait behind too many.

        What finds nothing waiting is taken, however much it is: it could never come otherwise. Requests of a
        priority above 0, such as a batch's, may fill half of the queue.

        When it may be tried again is estimated from the rate at which prompts were computed of late: the
        time until enough of the queue has moved up, beside prompts in work that get at most half of it.

        Args:
            groups: The new ones, of one priority.
            inbox: Requests that the step loop has not seen yet.
            scheduler: Its own thread changes it meanwhile; the lists are copied at once.
            options: The bounds.

        Raises:
            QueueFull: there is no room.
        """
        waiting = [item.num_remaining for item in list(scheduler.waiting)]
        waiting += [len(item.request.prompt_token_ids) for item in inbox]
        if not waiting:
            return
        share = _BEHIND if groups[0].request.priority > 0 else 1
        most, most_tokens = int(options.max_queued_requests * share), int(options.max_queued_tokens * share)
        surplus = len(waiting) + len(groups) - most
        excess = sum(waiting) + sum(len(group.request.prompt_token_ids) for group in groups) - most_tokens
        if surplus > 0:
            full, ahead = f"{len(waiting)} of at most {most} requests", max(sum(sorted(waiting)[:surplus]), excess)
        elif excess > 0:
            full, ahead = f"{sum(waiting)} of at most {most_tokens} prompt tokens", excess
        else:
            return
        in_work = sum(item.num_remaining for item in list(scheduler.running) if item.num_remaining > 1)
        rate = scheduler.pace.tokens_per_second
        seconds = (ahead + min(in_work, ahead)) / rate if rate else _LEAST_WAIT
        raise QueueFull(full, min(max(seconds, _LEAST_WAIT), _LONGEST_WAIT))

    def sequence(self, group: RequestGroup, index: int) -> Sequence:
        """Choice ``index`` of a request, nothing of it computed."""
        request = group.request
        prompt, params = request.prompt_token_ids, request.sampling
        return Sequence(
            group,
            index,
            list(prompt),
            SamplerRow(params, prompt, [], self._eos, index),
            Detokenizer(self._loaded.tokenizer, prompt, params),
            StopChecker(params),
        )
