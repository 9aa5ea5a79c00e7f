"""Which tokens are computed in the next step. Pure bookkeeping: no torch, no clock."""

from __future__ import annotations

import bisect

from foveate.kv_cache.errors import OutOfPages
from foveate.kv_cache.manager import KVCacheManager

from .sequence import Chunk, Sequence

# Tokens of a preempted answer in one step: each is a decode query of its own, and what a scheme holds for one adds up.
REREAD_TOKENS = 64


class Scheduler:
    """Continuous batching with chunked prefill over one KV cache.

    Each step has room for ``max_batch_tokens``. Every decoding sequence gets one; chunks of
    prompts take the rest, oldest request first. When pages run out, the cache gives up
    unreferenced prefix pages first (that is the cache's doing); then the youngest running
    sequence is preempted: its pages are freed and it waits to be computed again from its tokens.
    The oldest is never preempted for a younger one, so every request ends.

    Attributes:
        waiting: Sequences without pages, oldest first.
        running: Sequences with pages, oldest first.
        preemptions: How often a sequence was put back to waiting.
    """

    def __init__(self, cache: KVCacheManager, *, max_batch_tokens: int, max_running: int) -> None:
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a new or preempted sequence by age; one that has pages already (a fork) runs on."""
        queue = self.waiting if sequence.table is None else self.running
        bisect.insort(queue, sequence, key=lambda item: item.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, finished or aborted, and frees its pages."""
        queue = self.waiting if sequence.table is None else self.running
        queue.remove(sequence)
        self._free(sequence)

    def schedule(self) -> list[Chunk]:
        """Chooses the next step's chunks, with pages reserved for all of them.

        Empty only when there is no work. Decoding sequences come first, then prompts.
        """
        chunks: list[Chunk] = []
        room = self.max_batch_tokens
        decoding = [sequence for sequence in self.running if sequence.num_remaining == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_remaining > 1]
        for sequence in decoding + prefilling:
            if room == 0:
                break
            # An older sequence may have taken this one's pages a moment ago.
            if sequence.table is not None:
                chunk = self._grow(sequence, _chunk(sequence, sequence.num_computed, room), chunks)
                if chunk is not None:
                    chunks.append(chunk)
                    room = self.max_batch_tokens - sum(item.count for item in chunks)
        while room and self.waiting and len(self.running) < self.max_running:
            chunk = self._admit(self.waiting[0], room)
            if chunk is None:
                break
            chunks.append(chunk)
            room -= chunk.count
        return chunks

    def _grow(self, sequence: Sequence, count: int, chunks: list[Chunk]) -> Chunk | None:
        """Reserves pages for ``count`` more tokens, preempting younger sequences if it must."""
        assert sequence.table is not None
        while True:
            try:
                self.cache.reserve(sequence.table, sequence.num_computed + count)
            except OutOfPages:
                victim = self.running[-1]
                self._preempt(victim)
                chunks[:] = [chunk for chunk in chunks if chunk.sequence is not victim]
                if victim is sequence:
                    return None
            else:
                return Chunk(sequence, sequence.num_computed, count)

    def _admit(self, sequence: Sequence, room: int) -> Chunk | None:
        """Starts the oldest waiting sequence if all its tokens so far fit into free pages.

        Asking for all of them, and not for the first chunk alone, keeps prompts that were let in
        from preempting each other half way.
        """
        table = self.cache.open(sequence.tokens, sequence.group.namespace, sequence.group.tile)
        needed = self.cache.pages_needed(table, len(sequence.tokens) + 1)
        if needed > self.cache.available and self.running:
            self.cache.free(table)
            return None
        count = _chunk(sequence, table.num_tokens, room)
        try:
            self.cache.reserve(table, table.num_tokens + count)
        except OutOfPages:
            self.cache.free(table)
            return None
        self.waiting.remove(sequence)
        sequence.table = table
        sequence.num_computed = table.num_tokens
        if not sequence.num_generated:
            sequence.group.cached_tokens = table.num_cached
        self.add(sequence)
        return Chunk(sequence, sequence.num_computed, count)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self.preemptions += 1
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.cache.free(sequence.table)
        sequence.table = None
        sequence.num_computed = 0


def _chunk(sequence: Sequence, start: int, room: int) -> int:
    """Tokens to compute from ``start`` on: all, or what there is room for, cut between tiles where that leaves any."""
    end, prompt = len(sequence.tokens), len(sequence.group.request.prompt_token_ids)
    if start >= prompt:
        return min(end - start, room, REREAD_TOKENS)
    if end - prompt > REREAD_TOKENS:
        end = prompt
    if end - start <= room:
        return end - start
    tile = sequence.group.tile
    cut = (start + room) // tile * tile
    return cut - start if cut > start else room
