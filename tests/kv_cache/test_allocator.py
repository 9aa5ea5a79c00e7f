from __future__ import annotations

import pytest

from foveate.kv_cache.allocator import PageAllocator
from foveate.kv_cache.errors import CacheConfigError, CacheError, OutOfPages


def counts(allocator: PageAllocator) -> tuple[int, int, int]:
    return allocator.num_free, allocator.num_cached, allocator.num_referenced


def with_cached(num_pages: int, cached: int, evicted: list[int]) -> tuple[PageAllocator, list[int]]:
    """An allocator with ``cached`` cached pages, in the order of their release."""
    allocator = PageAllocator(num_pages, on_evict=evicted.append)
    pages = allocator.allocate(cached)
    for page in pages:
        allocator.mark_registered(page)
        allocator.release(page)
    return allocator, pages


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(CacheConfigError, match="num_pages must be at least 1, got 0"):
        PageAllocator(0)


def test_all_pages_are_given_once() -> None:
    allocator = PageAllocator(5)
    assert sorted(allocator.allocate(2) + allocator.allocate(3)) == [0, 1, 2, 3, 4]
    assert counts(allocator) == (0, 0, 5)
    assert allocator.available == 0


def test_allocation_is_all_or_nothing() -> None:
    evicted: list[int] = []
    allocator, _ = with_cached(4, 2, evicted)
    with pytest.raises(OutOfPages) as error:
        allocator.allocate(5)
    assert (error.value.wanted, error.value.available) == (5, 4)
    assert counts(allocator) == (2, 2, 0)
    assert evicted == []


def test_no_page_can_be_asked_for() -> None:
    assert PageAllocator(1).allocate(0) == []


def test_the_last_release_frees() -> None:
    allocator = PageAllocator(3)
    (page,) = allocator.allocate(1)
    allocator.retain(page)
    assert allocator.references(page) == 2
    allocator.release(page)
    assert counts(allocator) == (2, 0, 1)
    allocator.release(page)
    assert counts(allocator) == (3, 0, 0)


def test_the_last_release_of_a_registered_page_keeps_it_cached() -> None:
    allocator, _ = with_cached(3, 1, [])
    assert counts(allocator) == (2, 1, 0)
    assert allocator.available == 3


def test_free_pages_go_before_cached_ones() -> None:
    evicted: list[int] = []
    allocator, cached = with_cached(4, 2, evicted)
    assert not set(allocator.allocate(2)) & set(cached)
    assert evicted == []


def test_cached_pages_go_in_the_order_of_their_release() -> None:
    evicted: list[int] = []
    allocator, cached = with_cached(3, 3, evicted)
    allocator.allocate(2)
    assert evicted == cached[:2]
    allocator.allocate(1)
    assert evicted == cached


def test_a_revived_page_is_young_again() -> None:
    evicted: list[int] = []
    allocator, cached = with_cached(3, 3, evicted)
    allocator.retain(cached[0])
    assert counts(allocator) == (0, 2, 1)
    allocator.release(cached[0])
    allocator.allocate(3)
    assert evicted == [cached[1], cached[2], cached[0]]


def test_an_evicted_page_is_no_longer_registered() -> None:
    allocator, _ = with_cached(1, 1, [])
    (page,) = allocator.allocate(1)
    allocator.release(page)
    assert counts(allocator) == (1, 0, 0)


def test_unregistering_a_cached_page_frees_it() -> None:
    allocator, cached = with_cached(2, 1, [])
    allocator.unregister(cached[0])
    assert counts(allocator) == (2, 0, 0)


def test_unregistering_a_referenced_page_frees_it_on_release() -> None:
    allocator = PageAllocator(1)
    (page,) = allocator.allocate(1)
    allocator.mark_registered(page)
    allocator.unregister(page)
    assert counts(allocator) == (0, 0, 1)
    allocator.release(page)
    assert counts(allocator) == (1, 0, 0)


def test_evict_cached_gives_up_cached_pages_only() -> None:
    evicted: list[int] = []
    allocator, cached = with_cached(4, 3, evicted)
    allocator.retain(cached[1])
    allocator.evict_cached()
    assert evicted == [cached[0], cached[2]]
    assert counts(allocator) == (3, 0, 1)


def test_releasing_twice_is_an_error() -> None:
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    allocator.release(page)
    with pytest.raises(CacheError, match=f"page {page} has no reference"):
        allocator.release(page)
    assert counts(allocator) == (2, 0, 0)


def test_releasing_a_cached_page_is_an_error() -> None:
    allocator, cached = with_cached(2, 1, [])
    with pytest.raises(CacheError, match="has no reference"):
        allocator.release(cached[0])


def test_retaining_a_free_page_is_an_error() -> None:
    with pytest.raises(CacheError, match="page 0 is free and cannot be retained"):
        PageAllocator(2).retain(0)


def test_registering_an_unreferenced_page_is_an_error() -> None:
    with pytest.raises(CacheError, match="page 1 has no reference"):
        PageAllocator(2).mark_registered(1)


@pytest.mark.parametrize("page", [-1, 2])
@pytest.mark.parametrize("call", ["retain", "release", "references", "mark_registered", "unregister"])
def test_a_page_outside_the_pool_is_an_error(call: str, page: int) -> None:
    with pytest.raises(CacheError, match=f"page {page} does not exist: the pool has 2"):
        getattr(PageAllocator(2), call)(page)
