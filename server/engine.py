"""The engine: takes requests from any thread, computes them in its own, and tells of their progress."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from foveate.kv_cache.errors import CacheError
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.patches.fingerprint import fingerprint
from foveate.sparse_attn import registry
from foveate.sparse_attn.ops.launch import on_device
from foveate.sparse_attn.protocol import Scheme

from .admission import Admission
from .document_cache import DocumentCache
from .engine_protocol import EngineSnapshot, EngineState
from .exceptions import EngineDead, RequestAborted, RequestRefused
from .loader import LoadedModel, geometry_for, load
from .options import EngineOptions
from .request import Failed, GenerationRequest
from .scheme_builder import SchemeBuilder
from .sequence import RequestGroup
from .stepper import Stepper

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
        self._admission = Admission(loaded, self.cache)
        self._stepper = Stepper(loaded, self.cache, options, self._admission)
        self._inbox: deque[RequestGroup] = deque()
        self._aborts: deque[str] = deque()
        self._wake = threading.Condition()
        self._state: EngineState = "ready"
        self._heartbeat = time.monotonic()
        self._schemes = SchemeBuilder(loaded, options.attention)
        self.documents = DocumentCache.of(loaded, self.cache, self._stepper.scheduler, options, self._ring)
        if self.documents is not None:
            self._stepper.documents = self.documents
            self._admission.identity = self.documents.identity
        self.created = int(time.time())
        self.default_scheme = self.build_scheme(None)
        self._thread = threading.Thread(target=self._run, name="foveate-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, settings: Any) -> Engine:
        """Loads the model that ``settings`` (``Settings`` or ``EngineOptions``) name, and starts. Blocks.

        In a thread that ends with it: OpenMP gives each thread that computes workers of its own, and where there are
        more of them than CPUs they no longer spin between two calls. Then the linear layers of a decode step of
        SmolLM2 took 33 ms instead of 16 (two cores).
        """
        options = settings if isinstance(settings, EngineOptions) else EngineOptions.of(settings)
        with ThreadPoolExecutor(1, "foveate-load") as loader:
            return loader.submit(lambda: cls(load(options), options)).result()

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
        """Element type of weights, and of KV unless that is int8."""
        return self._loaded.dtype

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer

    @property
    def max_running(self) -> int:
        return self._options.seats

    @property
    def identity(self) -> dict[str, str]:
        """What answers depend on beside the request, by name."""
        return {
            "weights": fingerprint(self._loaded.model)["weights"],
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self._options.quantization,
            "kv_dtype": str(self.cache.pool.geometry.dtype).removeprefix("torch."),
            "attention": self.default_scheme.identity,
        }

    @property
    def state(self) -> EngineState:
        return self._state

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def schemes(self) -> list[dict[str, Any]]:
        return registry.describe()

    def build_scheme(self, attention: str | dict[str, Any] | None) -> Scheme:
        """The scheme of a request's ``attention`` field, or one by its name; ``None`` is the default.

        Raises:
            SchemeError: no such scheme or option, or it does not fit this model.
        """
        return self._schemes.build(attention)

    def submit(self, *requests: GenerationRequest) -> None:
        """Takes requests of one priority: all of them or none. No step begins with only a part of them.

        Raises:
            InvalidRequest: a value is out of range.
            ContextOverflow: prompt and answer exceed the context.
            PoolTooSmall: they exceed the KV pool.
            QueueFull: too many requests or prompt tokens wait.
            EngineDead: the engine has stopped or is stopping.
        """
        groups = list(map(self._admitted, requests))
        with self._wake:
            if self._state != "ready":
                raise EngineDead("the engine has stopped, or is stopping")
            inbox = [*self._inbox, *(self.documents.parked if self.documents else ())]
            self._admission.check_queue(groups, inbox, self._stepper.scheduler, self._options)
            self._inbox += groups
            self._wake.notify()

    def _admitted(self, request: GenerationRequest) -> RequestGroup:
        try:
            return self._admission.admit(request)
        except RequestRefused as error:
            error.request_id = request.request_id
            raise

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
        while self._thread.is_alive() and self._is_busy() and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._wake:
            self._state = "dead"
            self._wake.notify()
        self._thread.join()
        self._loaded.attached.detach()

    def snapshot(self) -> EngineSnapshot:
        allocator, outbox, scheduler = self.cache.allocator, self._stepper.outbox, self._stepper.scheduler
        return EngineSnapshot(
            running=len(scheduler.running),
            waiting=len(self._inbox) + len(scheduler.waiting) + len(self.documents.parked if self.documents else ()),
            pages_total=allocator.num_pages,
            pages_free=allocator.num_free,
            pages_cached=allocator.num_cached,
            pages_used=allocator.num_referenced,
            heartbeat_age_seconds=time.monotonic() - self._heartbeat,
            preemptions=scheduler.preemptions,
            aborted=outbox.aborted,
            generated_tokens=outbox.generated_tokens,
            prompt_tokens=outbox.prompt_tokens,
            cached_tokens=outbox.cached_tokens,
            keys_read=outbox.keys_read,
            keys_dense=outbox.keys_dense,
            bad_logits=outbox.bad_logits,
            steps=outbox.steps,
            mass_kept=outbox.mass_kept,
            disk=self.documents.counts() if self.documents else {},
        )

    def _is_busy(self) -> bool:
        with self._wake:  # or a request on its way from the one to the other would not be seen
            return bool(self._inbox or self._stepper.groups)

    def _run(self) -> None:
        with on_device(self._loaded.device):  # a thread begins with the first GPU
            self._loop()

    def _loop(self) -> None:
        stepper, clean = self._stepper, False
        try:
            while self._read_notes():
                self._heartbeat = time.monotonic()
                if self.documents is not None:
                    self.documents.turn()
                if stepper.scheduler.has_work:
                    stepper.step()
            clean = True
        except BaseException:
            log.exception("the engine died")
            raise
        finally:
            with self._wake:
                self._state = "dead"
                left = [*stepper.groups.values(), *self._inbox]
                self._inbox.clear()
            for group in left:
                with suppress(CacheError):  # what killed the engine may be that pages cannot be freed
                    stepper.end(group, None)
                stepper.outbox.send(group, Failed(EngineDead("the engine stopped before this request was done")))
            if self.documents is not None:
                self.documents.close(finish=clean)

    def _ring(self) -> None:
        """Makes the loop turn."""
        with self._wake:
            self._wake.notify()

    def _read_notes(self) -> bool:
        """Takes new requests and aborts; waits while there is nothing to do. False ends the loop."""
        with self._wake:
            work = self._stepper.scheduler.has_work or (self.documents is not None and self.documents.has_work)
            if not (self._inbox or self._aborts or work) and self._state != "dead":
                self._wake.wait(IDLE_SECONDS)
            new = list(self._inbox)
            self._inbox.clear()
            aborts = list(self._aborts)
            self._aborts.clear()
            alive = self._state != "dead"
            for group in new:
                self._stepper.groups[group.request.request_id] = group
        for group in new:
            self._stepper.start(group)
        for request_id in aborts:
            self._stepper.abort(request_id, RequestAborted("the request was aborted"))
        return alive
