"""Which pages hold the K/V of which prompt prefix.

A page's key is ``sha256(parent page's key, token ids of the page)``; the first page's parent is the
hash of a namespace, which holds everything else that K and V depend on (attention policy, rotary
policy, the caller's salt). A hit is not taken on the hash's word: the page's own tokens, its
namespace and the identity of its parent are compared too, so a collision cannot match.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .errors import CacheError


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(frozen=True, slots=True, eq=False)
class PrefixEntry:
    """One full page in the index.

    Attributes:
        key: Its chained hash.
        page: Where its K and V are.
        token_ids: Its tokens, packed as int64.
        parent: The page before it, ``None`` for the first.
        namespace: Shared by the whole chain.
    """

    key: bytes
    page: int
    token_ids: bytes
    parent: PrefixEntry | None
    namespace: bytes


class PrefixIndex:
    """Full pages by prefix; at most one entry per page of the pool.

    An entry is only reached through its parent. Once a parent is removed its children never match
    again, so the owner should give up a chain from its end: release pages last to first.

    Args:
        page_size: Tokens per page.
        digest: The hash; another one only serves to test collisions.
    """

    def __init__(self, page_size: int, digest: Callable[[bytes], bytes] = sha256) -> None:
        self._page_size = page_size
        self._digest = digest
        self._by_key: dict[bytes, PrefixEntry] = {}
        self._by_page: dict[int, PrefixEntry] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def match(self, token_ids: Sequence[int], namespace: bytes) -> list[PrefixEntry]:
        """The longest chain of entries for the full pages of ``token_ids``. Changes nothing."""
        chain: list[PrefixEntry] = []
        parent: PrefixEntry | None = None
        for start in range(0, len(token_ids) - self._page_size + 1, self._page_size):
            key, packed = self._key(parent, token_ids[start : start + self._page_size], namespace)
            found = self._by_key.get(key)
            if found is None or not _same(found, parent, packed, namespace):
                break
            chain.append(found)
            parent = found
        return chain

    def insert(
        self, parent: PrefixEntry | None, token_ids: Sequence[int], namespace: bytes, page: int
    ) -> PrefixEntry | None:
        """Adds a full page behind ``parent``.

        Returns:
            The new entry; the entry that is there already when the same prefix was added before
            (the first page stays); or ``None`` when other tokens, or an ``orphan``, hold the same key.

        Raises:
            CacheError: ``token_ids`` are not one page, or the page has an entry under another key.
        """
        if len(token_ids) != self._page_size:
            raise CacheError(f"a page holds {self._page_size} tokens, got {len(token_ids)}")
        key, packed = self._key(parent, token_ids, namespace)
        found = self._by_key.get(key)
        if found is not None:
            return found if _same(found, parent, packed, namespace) else None
        if page in self._by_page:
            raise CacheError(f"page {page} is in the prefix index already")
        entry = PrefixEntry(key, page, packed, parent, namespace)
        self._by_key[key] = entry
        self._by_page[page] = entry
        return entry

    def orphan(self, parent: PrefixEntry | None, token_ids: Sequence[int], namespace: bytes) -> PrefixEntry | None:
        """The entry that holds a page's key although the page before it was removed, so that it is never matched."""
        found = self._by_key.get(self._key(parent, token_ids, namespace)[0])
        return found if found is not None and found.parent is not None and not self.has(found.parent) else None

    def remove(self, page: int) -> None:
        """Forgets a page, for example on its eviction.

        Raises:
            KeyError: it has no entry.
        """
        del self._by_key[self._by_page.pop(page).key]

    def discard(self, page: int) -> None:
        """Forgets a page if it has an entry."""
        if page in self._by_page:
            self.remove(page)

    def has(self, entry: PrefixEntry) -> bool:
        """Whether ``entry`` still stands: its page holds what it held, since full pages are not written."""
        return self._by_page.get(entry.page) is entry

    def keys(self) -> list[bytes]:
        """Of all pages."""
        return list(self._by_key)

    def page_of(self, key: bytes) -> int | None:
        """The page under a key."""
        entry = self._by_key.get(key)
        return None if entry is None else entry.page

    def _key(self, parent: PrefixEntry | None, token_ids: Sequence[int], namespace: bytes) -> tuple[bytes, bytes]:
        packed = array("q", token_ids).tobytes()
        root = self._digest(namespace) if parent is None else parent.key
        return self._digest(root + packed), packed


def page_keys(
    token_ids: Sequence[int], namespace: bytes, page_size: int, digest: Callable[[bytes], bytes] = sha256
) -> list[bytes]:
    """The keys of the full pages of ``token_ids``, as ``PrefixIndex`` makes them."""
    keys: list[bytes] = []
    key = digest(namespace)
    for start in range(0, len(token_ids) - page_size + 1, page_size):
        key = digest(key + array("q", token_ids[start : start + page_size]).tobytes())
        keys.append(key)
    return keys


def chain_to(entry: PrefixEntry | None) -> list[PrefixEntry]:
    """The entries from the first page to ``entry``."""
    chain: list[PrefixEntry] = []
    while entry is not None:
        chain.append(entry)
        entry = entry.parent
    return chain[::-1]


def _same(entry: PrefixEntry, parent: PrefixEntry | None, packed: bytes, namespace: bytes) -> bool:
    return entry.parent is parent and entry.token_ids == packed and entry.namespace == namespace
