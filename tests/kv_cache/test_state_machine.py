"""Random lives of sequences over a tiny pool, held against a shadow that knows every token.

K of a token is written as (token, fingerprint of everything up to it), so a page that is reused
under another prefix or namespace, or read after it was given to somebody else, is seen.
"""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from foveate.kv_cache.allocator import PageAllocator
from foveate.kv_cache.errors import CacheError, OutOfPages
from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.prefix import PrefixIndex, sha256
from foveate.kv_cache.stats import KEY_MAX, KEY_SUM
from foveate.kv_cache.table import BlockTable

PAGE = 16
NUM_PAGES = 9
STATS = (KEY_SUM, KEY_MAX)

# Few tokens, in runs that often end at a page, so that many sequences begin or become alike.
RUNS = st.builds(
    lambda token, length: [token] * length, st.sampled_from([1, 2]), st.sampled_from([1, 5, 15, 16, 17, 32])
)
PROMPTS = st.lists(RUNS, min_size=1, max_size=3).map(lambda runs: [token for run in runs for token in run])


@dataclass(eq=False)
class Sequence:
    table: BlockTable
    tokens: list[int]  # those that are written, as far as the shadow knows

    @property
    def namespace(self) -> bytes:
        return self.table.namespace


def key_row(namespace: bytes, tokens: list[int], position: int) -> list[float]:
    """What K of a token should be; whole numbers small enough for an exact float32 sum of a page."""
    prefix = array("q", tokens[: position + 1]).tobytes()
    return [float(tokens[position]), float(zlib.crc32(namespace + b"/" + prefix) & 0xFFFF)]


class CacheMachine(RuleBasedStateMachine):
    """Sequences are opened, grown, forked, freed and pushed out; invariants are checked after each step."""

    sequences = Bundle("sequences")
    digest: Callable[[bytes], bytes] = staticmethod(sha256)
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        geometry = CacheGeometry(1, 1, head_dim=2, page_size=PAGE, num_pages=NUM_PAGES, dtype=self.dtype)
        self.manager = KVCacheManager(PagePool(geometry, STATS))
        self.manager.prefix = PrefixIndex(PAGE, digest=self.digest)
        self.manager.allocator = PageAllocator(NUM_PAGES, on_evict=self.manager.prefix.remove)
        self.live: list[Sequence] = []
        self.histories: set[tuple[bytes, tuple[int, ...]]] = set()

    def write(self, sequence: Sequence, new: list[int]) -> None:
        """One step: reserve, write K and its statistics where the slots say, commit."""
        manager, table, start = self.manager, sequence.table, len(sequence.tokens)
        tokens = sequence.tokens + new
        before = (list(table.pages), table.num_tokens, manager.available)
        needed = manager.pages_needed(table, len(tokens))
        if needed > manager.available:
            with pytest.raises(OutOfPages) as error:
                manager.reserve(table, len(tokens))
            assert (error.value.wanted, error.value.available) == (needed, before[2])
            assert (table.pages, table.num_tokens, manager.available) == before
            return
        manager.reserve(table, len(tokens))
        assert manager.available == before[2] - needed
        writable = table.pages[start // PAGE : (len(tokens) - 1) // PAGE + 1]
        assert [manager.allocator.references(page) for page in writable] == [1] * len(writable)
        for position, slot in enumerate(manager.slots(table, start, len(tokens)), start):
            self.write_slot(slot, key_row(sequence.namespace, tokens, position))
        manager.commit(table, tokens)
        sequence.tokens = tokens
        self.histories.add((sequence.namespace, tuple(tokens)))

    def store(self, page: int, offset: int, token: float, fingerprint: float) -> None:
        self.manager.pool.keys[0, page, 0, offset] = torch.tensor([token, fingerprint])

    def read(self, slots: list[int]) -> list[list[float]]:
        return self.manager.pool.layer(0).keys[:, 0].reshape(-1, 2)[slots].tolist()

    def spoil(self, page: int) -> None:
        self.manager.pool.keys[:, page] = float("nan")

    def write_slot(self, slot: int, values: list[float]) -> None:
        layer = self.manager.pool.layer(0)
        page, offset = divmod(slot, PAGE)
        self.store(page, offset, *values)
        row = torch.tensor(values)
        if offset == 0:
            for stat, rows in layer.stats.items():
                rows[page] = stat.fold.empty
        layer.stats[KEY_SUM][page, 0] += row
        layer.stats[KEY_MAX][page, 0] = torch.maximum(layer.stats[KEY_MAX][page, 0], row)

    @rule(target=sequences, prompt=PROMPTS, namespace=st.sampled_from([b"a", b"b"]), chunk=st.integers(1, 64))
    def open(self, prompt: list[int], namespace: bytes, chunk: int) -> Sequence:
        table = self.manager.open(prompt, namespace)
        assert table.num_cached < len(prompt)
        assert table.num_cached % PAGE == 0
        sequence = Sequence(table, prompt[: table.num_cached])
        self.live.append(sequence)
        self.write(sequence, prompt[table.num_cached :][:chunk])
        return sequence

    @rule(sequence=sequences, new=RUNS)
    def grow(self, sequence: Sequence, new: list[int]) -> None:
        self.write(sequence, new)

    @rule(sequence=sequences, ahead=st.integers(0, 3 * PAGE))
    def reserve_ahead(self, sequence: Sequence, ahead: int) -> None:
        """Takes pages that are not written yet."""
        wanted = len(sequence.tokens) + ahead
        if self.manager.pages_needed(sequence.table, wanted) <= self.manager.available:
            self.manager.reserve(sequence.table, wanted)
            assert len(sequence.table.pages) * PAGE >= wanted

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: Sequence) -> Sequence:
        before = self.manager.available
        child = Sequence(self.manager.fork(parent.table), list(parent.tokens))
        assert self.manager.available == before
        self.live.append(child)
        return child

    @rule(sequence=consumes(sequences))
    def free(self, sequence: Sequence) -> None:
        self.manager.free(sequence.table)
        self.manager.free(sequence.table)
        self.live.remove(sequence)

    @precondition(lambda self: self.manager.available > 0)
    @rule(data=st.data())
    def press(self, data: st.DataObject) -> None:
        """Takes pages from everybody who does not hold them, spoils them and gives them back."""
        allocator = self.manager.allocator
        pages = allocator.allocate(data.draw(st.integers(1, allocator.available)))
        for page in pages:
            self.spoil(page)
            for rows in self.manager.pool.stats.values():
                rows[:, page] = float("nan")
            allocator.release(page)

    @rule()
    def reset_prefix(self) -> None:
        self.manager.reset_prefix()
        assert self.manager.allocator.num_cached == 0

    @rule(page=st.integers(0, NUM_PAGES - 1))
    def releasing_a_page_nobody_holds_is_refused(self, page: int) -> None:
        if self.manager.allocator.references(page) == 0:
            with pytest.raises(CacheError):
                self.manager.allocator.release(page)

    @invariant()
    def every_page_is_in_one_state(self) -> None:
        allocator = self.manager.allocator
        assert allocator.num_free + allocator.num_cached + allocator.num_referenced == NUM_PAGES

    @invariant()
    def references_are_the_tables_that_hold_the_page(self) -> None:
        held = Counter(page for sequence in self.live for page in sequence.table.pages)
        assert {page: self.manager.allocator.references(page) for page in range(NUM_PAGES)} == {
            page: held[page] for page in range(NUM_PAGES)
        }
        assert self.manager.num_pages_in_use == len(held)

    @invariant()
    def no_table_holds_a_page_twice(self) -> None:
        for sequence in self.live:
            assert len(set(sequence.table.pages)) == len(sequence.table.pages)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        layer = self.manager.pool.layer(0)
        for sequence in self.live:
            table, tokens = sequence.table, sequence.tokens
            assert table.num_tokens == len(tokens)
            expected = [key_row(sequence.namespace, tokens, position) for position in range(len(tokens))]
            assert self.read(self.manager.slots(table, 0, len(tokens))) == expected
            for start in range(0, len(tokens), PAGE):
                rows = torch.tensor(expected[start : start + PAGE])
                for stat, kept in layer.stats.items():
                    assert torch.equal(kept[table.pages[start // PAGE], 0], stat.fold.reduce(rows, 0))

    @invariant()
    def every_entry_of_the_index_can_be_found(self) -> None:
        """No entry is left behind a removed parent, and no cached page is lost to the index."""
        index, allocator = self.manager.prefix, self.manager.allocator
        found = {entry.page for namespace, tokens in self.histories for entry in index.match(list(tokens), namespace)}
        assert len(found) == len(index) <= NUM_PAGES
        assert sum(allocator.references(page) == 0 for page in found) == allocator.num_cached

    def teardown(self) -> None:
        for sequence in self.live:
            self.manager.free(sequence.table)
        assert self.manager.num_pages_in_use == 0
        assert self.manager.available == NUM_PAGES
        self.manager.reset_prefix()
        assert self.manager.allocator.num_free == NUM_PAGES
        assert len(self.manager.prefix) == 0


class CollidingCacheMachine(CacheMachine):
    """The same under a hash of three values, where nearly every page collides with another."""

    digest = staticmethod(lambda data: bytes([zlib.crc32(data) % 3]))


class Int8CacheMachine(CacheMachine):
    """The same over int8 pages: the token is in the integers, the fingerprint in the scale of the value.

    So a sequence reads its own tokens only if integers and scales of K and V move together.
    """

    dtype = torch.int8

    def store(self, page: int, offset: int, token: float, fingerprint: float) -> None:
        layer = self.manager.pool.layer(0)
        layer.keys[page, 0, offset] = 1
        layer.values[page, 0, offset] = int(token)
        layer.key_scales[page, 0, offset] = token
        layer.value_scales[page, 0, offset] = fingerprint

    def read(self, slots: list[int]) -> list[list[float]]:
        layer = self.manager.pool.layer(0)
        keys, values = (rows[:, 0].reshape(-1, 2)[slots] for rows in (layer.key_rows(), layer.value_rows()))
        found = []
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            assert key[0] == key[1]
            assert value[0] == value[1]
            found.append([key[0], value[0] / key[0]])
        return found

    def spoil(self, page: int) -> None:
        pool = self.manager.pool
        pool.keys[:, page] = pool.values[:, page] = 99
        pool.key_scales[:, page] = pool.value_scales[:, page] = float("nan")


STEPS = settings(max_examples=120, stateful_step_count=50, suppress_health_check=[HealthCheck.too_slow])
TestCache = CacheMachine.TestCase
TestCache.settings = STEPS
TestCollidingCache = CollidingCacheMachine.TestCase
TestCollidingCache.settings = STEPS
TestInt8Cache = Int8CacheMachine.TestCase
TestInt8Cache.settings = settings(STEPS, max_examples=40)
