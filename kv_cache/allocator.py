"""Who may use a page: reference counts, the free list, and eviction of unreferenced prefix pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .errors import CacheConfigError, CacheError, OutOfPages


def _ignore(page: int) -> None:
    """Default of ``on_evict``: nobody keeps a note of the page."""


class PageAllocator:
    """Page ids 0 to P - 1, each in exactly one of three states.

    free        nobody knows its contents
    referenced  held by one or more block tables
    cached      held by none, but registered: its contents can be found again. Given up under
                pressure, the page released longest ago first

    Pure bookkeeping, no tensor. Not thread-safe: the step loop owns it.

    Args:
        num_pages: P.
        on_evict: Called with each cached page that is given up.

    Raises:
        CacheConfigError: ``num_pages`` is below 1.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], object] = _ignore) -> None:
        if num_pages < 1:
            raise CacheConfigError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._references = [0] * num_pages
        # Last in, first out: a page used a moment ago is mapped already and may still be in cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._registered: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        return self.num_pages - self.available

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can give: free and cached."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        """Block tables that hold ``page``."""
        return self._references[self._checked(page)]

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages with one reference each: free ones first, then cached ones.

        Raises:
            OutOfPages: fewer are available; nothing is taken or evicted.
        """
        if count > self.available:
            raise OutOfPages(count, self.available)
        while len(self._free) < count:
            self._evict_oldest()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """Adds a reference to a referenced or cached page.

        Raises:
            CacheError: the page is free.
        """
        if self._references[self._checked(page)] == 0:
            if page not in self._cached:
                raise CacheError(f"page {page} is free and cannot be retained")
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Drops a reference. The last one makes the page cached if registered, else free.

        Raises:
            CacheError: the page has no reference.
        """
        self._need_reference(page)
        self._references[page] -= 1
        if self._references[page] == 0:
            if page in self._registered:
                self._cached[page] = None
            else:
                self._free.append(page)

    def mark_registered(self, page: int) -> None:
        """Says that the page can be found again, so that its last release keeps it cached.

        Raises:
            CacheError: the page has no reference.
        """
        self._need_reference(page)
        self._registered.add(page)

    def unregister(self, page: int) -> None:
        """Says that the page cannot be found any more; a cached page becomes free."""
        self._registered.discard(self._checked(page))
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)

    def evict_cached(self) -> None:
        """Gives up every cached page."""
        while self._cached:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        page = next(iter(self._cached))
        self.unregister(page)
        self._on_evict(page)

    def _need_reference(self, page: int) -> None:
        if self._references[self._checked(page)] == 0:
            raise CacheError(f"page {page} has no reference")

    def _checked(self, page: int) -> int:
        if not 0 <= page < self.num_pages:
            raise CacheError(f"page {page} does not exist: the pool has {self.num_pages}")
        return page
