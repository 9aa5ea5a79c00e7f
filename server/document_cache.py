"""The document cache: prompts' pages on disk, so that a long document asked again tomorrow starts at once.

What is kept is what the prefix index holds, under the same chained keys; ``document_loads`` brings pages in while a
request waits, ``document_saves`` takes them out once a prompt gave its first good token. A disk that is full, slow,
broken or read-only costs hits, never a request.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.kv_cache.disk import PageStore
from foveate.kv_cache.disk_index import Document
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.page_bytes import PageBytes
from foveate.kv_cache.prefix import chain_to
from foveate.kv_cache.stats import PageStat

from .document_identity import identity_of
from .document_loads import Loads
from .document_saves import Saves
from .exceptions import InvalidRequest
from .loader import LoadedModel
from .options import EngineOptions
from .scheduler import Scheduler
from .sequence import RequestGroup, Sequence

log = logging.getLogger(__name__)

SLICE_SECONDS = 0.02  # of a turn beside running requests
IDLE_SLICE_SECONDS = 0.2  # of a turn when nothing else is to be done
REFRESH_SECONDS = 5.0
TOUCH_SECONDS = 60.0  # between two notes that a file is in use
CLOSE_SECONDS = 10.0  # for writing what is not written yet when the engine stops
DELETE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class _Removal:
    """Pages to take out of the prefix index by their keys, all of them for ``None``."""

    keys: list[bytes] | None
    done: threading.Event = field(default_factory=threading.Event)


class DocumentCache:
    """One engine's pages on disk. Only the engine's thread uses it, but where a method says otherwise.

    Args:
        store: The files.
        cache: The pool and its prefix index.
        scheduler: Whose waiting sequences get pages from disk.
        options: Of the engine.
        model_name: What clients call the model.
        identity: See ``document_identity``; the beginning of every namespace.
        wake: Makes the engine's loop turn; called from other threads.
    """

    def __init__(
        self,
        store: PageStore,
        cache: KVCacheManager,
        scheduler: Scheduler,
        options: EngineOptions,
        model_name: str,
        identity: bytes,
        wake: Callable[[], None],
    ) -> None:
        self.identity = identity
        self._store = store
        self._cache = cache
        self._scheduler = scheduler
        self._options = options
        self._model_name = model_name
        self._loads = Loads(store, cache, scheduler, wake)
        self._saves = Saves(store, cache, wake)
        self._wake = wake
        self._layouts: dict[tuple[PageStat, ...], PageBytes] = {}
        self._touched: dict[str, float] = {}
        self._refreshed = time.monotonic()
        self._removals: deque[_Removal] = deque()  # other threads leave them here

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        cache: KVCacheManager,
        scheduler: Scheduler,
        options: EngineOptions,
        wake: Callable[[], None],
    ) -> DocumentCache | None:
        """The cache that ``options`` ask for, or ``None``. Reads every weight of the model once.

        Raises:
            InvalidRequest: prefix reuse is off, without which no page has a name.
        """
        if options.cache_dir is None:
            return None
        if not options.prefix_reuse:
            raise InvalidRequest("a document cache needs prefix reuse: leave out one of the two", param="cache_dir")
        geometry = cache.pool.geometry
        store = PageStore(
            Path(options.cache_dir).expanduser().absolute(),
            int(options.cache_disk_gib * 2**30),
            pin=geometry.device.type == "cuda",
        )
        store.make_room()
        try:
            identity = identity_of(loaded, geometry, options)
        except Exception:  # a layout of weights that cannot be read
            log.exception("no pages are kept on disk: the model cannot be told from others")
            return None
        log.info("document cache: %d files, %.2f GiB in %s", store.num_files, store.nbytes / 2**30, store.folder)
        return cls(store, cache, scheduler, options, loaded.name, identity, wake)

    @property
    def has_work(self) -> bool:
        """Whether ``turn`` has something to do at once."""
        return self._loads.has_work or self._saves.has_work or bool(self._removals)

    @property
    def parked(self) -> list[RequestGroup]:
        """Requests that wait for pages, which the scheduler does not know. May be asked from any thread."""
        return [load.sequence.group for load in list(self._loads.parked)]

    def turn(self) -> None:
        """Moves pages in both directions for a short time. To be called before every step, and when woken."""
        try:
            self._remove()
            self._loads.take(self._layout, self._touch)
            busy = self._scheduler.has_work
            deadline = time.monotonic() + (SLICE_SECONDS if busy else IDLE_SLICE_SECONDS)
            self._loads.turn(deadline)
            self._saves.turn(deadline)
            if time.monotonic() - self._refreshed > REFRESH_SECONDS:
                self._refreshed = time.monotonic()
                self._saves.run_exclusively(self._store.refresh)
        except Exception:
            log.exception("the document cache failed at a turn")

    def prompt_done(self, sequence: Sequence) -> None:
        """Keeps the pages of a prompt that was computed and gave good logits."""
        prompt = sequence.group.request.prompt_token_ids
        if sequence.table is None or sequence.table.tail is None or len(prompt) < self._options.cache_min_tokens:
            return
        try:
            entries = chain_to(sequence.table.tail)[: len(prompt) // self._cache.page_size]
            scheme = sequence.group.request.scheme
            about: dict[str, str | int] = {"model": self._model_name, "attention": scheme.name}
            self._saves.add(entries, prompt, self._layout(sequence), about)
        except Exception:
            log.exception("a prompt could not be kept on disk")

    def prompt_bad(self, sequence: Sequence) -> None:
        """Removes the pages of a prompt that gave logits which are not finite."""
        if sequence.table is None:
            return
        keys = [entry.key for entry in chain_to(sequence.table.tail)]
        names = [span.name for span in self._store.spans(keys)]
        if names:
            log.warning("document cache: a prompt with bad logits had pages on disk; %d files are removed", len(names))
            self._saves.run_exclusively(lambda: self._store.remove(names))

    def close(self, finish: bool = True) -> None:
        """Stops; with ``finish`` what is not written yet is written, as far as ``CLOSE_SECONDS`` allow."""
        self._loads.close()
        self._saves.close(CLOSE_SECONDS if finish else 0.0)

    def counts(self) -> Mapping[str, float]:
        """Numbers for the metrics. May be called from any thread."""
        store = self._store
        return {
            "disk_bytes": store.nbytes,
            "disk_files": store.num_files,
            "disk_hit_tokens": self._loads.restored_tokens,
            "disk_written_bytes": store.counts.written_bytes,
            "disk_evicted_files": store.counts.evicted,
            "disk_corrupt_files": store.counts.corrupt,
            "disk_write_errors": store.counts.write_errors,
            "disk_skipped_prompts": self._saves.skipped,
        }

    def describe(self, limit: int, after: str = "") -> dict[str, Any]:
        """What is kept, as JSON values: sizes and times, nothing of the contents. May be called from any thread.

        Args:
            limit: Entries at most, the latest used first.
            after: Only those that follow the one of this id; an unknown id is ignored.
        """
        documents = self._store.documents()
        start = next((place + 1 for place, item in enumerate(documents) if item.id == after), 0)
        return {
            "object": "list",
            "has_more": len(documents) > start + limit,
            "bytes": self._store.nbytes,
            "limit_bytes": self._store.limit_bytes,
            "data": [_entry(document) for document in documents[start : start + limit]],
        }

    def delete(self, id: str | None) -> list[str]:
        """Removes one document, or all of them, from disk and from memory; returns the ids of those that are gone.

        May be called from any thread but the engine's. Pages that other documents begin with as well stay. A request
        in work keeps its pages until it ends; nobody else finds them.

        Raises:
            KeyError: there is no such document.
            TimeoutError: the disk takes too long.
            OSError: the disk does not let go of it.
        """
        found = [document for document in self._store.documents() if id in (None, document.id)]
        if id is not None and not found:
            raise KeyError(id)
        keys = None if id is None else [key for item in found for key in item.own_keys]
        # First the engine lets go of what it would write again, then the files go, between two writes.
        self._let_go(keys)
        removing = self._saves.run_exclusively(
            lambda: self._store.remove(None) if keys is None else self._store.delete(keys)
        )
        left = removing.result(DELETE_SECONDS)
        self._let_go(keys)  # a request may have brought some in while the files were still there
        if left:
            raise OSError("the disk does not let go of all files")
        return [item.id for item in found]

    def _let_go(self, keys: list[bytes] | None) -> None:
        """Has the engine do ``_remove``, and waits for it."""
        removal = _Removal(keys)
        self._removals.append(removal)
        self._wake()
        if not removal.done.wait(DELETE_SECONDS):
            raise TimeoutError("the engine did not come to it")

    def _remove(self) -> None:
        while self._removals:
            removal = self._removals.popleft()
            self._saves.forget()
            self._loads.forget(removal.keys)
            self._cache.discard(self._cache.prefix.keys() if removal.keys is None else removal.keys)
            removal.done.set()

    def _layout(self, sequence: Sequence) -> PageBytes:
        stats = sequence.group.request.scheme.page_stats(self._cache.pool.geometry)
        if stats not in self._layouts:
            self._layouts[stats] = PageBytes(self._cache.pool, stats)
        return self._layouts[stats]

    def _touch(self, names: SequenceOf[str]) -> None:
        """Notes that files are in use; a file that is all in memory must not look forgotten."""
        now = time.monotonic()
        if self._touched.get(names[-1], float("-inf")) > now - TOUCH_SECONDS:
            return
        self._touched = {name: when for name, when in self._touched.items() if when > now - TOUCH_SECONDS}
        self._touched[names[-1]] = now
        self._saves.run_exclusively(lambda: self._store.touch(names))


def _entry(document: Document) -> dict[str, Any]:
    last = document.runs[-1]
    return {
        "id": document.id,
        "object": "cache.entry",
        "model": last.header.about.get("model"),
        "attention": last.header.about.get("attention"),
        "tokens": document.tokens,
        "bytes": document.nbytes,
        "own_bytes": document.own_bytes,
        "created": int(last.header.created),
        "last_used": last.used // 10**9,
    }
