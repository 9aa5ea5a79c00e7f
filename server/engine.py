"""The engine: takes requests from any thread, computes them in its own, and tells of their progress."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

import torch

from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.sparse_attn import registry
from foveate.sparse_attn.protocol import Scheme

from .admission import Admission
from .engine_protocol import EngineSnapshot, EngineState
from .exceptions import EngineDead, QueueFull, RequestAborted, StepFailed
from .loader import LoadedModel, geometry_for, load
from .options import EngineOptions
from .output import Outbox
from .request import Failed, Finished, GenerationRequest
from .runner import Runner
from .sampling import Sampled, sample
from .scheduler import Scheduler
from .scheme_builder import SchemeBuilder
from .sequence import RequestGroup, Sequence

log = logging.getLogger(__name__)

# How often an idle engine shows that it lives.
IDLE_SECONDS = 1.0


class Engine:
    """Continuous batching over one model.

    ``submit`` and ``abort`` only leave a note; the step loop reads its notes before each step, so a
    request that was cut off holds no page after at most one step.
    """

    def __init__(self, loaded: LoadedModel, options: EngineOptions) -> None:
        self._loaded = loaded
        self._options = options
        self.cache = KVCacheManager(PagePool(geometry_for(loaded, options)), prefix_reuse=options.prefix_reuse)
        self._scheduler = Scheduler(
            self.cache, max_batch_tokens=options.max_batch_tokens, max_running=options.max_running
        )
        self._admission = Admission(loaded, self.cache)
        self._runner = Runner(loaded, self.cache, options.audit_rate)
        self._outbox = Outbox()
        self._groups: dict[str, RequestGroup] = {}
        self._inbox: deque[RequestGroup] = deque()
        self._aborts: deque[str] = deque()
        self._wake = threading.Condition()
        self._state: EngineState = "ready"
        self._heartbeat = time.monotonic()
        self._schemes = SchemeBuilder(loaded, options.attention)
        self.created = int(time.time())
        self.default_scheme = self.build_scheme(None)
        self._thread = threading.Thread(target=self._run, name="foveate-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, settings: Any) -> Engine:
        """Loads the model that ``settings`` (``Settings`` or ``EngineOptions``) name, and starts. Blocks."""
        options = settings if isinstance(settings, EngineOptions) else EngineOptions.of(settings)
        return cls(load(options), options)

    @property
    def model_name(self) -> str:
        return self._loaded.name

    @property
    def context_length(self) -> int:
        return self._loaded.context_length

    @property
    def vocab_size(self) -> int:
        return self._loaded.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights and KV."""
        return self._loaded.dtype

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer

    @property
    def max_running(self) -> int:
        return self._options.max_running

    @property
    def state(self) -> EngineState:
        return self._state

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def schemes(self) -> list[dict[str, Any]]:
        return registry.describe()

    def build_scheme(self, attention: dict[str, Any] | None) -> Scheme:
        """The scheme of a request's ``attention`` field; ``None`` is the default.

        Raises:
            SchemeError: no such scheme or option, or it does not fit this model.
        """
        return self._schemes.build(attention)

    def submit(self, request: GenerationRequest) -> None:
        """Takes a request.

        Raises:
            InvalidRequest: a value is out of range.
            ContextOverflow: prompt and answer exceed the context.
            PoolTooSmall: they exceed the KV pool.
            QueueFull: too many requests wait.
            EngineDead: the engine has stopped or is stopping.
        """
        group = self._admission.admit(request)
        with self._wake:
            if self._state != "ready":
                raise EngineDead("the server is shutting down")
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting >= self._options.max_queued_requests:
                raise QueueFull(f"{waiting} requests are waiting already; try again later")
            self._inbox.append(group)
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; its last event is ``Failed``. Unknown ids are ignored."""
        with self._wake:
            self._aborts.append(request_id)
            self._wake.notify()

    def shutdown(self, drain_seconds: float) -> None:
        """Takes no more requests, waits so long for those in flight, fails the rest, stops the thread."""
        with self._wake:
            if self._state == "ready":
                self._state = "draining"
            self._wake.notify()
        deadline = time.monotonic() + drain_seconds
        while self._thread.is_alive() and self._busy and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._wake:
            self._state = "dead"
            self._wake.notify()
        self._thread.join()
        self._loaded.attached.detach()

    def snapshot(self) -> EngineSnapshot:
        allocator, outbox = self.cache.allocator, self._outbox
        return EngineSnapshot(
            running=len(self._scheduler.running),
            waiting=len(self._inbox) + len(self._scheduler.waiting),
            pages_total=allocator.num_pages,
            pages_free=allocator.num_free,
            pages_cached=allocator.num_cached,
            pages_used=allocator.num_referenced,
            heartbeat_age_seconds=time.monotonic() - self._heartbeat,
            preemptions=self._scheduler.preemptions,
            aborted=outbox.aborted,
            generated_tokens=outbox.generated_tokens,
            prompt_tokens=outbox.prompt_tokens,
            cached_tokens=outbox.cached_tokens,
            keys_read=outbox.keys_read,
            keys_dense=outbox.keys_dense,
            bad_logits=outbox.bad_logits,
            steps=outbox.steps,
            mass_kept=outbox.mass_kept,
        )

    @property
    def _busy(self) -> bool:
        return bool(self._inbox or self._groups)

    def _run(self) -> None:
        try:
            while self._read_notes():
                self._heartbeat = time.monotonic()
                if self._scheduler.has_work:
                    self._step()
        except BaseException:
            log.exception("the engine died")
            raise
        finally:
            self._state = "dead"
            for group in [*self._groups.values(), *self._inbox]:
                self._end(group, Failed(EngineDead("the engine stopped before this request was done")))
            self._inbox.clear()

    def _read_notes(self) -> bool:
        """Takes new requests and aborts; waits while there is nothing to do. False ends the loop."""
        with self._wake:
            if not (self._inbox or self._aborts or self._scheduler.has_work) and self._state != "dead":
                self._wake.wait(IDLE_SECONDS)
            new = list(self._inbox)
            self._groups |= {group.request.request_id: group for group in new}
            self._inbox.clear()
            aborts = set(self._aborts)
            self._aborts.clear()
            alive = self._state != "dead"
        for group in new:
            self._start(group)
        for request_id in aborts & self._groups.keys():
            self._outbox.aborted += 1
            self._end(self._groups[request_id], Failed(RequestAborted("the request was aborted")))
        return alive

    def _start(self, group: RequestGroup) -> None:
        """Queues a request's first sequence; its scheme's page statistics are kept from now on.

        Pages written before have none, and need none: another scheme never reads them, because a
        prefix is found only by a request of the same policy.
        """
        sequence = group.sequences[0]
        try:
            self.cache.pool.declare(group.request.scheme.page_stats(self.cache.pool.geometry))
        except Exception as error:  # no memory for them: that is this request's failure alone
            log.exception("no page statistics for %s", group.request.scheme.name)
            group.sequences.clear()
            failure = StepFailed(f"there is no memory for the page statistics of {group.request.scheme.name}")
            failure.__cause__ = error
            self._end(group, Failed(failure))
        else:
            self._scheduler.add(sequence)

    def _step(self) -> None:
        chunks = self._scheduler.schedule()
        if not chunks:
            raise RuntimeError("there is work, but no step could be made of it")
        try:
            result = self._runner.run(chunks)
            drawing: list[Sequence] = []
            rows: list[int] = []
            for row, chunk in enumerate(chunk for chunk in chunks if chunk.ends_sequence):
                choices = self._choices(chunk.sequence)
                drawing += choices
                rows += [row] * len(choices)
            drawn = sample(result.logits[rows], [sequence.sampler for sequence in drawing]) if drawing else []
        except Exception as error:
            # Nothing can be said of what this step wrote, so all that took part in it ends here.
            log.exception("a step failed")
            for group in {id(chunk.sequence.group): chunk.sequence.group for chunk in chunks}.values():
                failure = StepFailed("the step that computed this request failed")
                failure.__cause__ = error
                self._end(group, Failed(failure))
            return
        self._outbox.count_step(chunks, result.keys_read, result.mass_kept)
        for chunk in chunks:
            if not chunk.sequence.num_generated:
                self._outbox.tell_progress(chunk)
        for sequence, token in zip(drawing, drawn, strict=True):
            if sequence in sequence.group.sequences:  # a choice with bad logits ends the others, too
                self._take(sequence, token)

    def _choices(self, sequence: Sequence) -> list[Sequence]:
        """The sequences that draw from this one's logits: itself, and when its prompt is done its other choices."""
        group = sequence.group
        if sequence.num_generated or sequence.index:
            return [sequence]
        assert sequence.table is not None
        for index in range(1, group.request.sampling.n):
            choice = self._admission.sequence(group, index)
            choice.table = self.cache.fork(sequence.table)
            choice.num_computed = sequence.num_computed
            group.sequences.append(choice)
            self._scheduler.add(choice)
        return list(group.sequences)

    def _take(self, sequence: Sequence, drawn: Sampled) -> None:
        """Adds a drawn token to its sequence, tells of it, and ends what is finished."""
        group = sequence.group
        if drawn.error is not None:
            self._outbox.bad_logits += 1
            self._end(group, Failed(drawn.error))
            return
        sequence.tokens.append(drawn.token_id)
        sequence.sampler.output_token_ids.append(drawn.token_id)
        delta = self._outbox.delta(sequence, drawn, self._loaded.eos_token_ids)
        if delta.finish_reason is not None:
            group.pages = max(group.pages, len({page for item in group.sequences for page in _pages(item)}))
            self._scheduler.remove(sequence)
            group.sequences.remove(sequence)
        if not self._outbox.send(group, delta):
            self._end(group, None)
        elif not group.sequences:
            self._end(group, Finished(self._outbox.usage(group)))

    def _end(self, group: RequestGroup, event: Finished | Failed | None) -> None:
        """Forgets a request, frees what it still holds, and tells its last event."""
        for sequence in group.sequences:
            if group.request.request_id in self._groups:
                self._scheduler.remove(sequence)
        group.sequences.clear()
        self._groups.pop(group.request.request_id, None)
        if event is not None:
            self._outbox.send(group, event)


def _pages(sequence: Sequence) -> list[int]:
    return [] if sequence.table is None else sequence.table.pages
