"""Loads without a model: what they leave in the pool under pressure, and when they begin."""

from __future__ import annotations

import threading
import time

import pytest

from foveate.kv_cache.disk import PageStore
from foveate.kv_cache.page_bytes import PageBytes
from foveate.server import document_loads
from foveate.server.document_loads import Loads

from ..kv_cache.disk_runs import NAMESPACE, PAGE, run_of, store_at, tokens_of
from .scheduler_runs import make_scheduler, make_sequence, step


class Desk:
    """A document of six pages on disk, two in a file, and a pool of so many pages."""

    def __init__(self, directory, pages, room=1000):
        self.scheduler = make_scheduler(pages=pages, room=room, prefix=True)
        self.cache = self.scheduler.cache
        self.layout = PageBytes(self.cache.pool)
        self.store = store_at(directory)
        for first in (0, 2, 4):
            assert self.store.write(*run_of(1, first, page_bytes=self.layout.nbytes))
        self.tokens = tokens_of(1, 6)
        self.woken = threading.Event()
        self.loads = Loads(self.store, self.cache, self.scheduler, self.woken.set)

    def ask(self, arrival=10):
        sequence = make_sequence([*self.tokens, 5], arrival, NAMESPACE)
        sequence.group.sequences = [sequence]
        self.scheduler.add(sequence)
        return sequence

    def take(self):
        self.loads.take(lambda sequence: self.layout, lambda names: None)

    def turn(self, seconds=60.0):
        self.loads.turn(time.monotonic() + seconds)

    def load(self, pages=6):
        """Turns until so many pages are in, or the load is at its end."""
        while self.loads.parked and self.found() < pages:
            self.woken.wait(60)
            self.woken.clear()
            self.turn()

    def begin(self):
        """Asks, and brings the pages of the first file in."""
        sequence = self.ask()
        self.take()
        self.turn()
        self.load(pages=2)
        return sequence

    def leave(self, tokens, namespace):
        """Leaves the pages of a prompt as a request does that ends."""
        table = self.cache.open(tokens, namespace)
        self.cache.reserve(table, len(tokens))
        self.cache.commit(table, tokens)
        self.cache.free(table)

    def found(self):
        return self.cache.find([*self.tokens, 5], NAMESPACE) // PAGE


@pytest.fixture
def gate(monkeypatch):
    """Lets the first file be read, and the others once it is set."""
    gate, real = threading.Event(), PageStore.read

    def read(store, span, first_page, *arguments):
        if first_page:
            gate.wait(60)
        return real(store, span, first_page, *arguments)

    monkeypatch.setattr(PageStore, "read", read)
    yield gate
    gate.set()


def test_what_a_load_brought_in_is_evicted_from_its_end(tmp_path):
    desk = Desk(tmp_path, pages=12)
    desk.ask()
    desk.take()
    desk.turn()
    desk.load()
    assert desk.found() == 6
    assert desk.scheduler.waiting, "it is back in the queue, and does not hold them yet"
    for left in (5, 4, 3, 2, 1, 0):
        desk.cache.allocator.allocate(desk.cache.allocator.num_free + 1)
        assert desk.found() == left


@pytest.mark.parametrize("end", ["aborted", "closed", "stalled", "forgotten", "under way"])
def test_a_load_that_does_not_come_to_its_end_leaves_a_beginning(tmp_path, monkeypatch, gate, end):
    desk = Desk(tmp_path, pages=12)
    sequence = desk.begin()
    if end == "aborted":
        sequence.group.sequences.clear()
        desk.turn()
    elif end == "closed":
        desk.loads.close()
    elif end == "stalled":
        monkeypatch.setattr(document_loads, "STALL_SECONDS", 0.0)
        desk.turn()
    elif end == "forgotten":
        desk.loads.forget(None)
    assert bool(desk.loads.parked) == (end == "under way")
    assert bool(desk.scheduler.waiting) == (end in ("stalled", "forgotten"))
    for left in (1, 0):
        desk.cache.allocator.allocate(desk.cache.allocator.num_free + 1)
        assert desk.found() == left


@pytest.mark.parametrize("way", ["evicted", "removed"])
def test_a_load_that_lost_a_page_ends(tmp_path, gate, way):
    """What comes behind the gap would not be found."""
    desk = Desk(tmp_path, pages=12)
    desk.begin()
    if way == "evicted":
        for page in desk.cache.allocator.allocate(11):
            desk.cache.allocator.release(page)
    else:
        desk.cache.discard(desk.loads.parked[0].keys[:1])
    gate.set()
    desk.load()
    assert not desk.loads.parked
    assert (desk.found(), desk.loads.restored_tokens) == (1 if way == "evicted" else 0, 2 * PAGE)


@pytest.mark.parametrize("held", [0, 9], ids=["between", "within"])
def test_a_load_does_not_take_the_place_of_what_it_continues(tmp_path, gate, held):
    desk = Desk(tmp_path, pages=12)
    desk.begin()
    if held:
        desk.cache.allocator.allocate(held)
    else:
        desk.leave(range(10 * PAGE), b"other")  # younger, and none is free
    gate.set()
    desk.load()
    assert desk.found() == (3 if held else 6)
    assert desk.loads.restored_tokens == desk.found() * PAGE


def test_pages_found_in_memory_are_not_evicted_for_what_comes_behind_them(tmp_path):
    desk = Desk(tmp_path, pages=12)
    desk.leave(desk.tokens[: 2 * PAGE], NAMESPACE)
    desk.leave(range(10 * PAGE), b"other")
    assert (desk.found(), desk.cache.allocator.num_free) == (2, 0)
    desk.ask()
    desk.take()
    desk.turn()
    desk.load()
    assert (desk.found(), desk.loads.restored_tokens) == (6, 4 * PAGE)


def test_pages_that_a_prompt_will_take_are_not_loaded_into(tmp_path):
    desk = Desk(tmp_path, pages=16, room=PAGE)
    prompt = make_sequence(range(10 * PAGE), 0)
    desk.scheduler.add(prompt)
    step(desk.scheduler)
    assert (desk.cache.available, desk.scheduler.promised()) == (15, 10)
    sequence = desk.ask()
    desk.take()
    assert desk.scheduler.waiting == [sequence], "seven pages are wanted, and five are left"
    desk.scheduler.remove(prompt)
    desk.take()
    assert [load.sequence for load in desk.loads.parked] == [sequence]
    desk.scheduler.add(prompt)
    step(desk.scheduler)
    desk.turn()
    assert (desk.loads.parked, desk.scheduler.waiting) == ([], [sequence]), "nor when it comes in meanwhile"


def test_the_disk_is_looked_at_again_after_a_while(tmp_path, monkeypatch):
    """Not at every turn, for as long as a request waits; but another server may have written its pages meanwhile."""
    desk = Desk(tmp_path, pages=20)
    desk.tokens = tokens_of(2, 6)
    sequence = desk.ask()
    desk.take()
    for first in (0, 2, 4):
        desk.store.write(*run_of(2, first, page_bytes=desk.layout.nbytes))
    monkeypatch.setattr(document_loads, "LOOK_SECONDS", 1000.0)
    desk.take()
    assert (desk.loads.parked, desk.scheduler.waiting) == ([], [sequence])
    monkeypatch.setattr(document_loads, "LOOK_SECONDS", -1.0)
    desk.take()
    assert [load.sequence for load in desk.loads.parked] == [sequence]


@pytest.mark.parametrize("steps", [2, 3])
def test_who_got_its_pages_goes_first_where_the_shortest_does(tmp_path, steps):
    """Steps take turns between the oldest and the shortest, so one of two numbers of steps ends before the latter's."""
    desk = Desk(tmp_path, pages=40)
    desk.scheduler.max_running = 1
    answer, short = make_sequence(range(3), 0), make_sequence(range(20), 20)
    desk.scheduler.add(answer)
    step(desk.scheduler)
    sequence = desk.ask()
    desk.scheduler.add(short)
    for _ in range(steps):
        step(desk.scheduler)  # it is seen to be long
    desk.take()
    desk.turn()
    desk.load()
    desk.scheduler.remove(answer)
    assert [(chunk.sequence, chunk.count) for chunk in step(desk.scheduler)] == [(sequence, 1)]


def test_two_loads_leave_what_a_prompt_will_take(tmp_path, gate):
    desk = Desk(tmp_path, pages=20, room=PAGE)
    for first in (0, 2, 4):
        desk.store.write(*run_of(2, first, page_bytes=desk.layout.nbytes))
    prompt = make_sequence(range(8 * PAGE), 0)
    desk.scheduler.add(prompt)
    step(desk.scheduler)
    one = desk.ask()
    desk.tokens = tokens_of(2, 6)
    two = desk.ask(arrival=11)
    desk.take()
    desk.turn()
    assert {load.sequence: load.is_open for load in desk.loads.parked} == {one: True, two: False}
