"""The cache as the scheduler sees it: sequences come, grow, fork and go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .allocator import PageAllocator
from .errors import CacheError
from .pool import PagePool
from .prefix import PrefixEntry, PrefixIndex
from .table import BlockTable


class KVCacheManager:
    """Block tables over one pool, with prefix reuse and copy-on-write.

    A sequence lives as ``open``, then per step ``reserve``, ``slots`` (the model writes there) and
    ``commit``, at last ``free``. All on the host, without waiting for the device. Not thread-safe:
    the step loop owns it.

    Two rules keep shared pages right. A page is written only while one table holds it and it is not
    full, and only full pages enter the prefix index. And a table holds the whole chain of the
    entries it uses and releases it from the end, so eviction, oldest release first, never takes a
    page away from in front of one that can still be found.

    Args:
        pool: The memory.
        prefix_reuse: Whether full pages are kept and found again.

    Attributes:
        prefix_queries_tokens: Tokens that ``open`` looked for.
        prefix_hit_tokens: Tokens that it found.
    """

    def __init__(self, pool: PagePool, *, prefix_reuse: bool = True) -> None:
        self.pool = pool
        self.page_size = pool.geometry.page_size
        self.prefix_reuse = prefix_reuse
        self.prefix = PrefixIndex(self.page_size)
        # Nothing in here may refer to the manager: a cycle would keep its pages until the next garbage collection.
        self.allocator = PageAllocator(pool.geometry.num_pages, on_evict=self.prefix.remove)
        self.prefix_queries_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def available(self) -> int:
        """Pages that can be taken now, unreferenced prefix pages included."""
        return self.allocator.available

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.allocator.num_pages * self.page_size

    @property
    def num_pages_in_use(self) -> int:
        """Pages held by block tables."""
        return self.allocator.num_referenced

    def open(self, token_ids: Sequence[int], namespace: bytes | None, multiple: int = 1) -> BlockTable:
        """Starts a sequence on the pages that hold its beginning already.

        At least the last token is left to compute, since its logits are wanted. The pages found are
        held from now on: ``free`` the table even if nothing is ever written.

        Args:
            token_ids: The sequence.
            namespace: Only pages of the same one are found; with ``None`` none are found, and none are left.
            multiple: Begin at a multiple of so many tokens.
        """
        table = BlockTable(namespace)
        if not self.prefix_reuse or namespace is None:
            return table
        chain = self.prefix.match(token_ids[:-1], namespace)
        while len(chain) * self.page_size % multiple:
            chain.pop()
        for entry in chain:
            self.allocator.retain(entry.page)
            table.pages.append(entry.page)
            table.tail = entry
        table.num_indexed = len(chain)
        table.num_tokens = table.num_cached = len(chain) * self.page_size
        self.prefix_queries_tokens += len(token_ids)
        self.prefix_hit_tokens += table.num_cached
        return table

    def find(self, token_ids: Sequence[int], namespace: bytes | None) -> int:
        """Tokens at the beginning of a sequence that ``open`` would find now. Changes nothing."""
        if not self.prefix_reuse or namespace is None:
            return 0
        return len(self.prefix.match(token_ids[:-1], namespace)) * self.page_size

    def pages_needed(self, table: BlockTable, num_tokens: int) -> int:
        """Pages that ``reserve`` would take, a copy of a shared page included."""
        new = max(0, self.pool.geometry.pages_for(num_tokens) - len(table.pages))
        return new + self._must_copy(table, num_tokens)

    def reserve(self, table: BlockTable, num_tokens: int) -> None:
        """Makes room for ``num_tokens`` tokens in total, and makes the next page to write its own.

        Raises:
            OutOfPages: too few pages are available; the table is unchanged.
        """
        copy = self._must_copy(table, num_tokens)
        pages = self.allocator.allocate(self.pages_needed(table, num_tokens))
        if copy:
            index = table.num_tokens // self.page_size
            shared, own = table.pages[index], pages[-1]
            try:
                self.pool.copy_page(shared, own)
            except BaseException:  # a device that fails must not keep the pages
                for page in pages:
                    self.allocator.release(page)
                raise
            pages.pop()
            self.allocator.release(shared)
            table.pages[index] = own
        table.pages.extend(pages)

    def slots(self, table: BlockTable, start: int, stop: int) -> list[int]:
        """Slots (page * page_size + offset) of the tokens at positions ``start`` to ``stop - 1``.

        Raises:
            CacheError: a position has no page, or is still to be written and its page is shared.
                ``reserve`` first, and again after a ``fork``.
        """
        size = self.page_size
        if start < 0 or stop > len(table.pages) * size:
            raise CacheError(
                f"positions {start} to {stop - 1} wanted, the table has room for {len(table.pages) * size} tokens"
            )
        if self._must_copy(table, stop):
            raise CacheError(f"position {table.num_tokens} is on a shared page; reserve it first")
        return [table.pages[position // size] * size + position % size for position in range(start, stop)]

    def commit(self, table: BlockTable, token_ids: Sequence[int], num_tokens: int | None = None) -> None:
        """Says that K and V of the first tokens of the sequence are written, and indexes full pages.

        If another sequence has indexed the same prefix before, the table moves to that page and
        gives its own one back: read ``table.pages`` anew for the next step.

        Args:
            table: The sequence.
            token_ids: Its tokens from the start, prompt and generated.
            num_tokens: How many of them are written; all if left out.

        Raises:
            CacheError: there are fewer tokens than that, the table has no room for them, or fewer
                are written than before.
        """
        written = len(token_ids) if num_tokens is None else num_tokens
        room = len(table.pages) * self.page_size
        if not table.num_tokens <= written <= min(room, len(token_ids)):
            raise CacheError(
                f"cannot commit {written} of {len(token_ids)} tokens: "
                f"{table.num_tokens} were committed before and there is room for {room}"
            )
        table.num_tokens = written
        if self.prefix_reuse and table.namespace is not None:
            self._index_full_pages(table, token_ids, table.namespace)

    def fork(self, table: BlockTable) -> BlockTable:
        """A second sequence with the same tokens so far; pages are shared until one of them writes.

        Pages reserved and not written stay with ``table``. Slots taken before are stale for both.
        """
        pages = table.pages[: self.pool.geometry.pages_for(table.num_tokens)]
        for page in pages:
            self.allocator.retain(page)
        return BlockTable(table.namespace, pages, table.num_tokens, table.num_cached, table.num_indexed, table.tail)

    def free(self, table: BlockTable) -> None:
        """Releases the pages, last first, and empties the table; an empty table stays as it is."""
        while table.pages:
            self.allocator.release(table.pages.pop())
        table.num_tokens = table.num_cached = table.num_indexed = 0
        table.tail = None

    def restore(
        self,
        parent: PrefixEntry | None,
        token_ids: Sequence[int],
        namespace: bytes,
        fill: Callable[[int], None],
    ) -> PrefixEntry | None:
        """Puts a full page into the prefix index without computing it. No table holds it: it may be evicted at once.

        Args:
            parent: Of the page before it, ``None`` for the first.
            token_ids: Its tokens.
            namespace: Of the chain.
            fill: Is given the page, and writes K, V and statistics.

        Returns:
            Its entry, or that of the same page computed meanwhile; ``None`` when it would not be found: ``parent``
            was evicted, or other tokens hold the same key.

        Raises:
            OutOfPages: all pages are held.
        """
        if parent is not None and not self.prefix.has(parent):
            return None
        (page,) = self.allocator.allocate(1)
        try:
            # Taking the page may have evicted the parent.
            if parent is not None and not self.prefix.has(parent):
                return None
            fill(page)
            entry = self._insert(parent, token_ids, namespace, page)
            if entry is not None and entry.page == page:
                self.allocator.mark_registered(page)
            return entry
        finally:
            self.allocator.release(page)

    def discard(self, keys: Iterable[bytes]) -> None:
        """Takes pages out of the prefix index by their keys; tables that hold them keep them."""
        for key in keys:
            page = self.prefix.page_of(key)
            if page is not None:
                self.prefix.remove(page)
                self.allocator.unregister(page)

    def forget(self, table: BlockTable) -> None:
        """Takes the table's pages out of the prefix index: nobody shall find what they hold.

        Tables that share them keep them. What was chained behind them is not found either.
        """
        for page in table.pages[: table.num_indexed]:
            self.prefix.discard(page)
            self.allocator.unregister(page)

    def reset_prefix(self) -> None:
        """Forgets every prefix page that no sequence holds."""
        self.allocator.evict_cached()

    def _insert(
        self, parent: PrefixEntry | None, token_ids: Sequence[int], namespace: bytes, page: int
    ) -> PrefixEntry | None:
        """``PrefixIndex.insert``, where an orphan gives way, whom nobody can reach."""
        entry = self.prefix.insert(parent, token_ids, namespace, page)
        orphan = None if entry is not None else self.prefix.orphan(parent, token_ids, namespace)
        if orphan is None:
            return entry
        self.prefix.remove(orphan.page)
        self.allocator.unregister(orphan.page)
        return self.prefix.insert(parent, token_ids, namespace, page)

    def _must_copy(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether writing up to ``num_tokens`` would begin on a page that another table holds."""
        index = table.num_tokens // self.page_size
        if num_tokens <= table.num_tokens or index >= len(table.pages):
            return False
        return self.allocator.references(table.pages[index]) > 1

    def _index_full_pages(self, table: BlockTable, token_ids: Sequence[int], namespace: bytes) -> None:
        size = self.page_size
        for index in range(table.num_indexed, table.num_tokens // size):
            if table.tail is not None and not self.prefix.has(table.tail):
                return  # nobody would find what comes after a page that was taken out
            page = table.pages[index]
            entry = self._insert(table.tail, token_ids[index * size : (index + 1) * size], namespace, page)
            if entry is None:
                return  # hash collision: the rest of this sequence stays private
            if entry.page == page:
                self.allocator.mark_registered(page)
            else:
                self.allocator.retain(entry.page)
                self.allocator.release(page)
                table.pages[index] = entry.page
            table.tail = entry
            table.num_indexed = index + 1
