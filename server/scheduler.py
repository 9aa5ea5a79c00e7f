"""Which tokens are computed in the next step. Pure bookkeeping: no torch, no clock."""

from __future__ import annotations

import bisect
import math
from collections import Counter

from foveate.kv_cache.errors import CacheError, OutOfPages
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.table import BlockTable

from .pace import Pace
from .sequence import Chunk, Sequence, Wait

# Tokens of a preempted answer in one step: each is a decode query of its own, and what a scheme holds for one adds up.
REREAD_TOKENS = 64
# A prompt gets so many tokens however long a step with answers takes already, so that it comes to its end.
LEAST_TOKENS = 32


class SequenceFault(Exception):
    """The cache failed at one sequence; its cause is the error."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__("the cache failed at a sequence")
        self.sequence = sequence


class Scheduler:
    """Continuous batching with chunked prefill over one KV cache.

    Each step has room for ``max_batch_tokens``. Every answer gets one token; prompts share the rest,
    which the pace bounds while answers are written, so that no answer waits long for its next token,
    and while a prompt that fits into a step waits behind one that does not.

    **Who goes first among prompts.** Smaller ``priority`` before larger. Within one priority the
    steps take turns: one serves the prompt with the fewest tokens left first, the next one the
    oldest. So a short prompt passes a very long one at once, and the oldest prompt gets half of the
    room however many short ones come: it waits at most twice as long as if it were served alone
    after those before it. Turns rather than shares of a step, since chunks stay large and tiles whole.

    **Who comes in.** A prompt comes in when all its tokens fit into free pages beside what the
    prompts that are in still need, so prompts do not preempt each other half way. It takes as many of
    the ``max_running`` seats as its request has choices, which will be written at once. Where the first
    in the queue does not fit, younger ones may pass it until they add up to as many tokens as it has;
    then it is next, whatever comes.

    **When pages run out.** The cache gives up unreferenced prefix pages first (that is the cache's
    doing); then the running sequence of the largest priority, among those the youngest, is
    preempted: its pages are freed and it waits to be computed again from its tokens. The oldest is
    never preempted for a younger one of its priority, so every request ends. A waiting request
    preempts running ones only if their priority is larger than its own.

    Attributes:
        waiting: Sequences without pages, in the order of ``Sequence.order``.
        running: Sequences with pages, in the same order.
        preemptions: How often a sequence was put back to waiting.
    """

    def __init__(self, cache: KVCacheManager, *, max_batch_tokens: int, max_running: int, pace: Pace) -> None:
        self.cache = cache
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.pace = pace
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._oldest_first = False

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queues a new or preempted sequence in order; one that has pages already (a fork) runs on."""
        queue = self.waiting if sequence.table is None else self.running
        bisect.insort(queue, sequence, key=lambda item: item.order)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, finished or aborted, and frees its pages; one that is not here is let be."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._free(sequence)

    def prompt_done(self, sequence: Sequence) -> None:
        """Says that the prompt of ``sequence`` is in the cache: who waits with the same beginning needs less now."""
        for item in self.waiting:
            if item.group.namespace == sequence.group.namespace:
                item.wait.found_tokens, item.wait.pages = None, 0

    def schedule(self) -> list[Chunk]:
        """Chooses the next step's chunks, with pages reserved for all of them: answers first, then prompts.

        Empty only when there is no work, or no page for any of it.

        Raises:
            SequenceFault: the cache failed at one sequence. Without it the next call may succeed.
        """
        chunks: list[Chunk] = []
        if self.waiting and self.waiting[0].wait.is_blocked:
            self._come_in(self.waiting[0], chunks)
        for sequence in [sequence for sequence in self.running if sequence.num_remaining == 1]:
            # An older sequence may have taken this one's pages a moment ago.
            if sequence.table is not None and len(chunks) < self.max_batch_tokens:
                self._grow(Chunk(sequence, sequence.num_computed, 1), chunks)
        prompts = self._prompts()
        has_answers = bool(chunks)
        work = self.pace.room if has_answers or self._is_held_up(prompts) else math.inf
        is_first = True
        for sequence in prompts:
            room = self.max_batch_tokens - sum(chunk.count for chunk in chunks)
            if room == 0 or not (is_first or work > 0):
                break
            if sequence.table is None and not (sequence in self.waiting and self._come_in(sequence, chunks)):
                continue
            # One that comes to its first token waits for itself alone.
            is_free = is_first and not has_answers and sequence.num_remaining <= self.max_batch_tokens
            chunk = self._cut(sequence, room, math.inf if is_free else work, is_first)
            if chunk.count and self._grow(chunk, chunks):
                work -= self.pace.work(chunk)
                is_first = False
                if not chunk.ends_sequence and chunk.start < len(sequence.group.request.prompt_token_ids):
                    break  # it took what there was; who waits shall look for a common prefix when it is complete
        return chunks

    def _prompts(self) -> list[Sequence]:
        """Prompts, and answers to be read again, in the order in which they are served in this step."""
        prompts = [sequence for sequence in self.running if sequence.num_remaining > 1] + self.waiting
        if len(prompts) < 2:
            return prompts
        self._oldest_first = not self._oldest_first
        return sorted(prompts, key=_order if self._oldest_first else self._shortest)

    def _shortest(self, sequence: Sequence) -> tuple[int, int, tuple[int, float, int]]:
        return sequence.priority, self._left(sequence), sequence.order

    def _left(self, sequence: Sequence) -> int:
        """Tokens to compute before its next one is drawn."""
        if sequence.table is not None:
            return sequence.num_remaining
        if sequence.wait.found_tokens is None:
            try:
                sequence.wait.found_tokens = self.cache.find(sequence.reusable_tokens, sequence.group.namespace)
            except Exception as error:
                raise SequenceFault(sequence) from error
        return sequence.num_remaining - sequence.wait.found_tokens

    def _is_held_up(self, prompts: list[Sequence]) -> bool:
        """Whether somebody would have a first token within a step but for prompts of many, none of better priority."""
        if len(prompts) < 2:
            return False
        long = [item.priority for item in prompts if self._left(item) > self.max_batch_tokens]
        return bool(long) and any(
            item.priority <= min(long) and self._left(item) <= self.max_batch_tokens and self._may_come_in(item)
            for item in prompts
        )

    def _may_come_in(self, sequence: Sequence) -> bool:
        """Whether it is in, or nothing but pages, which are yet to be counted, can keep it out."""
        if sequence.table is not None:
            return True
        head = self.waiting[0]
        if sequence.wait.is_blocked or (sequence is not head and not self._may_pass(sequence, head)):
            return False
        return self._has_seats(self.running, sequence) or self._may_preempt_for(sequence)

    def _may_pass(self, sequence: Sequence, head: Sequence) -> bool:
        """Whether it may come in before the first in the queue; a blocked one is passed by no more than its tokens."""
        return not head.wait.is_blocked or (
            sequence.priority == head.priority and head.wait.passed_tokens + len(sequence.tokens) <= len(head.tokens)
        )

    def _cut(self, sequence: Sequence, room: int, work: float, is_first: bool) -> Chunk:
        """The next chunk of a prompt: all of it, or what there is room for, cut between tiles where that leaves any.

        What a scheme selects may change where a tile is cut, so the pace alone never cuts one.
        """
        start, end = sequence.num_computed, len(sequence.tokens)
        prompt, tile = len(sequence.group.request.prompt_token_ids), sequence.group.tile
        if start >= prompt:
            return Chunk(sequence, start, min(end - start, room, REREAD_TOKENS))
        if end - prompt > REREAD_TOKENS:
            end = prompt
        if work < math.inf:
            paced = self.pace.tokens(work, Chunk(sequence, start, 0))
            least = tile - start % tile
            if is_first:
                paced = max(paced, least, LEAST_TOKENS)
            elif paced < min(least, end - start):
                return Chunk(sequence, start, 0)
            room = min(room, paced)
        if end - start <= room:
            return Chunk(sequence, start, end - start)
        cut = (start + room) // tile * tile
        if cut > start:
            return Chunk(sequence, start, cut - start)
        return Chunk(sequence, start, room if is_first else 0)  # what others left of a step is no reason to cut a tile

    def _grow(self, chunk: Chunk, chunks: list[Chunk]) -> bool:
        """Reserves the pages of ``chunk`` and adds it, preempting sequences after it in order if it must."""
        sequence = chunk.sequence
        assert sequence.table is not None
        while True:
            try:
                self.cache.reserve(sequence.table, chunk.start + chunk.count)
            except OutOfPages:
                victim = self.running[-1]
                self._preempt(victim, chunks)
                if victim is sequence:
                    return False
            except Exception as error:
                raise SequenceFault(sequence) from error
            else:
                chunks.append(chunk)
                return True

    def _come_in(self, sequence: Sequence, chunks: list[Chunk]) -> bool:
        """Gives a waiting sequence the pages that hold its beginning and a seat, if all its tokens so far fit."""
        head = self.waiting[0]
        passes = sequence is not head and head.wait.is_blocked
        if passes and not self._may_pass(sequence, head):
            return False
        if not self._has_seats(self.running, sequence) and not self._may_preempt_for(sequence):
            # One that needs several seats at once would never see them free if those of one seat went on passing it.
            if sequence.seats > 1:
                sequence.wait.is_blocked = True
            return False
        free = self.cache.available - self.promised()
        if self.running and free < sequence.wait.pages and not self._may_preempt_for(sequence):
            return False
        try:
            table = self.cache.open(sequence.reusable_tokens, sequence.group.namespace, sequence.group.tile)
        except Exception as error:
            raise SequenceFault(sequence) from error
        try:
            fits = self._make_room(sequence, table, chunks)
        except BaseException as error:
            self.cache.free(table)
            if isinstance(error, CacheError) or not isinstance(error, Exception):
                raise
            raise SequenceFault(sequence) from error
        if not fits:
            missing = self.cache.pages_needed(table, len(sequence.tokens) + 1)
            missing -= self.cache.available - self.promised()
            self.cache.free(table)
            sequence.wait.pages = free + missing
            sequence.wait.is_blocked = True
            return False
        if passes:
            head.wait.passed_tokens += len(sequence.tokens)
        self.waiting.remove(sequence)
        sequence.wait = Wait()
        sequence.table = table
        sequence.num_computed = table.num_tokens
        if sequence.group.waited_seconds is None:  # later it would find what it computed itself
            sequence.group.cached_tokens = table.num_cached
        self.add(sequence)
        return True

    def _make_room(self, sequence: Sequence, table: BlockTable, chunks: list[Chunk]) -> bool:
        """Whether ``sequence`` with ``table`` fits, after preempting what its priority allows if that is enough."""
        needed = self.cache.pages_needed(table, len(sequence.tokens) + 1)
        victims = [item for item in self.running if item.priority > sequence.priority]
        kept = self.running[: len(self.running) - len(victims)]
        holders = Counter(page for item in victims for page in item.pages)
        gained = sum(self.cache.allocator.references(page) == count for page, count in holders.items())
        if not self._has_seats(kept, sequence):
            return False
        if kept and self.cache.available + gained - self.promised(victims) < needed:
            return False
        while victims and not self._fits(sequence, needed):
            self._preempt(victims.pop(), chunks)
        return self._fits(sequence, needed)

    def _fits(self, sequence: Sequence, needed: int) -> bool:
        return self._has_seats(self.running, sequence) and (
            not self.running or needed <= self.cache.available - self.promised()
        )

    def _has_seats(self, beside: list[Sequence], sequence: Sequence) -> bool:
        """Whether it may run beside those; more choices than may ever run at once run alone."""
        if not beside:
            return True
        # The length first: it refuses most when there are many.
        return len(beside) < self.max_running and (
            sum(item.seats for item in beside) + sequence.seats <= self.max_running
        )

    def promised(self, without: list[Sequence] | None = None) -> int:
        """Pages that prompts which are in will still take."""
        return sum(
            self.cache.pages_needed(item.table, len(item.tokens) + 1)
            for item in self.running
            if item.num_remaining > 1 and item.table is not None and not (without and item in without)
        )

    def _may_preempt_for(self, sequence: Sequence) -> bool:
        return bool(self.running) and self.running[-1].priority > sequence.priority

    def _preempt(self, sequence: Sequence, chunks: list[Chunk]) -> None:
        self.running.remove(sequence)
        self._free(sequence)
        self.preemptions += 1
        chunks[:] = [chunk for chunk in chunks if chunk.sequence is not sequence]
        self.add(sequence)

    def _free(self, sequence: Sequence) -> None:
        if sequence.table is not None:
            self.cache.free(sequence.table)
            for item in self.waiting:
                item.wait.pages = 0  # now it may fit
        sequence.table = None
        sequence.num_computed = 0


def _order(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.order
