"""Pages from disk into the pool while their request waits.

Threads read and verify files into memory of their own; the engine's thread alone copies what they read into the pool,
a slice per turn. No page is held for a load: what it brought in lies in the prefix index like any page that a
finished request left, its end to be evicted first, so a load never stands in the way of running requests, and can be
given up at any moment.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from foveate.kv_cache.disk import PageStore
from foveate.kv_cache.disk_format import pack_tokens, padded
from foveate.kv_cache.disk_index import Span
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.page_bytes import PageBytes
from foveate.kv_cache.prefix import PrefixEntry, page_keys

from .scheduler import Scheduler
from .sequence import Sequence

log = logging.getLogger(__name__)

ACTIVE_LOADS = 2
READ_AHEAD = 3  # files that are read beyond the one being copied, of each load
READER_THREADS = 4  # one verified 1.1 GB/s of SHA-256
LOOK_SECONDS = 1.0  # between two looks for the pages of one waiting request
STALL_SECONDS = 20.0  # after which a disk that gives nothing is no longer waited for
PAUSE_SECONDS = 60.0  # and nothing is read from it for so long

Reading = Future[list[torch.Tensor]]


@dataclass(slots=True, eq=False)
class Load:
    """One request's pages on their way.

    Attributes:
        sequence: Waits for them; it is not in the scheduler.
        namespace: Of its group.
        tokens: Those whose keys may be reused.
        keys: Of its full pages.
        layout: How a page lies in bytes.
        chain: Entries of its pages that are in the pool; the next one to copy comes behind them.
        packed: The tokens as files have them.
        spans: Files still to be read, each with the logical index of its first page.
        reading: Files being read, in order.
        pages: Read pages still to be copied.
        progress: When the last page came.
        is_open: Whether ``start`` was called.
    """

    sequence: Sequence
    namespace: bytes
    tokens: list[int]
    keys: list[bytes]
    layout: PageBytes
    chain: list[PrefixEntry] = field(default_factory=list)
    packed: bytes = b""
    spans: deque[tuple[Span, int]] = field(default_factory=deque)
    reading: deque[tuple[Reading, int]] = field(default_factory=deque)
    pages: deque[torch.Tensor] = field(default_factory=deque)
    progress: float = 0.0
    is_open: bool = False


class Loads:
    """All loads of an engine. Only its thread uses this.

    Args:
        store: Where pages are read from.
        cache: Where they go.
        scheduler: Sequences are taken out of its queue while they wait for pages, and put back.
        wake: Called from other threads when there is something to copy.

    Attributes:
        restored_tokens: Tokens that were brought in.
        parked: Loads that are not done, oldest first.
        has_work: Whether ``turn`` has something to do at once.
    """

    def __init__(self, store: PageStore, cache: KVCacheManager, scheduler: Scheduler, wake: Callable[[], None]) -> None:
        self.restored_tokens = 0
        self.parked: list[Load] = []
        self.has_work = False
        self._store = store
        self._cache = cache
        self._scheduler = scheduler
        self._wake = wake
        self._readers = ThreadPoolExecutor(READER_THREADS, thread_name_prefix="foveate-cache-read")
        # Of waiting sequences: when they were looked up, and the load that came of it.
        self._looked: dict[Sequence, tuple[float, Load | None]] = {}
        self._pause_until = 0.0

    def take(self, layout_of: Callable[[Sequence], PageBytes], touch: Callable[[list[str]], None]) -> None:
        """Takes sequences out of the scheduler's queue that could come in, and of which the disk holds more."""
        now = time.monotonic()
        waiting = list(self._scheduler.waiting)
        self._looked = {item: self._looked[item] for item in waiting if item in self._looked}
        if now < self._pause_until:
            return
        room = self._room()
        for sequence in waiting:
            if self._needed(sequence) > room:
                continue  # it cannot come in yet, and what is brought in now may be gone by then
            when, load = self._looked.get(sequence, (float("-inf"), None))
            if load is None and now - when > LOOK_SECONDS:
                load = self._look(sequence, layout_of, touch)
                self._looked[sequence] = now, load
            if load is not None:
                self._scheduler.remove(sequence)
                self.parked.append(load)
                self.has_work = True

    def turn(self, deadline: float) -> None:
        """Copies what was read, until ``deadline`` (``time.monotonic()``)."""
        self.has_work = False
        self._end_aborted()
        room = self._room()
        for load in list(self.parked):
            try:
                if not load.is_open:
                    if time.monotonic() < self._pause_until or self._needed(load.sequence) > room:
                        self._put_back(load, load)
                        continue
                    if not self._open(load):
                        continue
                known = len(load.chain)
                is_done = self._advance(load, deadline)
                if len(load.chain) > known:
                    self._renew(load)
                if is_done:
                    self._put_back(load, None)
            except Exception:
                log.exception("pages could not be brought in from disk; they are computed")
                self._put_back(load, None)

    def forget(self, keys: Iterable[bytes] | None) -> None:
        """Gives up loads of which any page is under ``keys``, all of them for ``None``; these pages are to be gone."""
        self._end_aborted()
        gone = None if keys is None else set(keys)
        for load in list(self.parked):
            if load.is_open and (gone is None or not gone.isdisjoint(load.keys)):
                self._put_back(load, None)

    def close(self) -> None:
        """Gives up all loads."""
        for load in list(self.parked):
            self._end(load)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _room(self) -> float:
        """Pages that a sequence may have beside the running ones; alone it may have what it needs."""
        return self._free_pages() if self._scheduler.running else math.inf

    def _free_pages(self) -> int:
        """Pages that nobody holds, nor will who is reading a prompt."""
        return self._cache.available - self._scheduler.promised()

    def _needed(self, sequence: Sequence) -> int:
        return self._cache.pool.geometry.pages_for(len(sequence.tokens) + 1)

    def _look(
        self, sequence: Sequence, layout_of: Callable[[Sequence], PageBytes], touch: Callable[[list[str]], None]
    ) -> Load | None:
        """A load of what the disk holds of a sequence and the pool does not, if that is anything."""
        tokens, namespace = sequence.reusable_tokens[:-1], sequence.group.namespace
        if namespace is None:
            return None
        keys = page_keys(tokens, namespace, self._cache.page_size)
        spans = self._store.spans(keys)
        if not spans:
            return None
        touch([span.name for span in spans])
        load = Load(sequence, namespace, tokens, keys, layout_of(sequence))
        return load if self._gain(load) > 0 else None

    def _gain(self, load: Load) -> int:
        """Tokens that would not have to be computed, and sets where the load begins."""
        found = self._cache.prefix.match(load.tokens, load.namespace)
        load.chain = found
        size, tile = self._cache.page_size, load.sequence.group.tile
        known = self._store.count(load.keys)
        while known * size % tile:
            known -= 1
        return (known - len(found)) * size

    def _open(self, load: Load) -> bool:
        """Starts a load if there is room for it beside the others, and none of them brings in the same pages."""
        active = [other for other in self.parked if other.is_open]
        claimed = sum(self._needed(other.sequence) for other in active)
        if active and (len(active) >= ACTIVE_LOADS or claimed + self._needed(load.sequence) > self._free_pages()):
            return False
        if self._gain(load) > 0:
            first = len(load.chain)
            if any(load.keys[first] in other.keys for other in active):
                return False
            for span in self._store.spans(load.keys[first:]):
                load.spans.append((span, first))
                first += span.count
            load.packed = pack_tokens(load.tokens)
        load.progress = time.monotonic()
        load.is_open = True
        return True

    def _advance(self, load: Load, deadline: float) -> bool:
        """Copies pages; true when the load is at its end."""
        cache, size, namespace = self._cache, self._cache.page_size, load.namespace
        is_renewed = False
        while True:
            while load.spans and len(load.reading) <= READ_AHEAD:
                span, first = load.spans.popleft()
                reading = self._readers.submit(self._store.read, span, first, namespace, load.packed)
                load.reading.append((reading, span.count))
                reading.add_done_callback(lambda _: self._ring())
            if not load.pages:
                if not load.reading:
                    return True
                reading, wanted = load.reading[0]
                if not reading.done():
                    return self._is_stalled(load)
                load.reading.popleft()
                load.pages.extend(reading.result())
                load.progress = time.monotonic()
                if len(load.pages) < wanted:  # gone or damaged: what comes after it is of no use
                    load.spans.clear()
                    _cancel(load)
                if not load.pages:
                    return True
            if time.monotonic() > deadline:
                self.has_work = True
                return False
            data = load.pages.popleft()
            if len(data) != padded(load.layout.nbytes):
                return True
            if not is_renewed and not self._renew(load):
                return True  # running requests took some of its pages
            is_renewed = True
            if cache.available <= len(load.chain):
                return True  # it would take the place of its own
            start = len(load.chain) * size
            parent = load.chain[-1] if load.chain else None
            fill = partial(load.layout.copy_in, source=data)
            entry = cache.restore(parent, load.tokens[start : start + size], namespace, fill)
            if entry is None:
                return True
            load.chain.append(entry)
            self.restored_tokens += size

    def _renew(self, load: Load) -> bool:
        """Makes the pages of a load the last to be evicted, and of these the first page the very last.

        Returns:
            Whether all of them stand. What is behind one that does not stays old, since nobody will find it.
        """
        has, allocator = self._cache.prefix.has, self._cache.allocator
        standing = next((place for place, entry in enumerate(load.chain) if not has(entry)), len(load.chain))
        for entry in reversed(load.chain[:standing]):  # 0.7 us each
            allocator.retain(entry.page)
            allocator.release(entry.page)
        return standing == len(load.chain)

    def _is_stalled(self, load: Load) -> bool:
        if time.monotonic() - load.progress < STALL_SECONDS:
            return False
        log.warning("document cache: the disk gave nothing for %.0f s; pages are computed", STALL_SECONDS)
        self._pause_until = time.monotonic() + PAUSE_SECONDS
        return True

    def _put_back(self, load: Load, again: Load | None) -> None:
        """Lets the scheduler have a sequence; ``again`` is the load to take up when there is room, if any."""
        self._end(load)
        self._looked[load.sequence] = time.monotonic(), again
        load.sequence.wait.found_tokens = None
        self._scheduler.add(load.sequence)

    def _end(self, load: Load) -> None:
        _cancel(load)
        load.pages.clear()
        self.parked.remove(load)
        self.has_work = self.has_work or bool(self.parked)

    def _end_aborted(self) -> None:
        for load in list(self.parked):
            if load.sequence not in load.sequence.group.sequences:
                self._end(load)

    def _ring(self) -> None:
        self.has_work = True
        self._wake()


def _cancel(load: Load) -> None:
    for reading, _ in load.reading:
        reading.cancel()
    load.reading.clear()
