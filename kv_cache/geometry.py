"""The shape of one paged KV cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import CacheConfigError

CPU = torch.device("cpu")
MIN_PAGE_SIZE, MAX_PAGE_SIZE = 16, 128


def default_page_size(device: torch.device) -> int:
    """Page size in tokens for a device.

    A CPU gathers whole pages with one ``index_select``, which is fastest with long rows; a GPU
    tile reads 16 to 64 keys at a time and wastes less of a small last page.
    """
    return 64 if device.type == "cpu" else 32


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """Sizes that the pool, the statistics and the kernels agree on.

    Args:
        num_layers: Attention layers that keep keys.
        num_kv_heads: G, KV heads per layer.
        head_dim: D, channels per head.
        page_size: Tokens per page, a power of two from 16 to 128.
        num_pages: P, pages in the pool.
        dtype: Element type of K and V; int8 stands with a float32 scale per token and KV head, on a CPU only.
        device: Where the pool lives.

    Raises:
        CacheConfigError: a size is out of range, or no kernel of the device reads such pages.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "num_pages"):
            if getattr(self, name) < 1:
                raise CacheConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        size = self.page_size
        if not MIN_PAGE_SIZE <= size <= MAX_PAGE_SIZE or size & (size - 1):
            raise CacheConfigError(
                f"page_size must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}, got {size}"
            )
        if self.quantized and self.device.type != "cpu":
            raise CacheConfigError(f"K and V in int8 are read by the kernels for CPUs only, not on {self.device}")

    @property
    def bytes_per_page(self) -> int:
        """Bytes of K and V of one page over all layers, scales counted, statistics not."""
        return self.page_size * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, scales counted."""
        row = self.head_dim * self.dtype.itemsize + (torch.float32.itemsize if self.quantized else 0)
        return 2 * self.num_layers * self.num_kv_heads * row

    @property
    def quantized(self) -> bool:
        """Whether K and V are int8 with scales."""
        return self.dtype == torch.int8

    def pages_for(self, num_tokens: int) -> int:
        """Pages needed for ``num_tokens`` tokens of one sequence."""
        return math.ceil(num_tokens / self.page_size)
