from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from foveate.kv_cache.errors import CacheError, OutOfPages
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.table import BlockTable

PAGE = 16
Make = Callable[..., KVCacheManager]


def tokens(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def run(manager: KVCacheManager, token_ids: list[int], namespace: bytes = b"") -> BlockTable:
    """Opens a sequence and writes all of its tokens."""
    table = manager.open(token_ids, namespace)
    manager.reserve(table, len(token_ids))
    manager.commit(table, token_ids)
    return table


def state(table: BlockTable) -> tuple[list[int], int, int, int]:
    return list(table.pages), table.num_tokens, table.num_cached, table.num_indexed


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (47, 32), (48, 32)])
def test_a_prompt_seen_before_is_reused_but_for_its_last_token(make_manager: Make, length: int, cached: int) -> None:
    manager = make_manager()
    first = run(manager, tokens(48))
    kept = list(first.pages)
    manager.free(first)
    table = manager.open(tokens(length), b"")
    assert table.num_tokens == table.num_cached == cached
    assert table.pages == kept[: cached // PAGE]
    assert manager.num_pages_in_use == cached // PAGE


def test_a_prefix_is_shared_with_a_running_sequence(make_manager: Make) -> None:
    manager = make_manager()
    first = run(manager, tokens(40))
    second = run(manager, tokens(40))
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2]
    assert [manager.allocator.references(page) for page in first.pages] == [2, 2, 1]


def test_another_namespace_reuses_nothing(make_manager: Make) -> None:
    manager = make_manager()
    run(manager, tokens(40), b"dense")
    assert manager.open(tokens(40), b"streaming").pages == []


def test_without_a_namespace_nothing_is_found_and_nothing_left(make_manager: Make) -> None:
    manager = make_manager()
    first = manager.open(tokens(40), None)
    manager.reserve(first, 40)
    manager.commit(first, tokens(40))
    fork = manager.fork(first)
    manager.reserve(fork, 56)
    manager.commit(fork, tokens(56))
    assert manager.find(tokens(40), None) == len(manager.prefix) == 0
    assert manager.open(tokens(40), None).pages == []
    manager.free(first)
    manager.free(fork)
    assert manager.allocator.num_free == 8


def test_what_is_taken_out_under_a_running_sequence_can_be_computed_again(
    make_manager: Make,
) -> None:
    manager = make_manager()
    running = run(manager, tokens(33))
    manager.discard(manager.prefix.keys())
    manager.reserve(running, 65)
    manager.commit(running, tokens(65))
    assert len(manager.prefix) == 0, "nobody could find what is behind a page that was taken out"
    manager.free(running)
    manager.free(run(manager, tokens(65)))
    assert manager.find(tokens(66), b"") == 64


def test_pages_behind_one_that_was_taken_out_do_not_stand_in_the_way(make_manager: Make) -> None:
    manager = make_manager()
    manager.free(run(manager, tokens(65)))
    second = manager.prefix.match(tokens(65), b"")[1]
    manager.discard([second.key])
    assert manager.find(tokens(66), b"") == 16
    running = run(manager, tokens(65))
    assert manager.find(tokens(66), b"") == 64
    manager.free(running)
    assert (manager.allocator.num_cached, len(manager.prefix)) == (4, 4)


def test_a_restored_page_takes_the_place_of_one_that_nobody_can_reach(make_manager: Make) -> None:
    manager = make_manager()
    manager.free(run(manager, tokens(33)))
    first = manager.prefix.match(tokens(33), b"")[0]
    manager.discard([first.key])
    parent = None
    for start in (0, PAGE):
        parent = manager.restore(parent, tokens(PAGE, start), b"", lambda page: None)
        assert parent is not None
    assert manager.find(tokens(33), b"") == 32


def test_without_prefix_reuse_nothing_is_kept(make_manager: Make) -> None:
    manager = make_manager(prefix_reuse=False)
    manager.free(run(manager, tokens(40)))
    assert manager.open(tokens(40), b"").pages == []
    assert manager.allocator.num_free == 8
    assert manager.prefix_queries_tokens == 0


def test_generated_tokens_are_found_by_the_next_turn(make_manager: Make) -> None:
    manager = make_manager()
    table = run(manager, tokens(30))
    for length in range(31, 36):
        manager.reserve(table, length)
        manager.commit(table, tokens(length))
    manager.free(table)
    assert manager.open(tokens(60), b"").num_cached == 32


def test_the_counters_tell_tokens_looked_for_and_found(make_manager: Make) -> None:
    manager = make_manager()
    run(manager, tokens(40))
    manager.open(tokens(40), b"")
    assert (manager.prefix_queries_tokens, manager.prefix_hit_tokens) == (80, 32)


def test_equal_prompts_written_at_once_end_on_the_same_pages(make_manager: Make) -> None:
    manager = make_manager()
    first, second = manager.open(tokens(40), b""), manager.open(tokens(40), b"")
    for table in (first, second):
        manager.reserve(table, 40)
    assert manager.num_pages_in_use == 6
    manager.commit(first, tokens(40))
    manager.commit(second, tokens(40))
    assert second.pages[:2] == first.pages[:2]
    assert manager.num_pages_in_use == 4


def test_reserve_takes_pages_and_counts_no_token(make_manager: Make) -> None:
    manager = make_manager()
    table = manager.open(tokens(40), b"")
    assert manager.pages_needed(table, 40) == 3
    manager.reserve(table, 40)
    assert (len(table.pages), table.num_tokens) == (3, 0)
    assert manager.pages_needed(table, 48) == 0
    assert manager.available == 5


def test_reserve_without_room_changes_nothing(make_manager: Make) -> None:
    manager = make_manager(num_pages=3)
    table = run(manager, tokens(20))
    before = state(table)
    with pytest.raises(OutOfPages) as error:
        manager.reserve(table, 65)
    assert (error.value.wanted, error.value.available) == (3, 1)
    assert state(table) == before
    assert manager.available == 1


def test_a_copy_without_room_changes_nothing(make_manager: Make) -> None:
    manager = make_manager(num_pages=2)
    table = run(manager, tokens(20))
    child = manager.fork(table)
    assert manager.pages_needed(child, 21) == 1
    with pytest.raises(OutOfPages):
        manager.reserve(child, 21)
    assert state(child) == state(table)
    assert [manager.allocator.references(page) for page in table.pages] == [2, 2]


def test_a_copy_that_fails_gives_its_pages_back(make_manager: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make_manager()
    table = run(manager, tokens(20))
    child = manager.fork(table)

    def fail(pool: PagePool, source: int, target: int) -> None:
        raise RuntimeError("the device failed")

    with monkeypatch.context() as patch:
        patch.setattr(PagePool, "copy_page", fail)
        with pytest.raises(RuntimeError, match="the device failed"):
            manager.reserve(child, 65)
    assert state(child) == state(table)
    assert manager.available == 6
    assert [manager.allocator.references(page) for page in table.pages] == [2, 2]
    manager.reserve(child, 65)
    assert manager.available == 2, "the same can be asked for again"


def test_slots_follow_the_block_table(make_manager: Make) -> None:
    manager = make_manager()
    table = BlockTable(b"", pages=[5, 2])
    assert manager.slots(table, 14, 18) == [5 * 16 + 14, 5 * 16 + 15, 2 * 16, 2 * 16 + 1]
    assert manager.slots(table, 3, 3) == []


@pytest.mark.parametrize(("start", "stop"), [(0, 33), (-1, 4), (32, 33)])
def test_slots_outside_the_table_are_refused(make_manager: Make, start: int, stop: int) -> None:
    manager = make_manager()
    table = run(manager, tokens(20))
    with pytest.raises(CacheError, match="the table has room for 32 tokens"):
        manager.slots(table, start, stop)


@pytest.mark.parametrize("length", [17, 20, 31])
def test_the_first_to_write_after_a_fork_copies(make_manager: Make, length: int) -> None:
    manager = make_manager()
    table = run(manager, tokens(length))
    manager.pool.keys[:, table.pages[1]] = 7.0
    child = manager.fork(table)
    shared = table.pages[1]
    assert child.pages == table.pages
    manager.reserve(child, length + 1)
    assert table.pages[1] == shared != child.pages[1]
    assert child.pages[0] == table.pages[0]
    assert torch.equal(manager.pool.keys[:, child.pages[1]], manager.pool.keys[:, shared])
    manager.reserve(table, length + 1)
    assert table.pages[1] == shared


def test_a_fork_on_a_page_border_copies_nothing(make_manager: Make) -> None:
    manager = make_manager()
    table = run(manager, tokens(32))
    child = manager.fork(table)
    for each in (table, child):
        manager.reserve(each, 33)
    assert child.pages[:2] == table.pages[:2]
    assert child.pages[2] != table.pages[2]


def test_reserved_pages_stay_with_the_original(make_manager: Make) -> None:
    manager = make_manager()
    table = run(manager, tokens(20))
    manager.reserve(table, 60)
    child = manager.fork(table)
    assert child.pages == table.pages[:2]
    with pytest.raises(CacheError, match="position 20 is on a shared page"):
        manager.slots(table, 20, 21)
    manager.reserve(table, 60)
    assert len(manager.slots(table, 20, 60)) == 40


def test_written_slots_of_a_shared_page_can_be_asked_for(make_manager: Make) -> None:
    manager = make_manager()
    table = run(manager, tokens(20))
    assert manager.slots(manager.fork(table), 0, 20) == manager.slots(table, 0, 20)


@pytest.mark.parametrize("num_tokens", [19, 41], ids=["fewer than before", "more than given"])
def test_an_impossible_commit_is_refused(make_manager: Make, num_tokens: int) -> None:
    manager = make_manager()
    table = run(manager, tokens(20))
    manager.reserve(table, 60)
    with pytest.raises(CacheError, match=f"cannot commit {num_tokens} of 40 tokens"):
        manager.commit(table, tokens(40), num_tokens)
    assert table.num_tokens == 20


def test_a_commit_beyond_the_pages_is_refused(make_manager: Make) -> None:
    manager = make_manager()
    table = run(manager, tokens(20))
    with pytest.raises(CacheError, match="there is room for 32"):
        manager.commit(table, tokens(33))


def test_tokens_not_yet_written_are_not_indexed(make_manager: Make) -> None:
    manager = make_manager()
    table = manager.open(tokens(40), b"")
    manager.reserve(table, 40)
    manager.commit(table, tokens(40), 31)
    assert (table.num_tokens, table.num_indexed) == (31, 1)
    assert manager.open(tokens(40), b"").num_cached == 16


def test_free_empties_the_table_and_twice_is_harmless(make_manager: Make) -> None:
    manager = make_manager()
    table = run(manager, tokens(40))
    manager.free(table)
    assert state(table) == ([], 0, 0, 0)
    assert (manager.num_pages_in_use, manager.available) == (0, 8)
    manager.free(table)
    assert (manager.num_pages_in_use, manager.available) == (0, 8)


def test_a_freed_table_can_start_again(make_manager: Make) -> None:
    manager = make_manager()
    table = run(manager, tokens(40))
    manager.free(table)
    manager.reserve(table, 40)
    manager.commit(table, tokens(40))
    assert manager.open(tokens(40), b"").num_cached == 32


def test_pressure_takes_the_end_of_a_chain_first(make_manager: Make) -> None:
    manager = make_manager(num_pages=4)
    manager.free(run(manager, tokens(64)))
    manager.reserve(manager.open(tokens(30, first=1000), b""), 30)
    assert manager.open(tokens(64), b"").num_cached == 32


def test_pressure_takes_the_chain_left_alone_longest(make_manager: Make) -> None:
    manager = make_manager(num_pages=4)
    for first in (0, 100):
        manager.free(run(manager, tokens(32, first)))
    manager.free(manager.open(tokens(33, 0), b""))
    manager.reserve(manager.open(tokens(32, 200), b""), 32)
    assert manager.open(tokens(33, 100), b"").num_cached == 0
    assert manager.open(tokens(33, 0), b"").num_cached == 32


def test_reset_prefix_forgets_what_nobody_holds(make_manager: Make) -> None:
    manager = make_manager()
    held = run(manager, tokens(20))
    manager.free(run(manager, tokens(40, first=100)))
    manager.reset_prefix()
    assert (manager.allocator.num_cached, manager.num_pages_in_use) == (0, 2)
    assert manager.open(tokens(40, first=100), b"").num_cached == 0
    assert manager.open(tokens(20), b"").pages == held.pages[:1]


def test_capacity_is_that_of_the_pool(make_manager: Make) -> None:
    assert make_manager(num_pages=5).capacity_tokens == 80


@pytest.mark.parametrize(("multiple", "cached"), [(1, 48), (8, 48), (32, 32), (64, 0)])
def test_a_reused_prefix_ends_at_the_multiple_asked_for(make_manager: Make, multiple: int, cached: int) -> None:
    manager = make_manager()
    manager.free(run(manager, tokens(60)))
    table = manager.open(tokens(60), b"", multiple)
    assert table.num_cached == cached
    manager.free(table)
    assert manager.num_pages_in_use == 0


def test_pages_are_let_go_with_their_manager(make_manager):
    """Not at the next garbage collection: an evaluation that made a pool per prompt of 32K held 10 GB."""
    manager = make_manager()
    pages = weakref.ref(manager.pool)
    manager.free(manager.open([1, 2, 3], b""))
    gc.disable()
    try:
        del manager
        assert pages() is None
    finally:
        gc.enable()
