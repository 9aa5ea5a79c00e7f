"""Our pages in the clothes of a ``transformers`` cache, for ``model.generate()``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache

from foveate.kv_cache.errors import CacheConfigError
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.table import BlockTable
from foveate.sparse_attn.protocol import QueryRotator, Scheme, StepState

from .errors import AttachError, UnsupportedCall
from .step import build_step


class PagedGenerateCache(Cache):
    """One block table per row of a batch.

    K and V are written by the attention function, so ``update`` hands them back as they came.
    Lengths are those of the padded batch, as ``generate()`` counts; the tables hold real tokens
    only. Pages are freed by ``reset`` and when the object is garbage collected. ``copy.deepcopy`` gives
    a second cache that shares them until one of the two writes.

    Args:
        manager: Made with ``prefix_reuse=False``: nothing is looked up by its tokens here.
        batch_size: Rows.
        peers: The caches of one model; this one and its copies are added.

    Raises:
        CacheConfigError: the manager keeps prefixes.
    """

    def __init__(
        self, manager: KVCacheManager, batch_size: int, peers: weakref.WeakSet[PagedGenerateCache] | None = None
    ) -> None:
        if manager.prefix_reuse:
            raise CacheConfigError("model.generate() needs KVCacheManager(pool, prefix_reuse=False)")
        super().__init__(layers=[])
        self.manager = manager
        self.tables = [manager.open([], b"") for _ in range(batch_size)]
        self._length = 0
        self._counts: list[int] | None = None
        self._detached = False
        self._peers: weakref.WeakSet[PagedGenerateCache] = weakref.WeakSet() if peers is None else peers
        self._peers.add(self)
        # No bound method and no self: either would keep the cache alive for ever.
        finalizer = weakref.finalize(self, _free, manager, self.tables)
        finalizer.atexit = False

    def begin(self, counts: Sequence[int], scheme: Scheme | None, rotary: QueryRotator | None = None) -> StepState:
        """Starts a forward pass that adds ``counts[i]`` real tokens to row ``i``; at least one is not 0.

        Raises:
            OutOfPages: the pool is too full; the cache is as before.
            AttachError: the model it belongs to was detached.
        """
        if self._detached:
            raise AttachError("this cache belongs to a model that was detached; its pages are gone")
        chunks = [(table, count) for table, count in zip(self.tables, counts, strict=True) if count]
        step = build_step(self.manager, chunks, scheme, rotary)
        self._counts = list(counts)
        return step

    def finish(self, columns: int) -> None:
        """Ends a forward pass that went well: its ``columns`` columns, padding included, now count."""
        for table, count in zip(self.tables, self._counts or (), strict=True):
            total = table.num_tokens + count
            # Without prefix reuse the manager needs only to know how many there are.
            self.manager.commit(table, range(total))
        self._length += columns
        self._counts = None

    def abandon(self) -> None:
        """Ends a forward pass that failed: the cache is as before it."""
        self._counts = None

    def detach(self) -> None:
        """Frees the pages for good."""
        self.reset()
        self._detached = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands K and V back; the attention function writes them.

        Raises:
            AttachError: no pass was started, so the model is not attached and would lose them.
        """
        if self._counts is None:
            raise AttachError("a paged cache only works with the model that foveate.attach gave it to")
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._length + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``i`` goes on from row ``beam_idx[i]``. Pages are shared until one of them writes."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.tables)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        chosen = [self.manager.fork(self.tables[row]) for row in indices.tolist()]
        _free(self.manager, self.tables)
        self.tables[:] = chosen

    def reset(self) -> None:
        """Frees every page; the cache is empty and may be used again."""
        _free(self.manager, self.tables)
        self._length = 0
        self._counts = None

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Refused: pages are never written twice.

        Raises:
            UnsupportedCall: always.
        """
        raise UnsupportedCall("a paged cache cannot be cropped, so assisted generation does not work with it")

    def __deepcopy__(self, memo: dict[int, Any]) -> PagedGenerateCache:
        copied = PagedGenerateCache(self.manager, 0, self._peers)
        copied.tables += [self.manager.fork(table) for table in self.tables]
        copied._length, copied._detached = self._length, self._detached
        memo[id(self)] = copied
        return copied

    @property
    def batch_size(self) -> int:
        return len(self.tables)

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    def __len__(self) -> int:
        return int(self.manager.pool.num_layers)

    def __repr__(self) -> str:
        pages = sum(len(table.pages) for table in self.tables)
        return f"{type(self).__name__}(batch_size={self.batch_size}, length={self._length}, pages={pages})"


def _free(manager: KVCacheManager, tables: list[BlockTable]) -> None:
    for table in tables:
        manager.free(table)
