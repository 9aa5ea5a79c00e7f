"""One page of the pool as a row of bytes, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from .pool import PagePool
from .stats import PageStat

# Element types, the unsigned integer of their size, and the exponent of what is not finite.
_EXPONENTS = {
    torch.float32: ("u4", 0x7F800000),
    torch.bfloat16: ("u2", 0x7F80),
    torch.float16: ("u2", 0x7C00),
}


class PageBytes:
    """Where K, V, their scales and some statistics of a page lie in a row of bytes.

    Args:
        pool: The memory; its statistics must hold ``stats`` by the time that a page is copied.
        stats: Statistics that belong to the page, those of the scheme that it was computed under.

    Attributes:
        nbytes: Bytes of a page.
    """

    def __init__(self, pool: PagePool, stats: Iterable[PageStat] = ()) -> None:
        self._pool = pool
        self._stats = sorted(set(stats), key=lambda stat: stat.name)
        geometry = pool.geometry
        kept = sum(math.prod(stat.shape(geometry)) // geometry.num_pages for stat in self._stats)
        self.nbytes = geometry.bytes_per_page + kept * torch.float32.itemsize

    def copy_out(self, page: int, target: torch.Tensor) -> None:
        """Copies a page to ``target``, uint8, at least ``nbytes``; does not wait for a GPU if that is pinned."""
        for rows, place in self._pairs(page, target):
            place.copy_(rows, non_blocking=True)
        target[self.nbytes :].zero_()

    def copy_in(self, page: int, source: torch.Tensor) -> None:
        """Copies ``source``, as ``copy_out`` filled it, to a page; does not wait for a GPU if that is pinned."""
        for rows, place in self._pairs(page, source):
            rows.copy_(place, non_blocking=True)

    def is_finite(self, data: torch.Tensor) -> bool:
        """Whether a page in bytes holds neither NaN nor infinity where it holds floats."""
        bits = data.numpy()  # torch would wake a pool of threads for it
        first = 0
        for rows in self._parts():
            count = rows[:, 0].numel() * rows.itemsize
            if rows.dtype in _EXPONENTS:
                kind, exponent = _EXPONENTS[rows.dtype]
                if bool(((bits[first : first + count].view(kind) & exponent) == exponent).any()):
                    return False
            first += count
        return True

    def _parts(self) -> Iterator[torch.Tensor]:
        """Tensors ``[L, P, ...]`` in the order in which their pages follow each other."""
        pool = self._pool
        yield from (rows for rows in (pool.keys, pool.values, pool.key_scales, pool.value_scales) if rows is not None)
        yield from (pool.stats[stat] for stat in self._stats)

    def _pairs(self, page: int, data: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        first = 0
        for rows in self._parts():
            shape = rows[:, page].shape
            size = math.prod(shape) * rows.itemsize
            yield rows[:, page], data[first : first + size].view(rows.dtype).view(shape)
            first += size
