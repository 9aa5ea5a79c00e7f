"""Errors of the KV cache.

CacheError
├── CacheConfigError   a size or option that cannot work
├── DamagedRun         a file of pages that is not what was written
└── OutOfPages         the pool has no page left, even after eviction
"""

from __future__ import annotations


class CacheError(Exception):
    """Base of every error that ``foveate.kv_cache`` raises."""


class CacheConfigError(CacheError, ValueError):
    """A size or option that cannot work."""


class DamagedRun(CacheError):
    """A file of pages that is not what was written, or none of ours."""


class OutOfPages(CacheError):
    """The pool has no page left, even after unreferenced prefix pages were given up."""

    def __init__(self, wanted: int, available: int) -> None:
        super().__init__(f"{wanted} pages wanted, {available} available")
        self.wanted = wanted
        self.available = available
