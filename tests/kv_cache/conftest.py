"""Small pools shared by the tests of the KV cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool

PAGE = 16


@pytest.fixture
def make_manager() -> Callable[..., KVCacheManager]:
    """Makes a manager over ``num_pages`` pages of 16 tokens."""

    def make(num_pages: int = 8, prefix_reuse: bool = True) -> KVCacheManager:
        geometry = CacheGeometry(num_layers=1, num_kv_heads=1, head_dim=2, page_size=PAGE, num_pages=num_pages)
        return KVCacheManager(PagePool(geometry), prefix_reuse=prefix_reuse)

    return make
