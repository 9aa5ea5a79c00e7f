"""Sequences and steps of the scheduler without a model: real block tables, tokens that are drawn at once."""

from __future__ import annotations

import math
from types import SimpleNamespace

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.server.request import SamplingParams
from foveate.server.scheduler import Scheduler
from foveate.server.sequence import Sequence


def make_sequence(prompt, arrival, namespace=b"", tile=1, priority=0, n=1):
    request = SimpleNamespace(
        prompt_token_ids=list(prompt), arrival=arrival, priority=priority, sampling=SamplingParams(n=n)
    )
    group = SimpleNamespace(
        request=request,
        namespace=namespace,
        cached_tokens=0,
        tile=tile,
        keys_read=0.0,
        keys_dense=0.0,
        num_scored=0,
        waited_seconds=None,
    )
    return Sequence(group, 0, list(prompt), None, None, None)


class Unhurried:
    """A pace that bounds nothing: what fits into a step is decided by tokens alone."""

    room = math.inf

    def work(self, chunk):
        return chunk.count

    def tokens(self, work, chunk):
        return work


def make_scheduler(pages=64, room=32, running=8, prefix=False, pace=None):
    cache = KVCacheManager(PagePool(CacheGeometry(1, 1, 2, 16, pages)), prefix_reuse=prefix)
    return Scheduler(cache, max_batch_tokens=room, max_running=running, pace=pace or Unhurried())


def step(scheduler):
    """Runs one step as the engine would: every chunk is written, ended sequences draw a token."""
    chunks = scheduler.schedule()
    for chunk in chunks:
        sequence = chunk.sequence
        sequence.group.waited_seconds = 0.0
        assert chunk.start == sequence.num_computed
        scheduler.cache.slots(sequence.table, chunk.start, chunk.start + chunk.count)  # raises if there is no page
        ends = chunk.ends_sequence
        sequence.num_computed = chunk.start + chunk.count
        scheduler.cache.commit(sequence.table, sequence.tokens, sequence.num_computed)
        if ends:
            if not sequence.num_generated:
                scheduler.prompt_done(sequence)
            sequence.tokens.append(7)
    return chunks
