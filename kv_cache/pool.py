"""The page pool: the memory of keys, values and page statistics."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from .geometry import CacheGeometry
from .stats import PageStat
from .view import LayerPages


class PagePool:
    """K, V and page statistics of every layer; it knows nothing of who uses which page.

    A page's memory is only mapped when first written on a CPU, so a large pool costs nothing until
    it is used. A slot that was never written holds anything, NaN included: readers mask it.

    Args:
        geometry: Sizes, element type and device.
        stats: Statistics to keep; see ``declare``.

    Attributes:
        keys: ``[L, P, G, page_size, D]``, L layers.
        values: ``[L, P, G, page_size, D]``.
        key_scales: ``[L, P, G, page_size]`` float32 where K and V are int8, else ``None``; see ``stored.py``.
        value_scales: Likewise.
        stats: Declared statistic -> ``[L, P, G, D]`` float32, or ``[L, P, G, R, D]`` with R runs in a page.
    """

    def __init__(self, geometry: CacheGeometry, stats: Iterable[PageStat] = ()) -> None:
        self.geometry = geometry
        shape = (
            geometry.num_layers,
            geometry.num_pages,
            geometry.num_kv_heads,
            geometry.page_size,
            geometry.head_dim,
        )
        self.keys = torch.empty(shape, dtype=geometry.dtype, device=geometry.device)
        self.values = torch.empty(shape, dtype=geometry.dtype, device=geometry.device)
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if geometry.quantized:
            self.key_scales = torch.empty(shape[:-1], dtype=torch.float32, device=geometry.device)
            self.value_scales = torch.empty(shape[:-1], dtype=torch.float32, device=geometry.device)
        self.stats: dict[PageStat, torch.Tensor] = {}
        self._layers = [
            LayerPages(
                self.keys[i],
                self.values[i],
                {},
                None if self.key_scales is None else self.key_scales[i],
                None if self.value_scales is None else self.value_scales[i],
            )
            for i in range(geometry.num_layers)
        ]
        self.declare(stats)

    def declare(self, stats: Iterable[PageStat]) -> None:
        """Adds statistics, each starting from its fold's empty value; known ones are left alone.

        A page written before is not covered: its statistics stay empty until its first slot is
        written again.

        Raises:
            ValueError: a page does not hold whole runs of a statistic.
        """
        geometry = self.geometry
        for stat in stats:
            if stat in self.stats:
                continue
            rows = _filled(stat.shape(geometry), stat.fold.empty, geometry.device)
            self.stats[stat] = rows
            self._layers = [
                replace(pages, stats={**pages.stats, stat: rows[i]}) for i, pages in enumerate(self._layers)
            ]

    @property
    def num_layers(self) -> int:
        return self.geometry.num_layers

    def layer(self, index: int) -> LayerPages:
        """The pages of one layer; made once, so a call allocates nothing."""
        return self._layers[index]

    def copy_page(self, source: int, target: int) -> None:
        """Copies K, V, scales and statistics of a page over all layers. Does not wait for the device."""
        for tensor in self._tensors():
            tensor[:, target].copy_(tensor[:, source])

    @property
    def nbytes(self) -> int:
        """Bytes of K, V, scales and statistics, mapped or not."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[torch.Tensor]:
        """Everything that belongs to a page; its second axis is the page."""
        scales = (tensor for tensor in (self.key_scales, self.value_scales) if tensor is not None)
        return itertools.chain((self.keys, self.values), scales, self.stats.values())


def _filled(shape: tuple[int, ...], value: float, device: torch.device) -> torch.Tensor:
    if value == 0 and device.type == "cpu":  # zeros of the system, mapped when first written; torch would write them
        zeros = mmap.mmap(-1, math.prod(shape) * torch.float32.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(zeros, dtype=torch.float32).view(shape)
    return torch.full(shape, value, dtype=torch.float32, device=device)
