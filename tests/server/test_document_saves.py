"""Saves without a model: what becomes of pages that are being copied when their document is deleted."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from foveate.kv_cache.disk import PageStore
from foveate.kv_cache.page_bytes import PageBytes
from foveate.server import document_cache
from foveate.server.document_cache import DocumentCache
from foveate.server.document_saves import Saves
from foveate.server.options import EngineOptions
from foveate.sparse_attn import registry

from ..kv_cache.disk_runs import NAMESPACE, PAGE, store_at, tokens_of
from .scheduler_runs import make_scheduler, make_sequence, step


class Desk:
    """A prompt of six pages that was computed, and a cache that is about to keep them."""

    def __init__(self, directory):
        self.scheduler = make_scheduler(pages=12, room=1000, prefix=True)
        self.scheduler.cache.pool.keys.zero_()
        self.scheduler.cache.pool.values.zero_()
        store = store_at(directory)
        options, self.woken = EngineOptions("m"), threading.Event()
        self.documents = DocumentCache(store, self.scheduler.cache, self.scheduler, options, "m", b"", self.woken.set)
        self.prompt([*tokens_of(1, 6), 5])

    def prompt(self, tokens):
        sequence = make_sequence(tokens, 0, NAMESPACE)
        sequence.group.request.scheme = registry.build("dense")
        self.scheduler.add(sequence)
        step(self.scheduler)
        self.documents.prompt_done(sequence)
        self.scheduler.remove(sequence)

    def turn_until(self, is_done):
        end = time.monotonic() + 60
        while not is_done():
            assert time.monotonic() < end
            self.documents.turn()
            time.sleep(0.001)

    def settle(self):
        self.turn_until(lambda: not self.documents._saves.is_busy)

    def kept(self):
        """Tokens of the documents that are listed, and files that are counted."""
        listed = [entry["tokens"] for entry in self.documents.describe(10)["data"]]
        return listed, self.documents.counts()["disk_files"]


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.documents.close()


@pytest.fixture
def copied(monkeypatch):
    """The pages that were copied out; a turn of the cache is over after each of them."""
    pages, real = [], PageBytes.copy_out

    def copy_out(layout, page, target):
        real(layout, page, target)
        pages.append(page)
        time.sleep(0.002)

    for name in ("SLICE_SECONDS", "IDLE_SLICE_SECONDS"):
        monkeypatch.setattr(document_cache, name, 0.001)
    monkeypatch.setattr(PageBytes, "copy_out", copy_out)
    return pages


def test_what_was_copied_is_listed_and_counted(desk, copied):
    desk.settle()
    assert len(copied) == 6
    assert desk.kept() == ([6 * PAGE], 1)


def test_a_document_that_is_deleted_while_it_is_copied_does_not_come_back(desk, copied, monkeypatch):
    remove, turn, removed = PageStore.remove, Saves.turn, threading.Event()

    def removing(store, names):
        try:
            return remove(store, names)
        finally:
            removed.set()

    def turning(saves, deadline):
        assert removed.wait(60), "what is written before the files go would go with them"
        turn(saves, deadline)

    desk.turn_until(lambda: copied)
    assert len(copied) < 6
    monkeypatch.setattr(PageStore, "remove", removing)
    desk.woken.clear()
    with ThreadPoolExecutor(1) as thread:
        deleting = thread.submit(desk.documents.delete, None)
        assert desk.woken.wait(60)
        monkeypatch.setattr(Saves, "turn", turning)
        desk.turn_until(deleting.done)
        assert deleting.result() == [], "it was not listed yet"
    desk.settle()
    assert desk.kept() == ([], 0)
    desk.prompt([*tokens_of(1, 6), 5])
    desk.settle()
    assert desk.kept() == ([6 * PAGE], 1), "computed again, it is kept again"
