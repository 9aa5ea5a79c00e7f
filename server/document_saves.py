"""Pages of computed prompts from the pool to disk, beside the step loop.

The engine's thread copies pages out, a slice per turn, into buffers of bounded size; one other thread hashes and writes
them. No page is held for a save: a page in the prefix index is full, so it does not change, and just before it is
copied the index is asked whether it is still there. What was evicted before its turn came is not kept.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from foveate.kv_cache.disk import PageStore
from foveate.kv_cache.disk_format import RunHeader, checksum, pack_tokens, padded
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.page_bytes import PageBytes
from foveate.kv_cache.prefix import PrefixEntry

log = logging.getLogger(__name__)

RUN_BYTES = 32 * 2**20  # of a file: large enough that syncing it costs little beside writing it
BUFFER_BYTES = 256 * 2**20  # copied and not yet written
MOST_SAVES = 256  # prompts that wait for their turn


@dataclass(slots=True, eq=False)
class Save:
    """One prompt whose pages are to be kept.

    Attributes:
        entries: Of its full pages.
        token_ids: Of these, packed as files have them.
        page_tokens: Tokens per page.
        layout: How a page lies in bytes.
        about: What the file says of them.
        missing: Logical pages still to be copied, ascending.
        first: Logical index of the first page of the run being copied.
        buffer: ``[n, stride]`` uint8, the run being copied.
        count: Pages in it.
    """

    entries: list[PrefixEntry]
    token_ids: bytes
    page_tokens: int
    layout: PageBytes
    about: dict[str, str | int]
    missing: deque[int]
    first: int = 0
    buffer: torch.Tensor | None = None
    count: int = 0


@dataclass(slots=True, eq=False)
class _Write:
    save: Save
    future: Future[bool]
    keys: list[bytes]
    nbytes: int


@dataclass(slots=True, eq=False)
class _Run:
    """Pages that were copied, for the writing thread."""

    save: Save
    first: int
    pages: torch.Tensor
    copied: torch.cuda.Event | None
    epoch: int
    keys: list[bytes]


class Saves:
    """All saves of an engine. Only its thread uses this, but for ``run_exclusively``.

    Args:
        store: Where pages are written to.
        cache: Where they come from.
        wake: Called from other threads when a buffer is free again.

    Attributes:
        skipped: Prompts that were not kept because too many waited.
        has_work: Whether ``turn`` has something to do at once.
    """

    def __init__(self, store: PageStore, cache: KVCacheManager, wake: Callable[[], None]) -> None:
        self.skipped = 0
        self.has_work = False
        self._store = store
        self._cache = cache
        self._wake = wake
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="foveate-cache-write")
        self._saves: deque[Save] = deque()
        self._writes: list[_Write] = []
        self._under_way: set[bytes] = set()  # keys that are in a buffer
        self._epoch = 0
        self._on_gpu = cache.pool.geometry.device.type == "cuda"

    @property
    def is_busy(self) -> bool:
        """Whether something is still to be copied or written."""
        return bool(self._saves or self._writes)

    def add(
        self, entries: list[PrefixEntry], token_ids: list[int], layout: PageBytes, about: dict[str, str | int]
    ) -> None:
        """Keeps the pages of ``entries``, as far as they are not kept yet.

        Args:
            entries: A chain from its first page on.
            token_ids: Its tokens, at least.
            layout: How its pages lie in bytes.
            about: For people who list the cache.
        """
        if not self._store.takes_writes:
            return
        keys = [entry.key for entry in entries]
        missing = deque(index for index in self._store.missing(keys) if keys[index] not in self._under_way)
        if not missing:
            return
        if len(self._saves) >= MOST_SAVES:
            self.skipped += 1
            return
        size = self._cache.page_size
        packed = pack_tokens(token_ids[: len(entries) * size])
        self._saves.append(Save(entries, packed, size, layout, about, missing))
        self.has_work = True

    def turn(self, deadline: float) -> None:
        """Copies pages out, until ``deadline`` (``time.monotonic()``) or until the buffers are full."""
        self.has_work = False
        for write in [write for write in self._writes if write.future.done()]:
            self._writes.remove(write)
            self._under_way.difference_update(write.keys)
            error = write.future.exception()
            if error is not None:
                log.error("pages were not written to disk", exc_info=error)
            if error is not None or not write.future.result():
                write.save.missing.clear()  # nobody would find what comes behind them
        while self._saves:
            save = self._saves[0]
            try:
                state = self._copy(save, deadline)
            except Exception:
                log.exception("pages could not be copied; they are not kept")
                self._discard(save)
                state = "done"
            if state == "done":
                self._saves.popleft()
            elif state == "late":
                self.has_work = True
                return
            else:
                return  # the writing thread rings when a buffer is free

    def forget(self) -> None:
        """Drops what waits to be copied and what was copied, so that what is removed from disk does not come back."""
        self._epoch += 1
        while self._saves:
            self._discard(self._saves.popleft())

    def run_exclusively(self, work: Callable[[], object]) -> Future[object]:
        """Runs ``work`` in the writing thread, between two writes. May be called from any thread."""
        return self._writer.submit(work)

    def close(self, seconds: float) -> None:
        """Writes what there is, as far as ``seconds`` allow, and stops the thread."""
        deadline = time.monotonic() + seconds
        while self.is_busy and time.monotonic() < deadline:
            self.turn(deadline)
            if self._writes:
                wait([write.future for write in self._writes], max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        if self.is_busy:
            log.warning("document cache: not all pages were written in the %.0f s that there were", seconds)
        self._writer.shutdown(wait=False, cancel_futures=True)

    def _copy(self, save: Save, deadline: float) -> str:
        """Copies pages of one prompt: ``done``, ``late`` (time is up) or ``full`` (the buffers are)."""
        while save.missing:
            index = save.missing[0]
            entry = save.entries[index]
            if not self._cache.prefix.has(entry):
                break  # evicted, and what is behind it will not be found either
            if entry.key in self._under_way:  # another request with the same beginning came first
                save.missing.popleft()
                continue
            if save.buffer is not None and (index != save.first + save.count or save.count == len(save.buffer)):
                self._hand_over(save)
            if save.buffer is None:
                save.buffer = self._buffer(save)
                if save.buffer is None:
                    return "full"
                save.first, save.count = index, 0
            if time.monotonic() > deadline:
                return "late"
            save.layout.copy_out(entry.page, save.buffer[save.count])
            self._under_way.add(entry.key)
            save.count += 1
            save.missing.popleft()
        self._hand_over(save)
        return "done"

    def _buffer(self, save: Save) -> torch.Tensor | None:
        stride = padded(save.layout.nbytes)
        pages = min(max(1, RUN_BYTES // stride), len(save.missing))
        held = sum(write.nbytes for write in self._writes)
        if held and held + pages * stride > BUFFER_BYTES:
            return None
        return torch.empty(pages, stride, dtype=torch.uint8, pin_memory=self._on_gpu)

    def _hand_over(self, save: Save) -> None:
        """Gives the run that was copied to the writing thread."""
        buffer, save.buffer = save.buffer, None
        if buffer is None or not save.count:
            return
        pages = buffer[: save.count]
        copied = None
        if self._on_gpu:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        keys = _keys(save)
        run = _Run(save, save.first, pages, copied, self._epoch, keys)
        future = self._writer.submit(self._write, run)
        self._writes.append(_Write(save, future, keys, buffer.numel()))
        future.add_done_callback(lambda _: self._ring())

    def _write(self, run: _Run) -> bool:
        """In the writing thread."""
        if run.copied is not None:
            run.copied.synchronize()
        save, pages = run.save, run.pages
        good = next((i for i, page in enumerate(pages) if not save.layout.is_finite(page)), len(pages))
        if run.epoch != self._epoch or not good:
            return False
        header = RunHeader(
            namespace=save.entries[0].namespace,
            parent=save.entries[run.first - 1].key if run.first else b"",
            first_page=run.first,
            page_tokens=save.page_tokens,
            page_bytes=save.layout.nbytes,
            keys=tuple(run.keys[:good]),
            checksums=tuple(checksum(page) for page in pages[:good]),
            created=time.time(),
            about=save.about,
        )
        return self._store.write(header, save.token_ids[: 4 * header.num_tokens], pages[:good])

    def _discard(self, save: Save) -> None:
        if save.buffer is not None:
            self._under_way.difference_update(_keys(save))
            save.buffer = None

    def _ring(self) -> None:
        self.has_work = True
        self._wake()


def _keys(save: Save) -> list[bytes]:
    """Of the pages that were copied into the buffer."""
    return [entry.key for entry in save.entries[save.first : save.first + save.count]]
