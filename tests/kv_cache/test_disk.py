"""The store of pages on disk: bounded, shared, and nothing in it that was not written so."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import stat
import time
from pathlib import Path

import pytest
import torch

from foveate.kv_cache import disk
from foveate.kv_cache.disk import FOLDER, PageStore
from foveate.kv_cache.disk_format import pack_tokens
from foveate.kv_cache.disk_index import Span
from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.page_bytes import PageBytes
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.prefix import page_keys
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM, KEY_SUM_16

from .disk_runs import NAMESPACE, PAGE, pages_of, read_all, run_of, store_at, tokens_of

RUN_BYTES = 4096 * 3  # of a file with 2 pages of 3,000 bytes


def names(store: PageStore) -> set[str]:
    return set(os.listdir(store.folder))


def same(found: list[torch.Tensor], seed: int, count: int) -> bool:
    return len(found) == count and torch.equal(torch.stack(found), pages_of(seed, 0, count, 3000))


def test_another_process_finds_what_was_kept(tmp_path):
    store = store_at(tmp_path)
    for first in (0, 2, 4):
        assert store.write(*run_of(1, first))
    again = store_at(tmp_path)
    assert same(read_all(again, 1, 6), 1, 6)
    assert again.nbytes == store.nbytes == 3 * RUN_BYTES
    assert again.counts.corrupt == 0


def test_a_prompt_that_goes_another_way_gets_the_pages_in_common(tmp_path):
    store = store_at(tmp_path)
    store.write(*run_of(1, 0, 4))
    tokens = tokens_of(1, 4)
    other = tokens[: 3 * PAGE] + [5] * PAGE
    (span,) = store.spans(page_keys(other, NAMESPACE, PAGE))
    assert span.count == 3
    assert same(store.read(span, 0, NAMESPACE, pack_tokens(other)), 1, 3)


def test_nothing_is_read_for_other_tokens_or_another_namespace(tmp_path):
    store = store_at(tmp_path)
    store.write(*run_of(1, 0))
    store.write(*run_of(1, 2))
    tokens = tokens_of(1, 4)
    name = store.spans(page_keys(tokens, NAMESPACE, PAGE)[2:])[0].name
    span = Span(name, 0, 2)
    assert len(store.read(span, 2, NAMESPACE, pack_tokens(tokens))) == 2
    for place in (0, 2 * PAGE, 4 * PAGE - 1):  # in front of the run, too
        wrong = list(tokens)
        wrong[place] += 1
        assert store.read(span, 2, NAMESPACE, pack_tokens(wrong)) == []
    assert store.read(span, 2, b"m" * 32, pack_tokens(tokens)) == []
    assert store.read(span, 1, NAMESPACE, pack_tokens(tokens)) == []
    assert store.read(span, 2, NAMESPACE, pack_tokens(tokens[:-1])) == []
    assert store.counts.corrupt == 0
    assert len(names(store)) == 2


def test_a_forged_collision_of_hashes_gives_nothing(tmp_path):
    store = store_at(tmp_path)

    def weak(data: bytes) -> bytes:
        return b"k" * 32

    store.write(*run_of(1, 0, 1, digest=weak))
    tokens = tokens_of(2, 1)
    (span,) = store.spans(page_keys(tokens, NAMESPACE, PAGE, weak))
    assert store.read(span, 0, NAMESPACE, pack_tokens(tokens)) == []


@pytest.mark.parametrize("place", [3, 40, 100, 4096, 8200], ids=["magic", "digest", "json", "page-0", "page-1"])
def test_a_damaged_file_is_dropped(tmp_path, place, caplog):
    store = store_at(tmp_path)
    store.write(*run_of(1))
    store.write(*run_of(2))
    (name,) = {span.name for span in store.spans(page_keys(tokens_of(1, 2), NAMESPACE, PAGE))}
    path = store.folder / name
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    found = read_all(store, 1, 2)
    assert len(found) == (1 if place == 8200 else 0)
    assert not path.exists()
    assert store.counts.corrupt == 1
    assert "dropping" in caplog.text
    assert read_all(store, 1, 2) == []
    assert same(read_all(store, 2, 2), 2, 2)
    assert store.nbytes == RUN_BYTES


def test_damage_is_found_at_the_start_or_when_it_is_read(tmp_path):
    store = store_at(tmp_path)
    for seed in range(4):
        store.write(*run_of(seed))
    paths = sorted(store.folder.iterdir())
    os.truncate(paths[0], 5000)
    paths[1].write_bytes(b"")
    paths[2].rename(store.folder / f"{'0' * 64}.0.run")
    again = store_at(tmp_path)
    assert again.counts.corrupt == 3
    assert again.num_files == 1
    assert names(again) == {paths[3].name}


def test_what_is_not_ours_is_let_be(tmp_path):
    store = store_at(tmp_path)
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "sub").mkdir()
    again = store_at(tmp_path)
    assert (again.num_files, again.counts.corrupt) == (0, 0)
    assert names(again) == {"notes.txt", "sub"}


def test_links_pipes_and_folders_under_our_names_are_not_read(tmp_path):
    store = store_at(tmp_path)
    store.write(*run_of(1))
    (real,) = store.folder.iterdir()
    elsewhere = tmp_path / "elsewhere"
    real.rename(elsewhere)
    real.symlink_to(elsewhere)
    os.mkfifo(store.folder / f"{'1' * 64}.0.run")
    (store.folder / f"{'2' * 64}.0.run").mkdir()
    again = store_at(tmp_path)
    assert again.num_files == 0
    assert elsewhere.exists()


def test_only_the_owner_may_look(tmp_path):
    old = os.umask(0)
    try:
        store = store_at(tmp_path / "a" / "b")
        store.write(*run_of(1))
    finally:
        os.umask(old)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()] == [0o600]


def test_a_folder_that_others_can_read_is_closed(tmp_path):
    (tmp_path / FOLDER).mkdir(mode=0o755)
    assert stat.S_IMODE(store_at(tmp_path).folder.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch, caplog):
    store_at(tmp_path).write(*run_of(1))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    store = store_at(tmp_path)
    assert (store.num_files, store.write(*run_of(2))) == (0, False)
    assert "not a folder of this user" in caplog.text


def test_the_bound_holds_and_the_longest_unused_goes_first(tmp_path):
    store = store_at(tmp_path, 4 * RUN_BYTES)
    for seed in range(4):
        store.write(*run_of(seed))
    store.touch([span.name for span in store.spans(page_keys(tokens_of(0, 2), NAMESPACE, PAGE))])
    store.write(*run_of(4))
    store.write(*run_of(5))
    assert [bool(read_all(store, seed, 2)) for seed in range(6)] == [True, False, False, True, True, True]
    assert store.counts.evicted == 2
    assert sum(path.stat().st_size for path in store.folder.iterdir()) == store.nbytes == 4 * RUN_BYTES
    again = store_at(tmp_path, RUN_BYTES)
    again.make_room()
    assert same(read_all(again, 5, 2), 5, 2)
    assert again.nbytes == RUN_BYTES


def test_of_one_prompt_the_end_goes_first(tmp_path):
    store = store_at(tmp_path, 4 * RUN_BYTES)
    for first in (0, 2, 4):
        store.write(*run_of(1, first))
    store.touch([span.name for span in store.spans(page_keys(tokens_of(1, 6), NAMESPACE, PAGE))])
    store.write(*run_of(2))
    store.write(*run_of(3))
    assert same(read_all(store, 1, 6), 1, 4)


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_the_end_goes_first_of_a_prompt_that_nobody_asked_for_again(tmp_path, restarted):
    """Its files are written one after the other, so the first is the oldest."""
    store = store_at(tmp_path, 4 * RUN_BYTES)
    for first in (0, 2, 4):
        store.write(*run_of(1, first))
    if restarted:
        store = store_at(tmp_path, 4 * RUN_BYTES)
    store.write(*run_of(2))
    store.write(*run_of(3))
    assert same(read_all(store, 1, 6), 1, 4)
    assert same(read_all(store, 3, 2), 3, 2)


def test_a_question_does_not_outlive_what_it_is_about(tmp_path):
    store = store_at(tmp_path, 4 * RUN_BYTES)
    one = tokens_of(1, 4)
    two = one[: 2 * PAGE] + tokens_of(2, 2)
    store.write(*run_of(1, 0))
    store.write(*run_of(1, 2))
    store.write(*run_of(9))
    store.write(*run_of(2, 2, tokens=two))  # younger than all others, and of no use without the oldest
    store.write(*run_of(8))
    assert store.count(page_keys(two, NAMESPACE, PAGE)) == 4
    assert store.count(page_keys(one, NAMESPACE, PAGE)) == 2
    store.write(*run_of(7))
    assert not read_all(store, 9, 2)
    assert store.count(page_keys(two, NAMESPACE, PAGE)) == 4


def test_of_a_prompt_larger_than_the_bound_the_beginning_is_kept(tmp_path, caplog):
    store = store_at(tmp_path, 3 * RUN_BYTES)
    store.write(*run_of(2))
    wrote = [store.write(*run_of(1, first)) for first in range(0, 10, 2)]
    assert wrote == [True, True, True, False, False]
    assert not store.write(*run_of(1, 8, 1)), "a last file that would fit is of no use behind a gap"
    assert same(read_all(store, 1, 10), 1, 6)
    assert store.counts.evicted == 1
    assert "larger than the whole bound" in caplog.text


def test_a_run_larger_than_the_bound_is_not_kept_and_drives_nothing_out(tmp_path, caplog):
    store = store_at(tmp_path, RUN_BYTES)
    assert store.write(*run_of(1))
    assert not store.write(*run_of(2, count=4))
    assert same(read_all(store, 1, 2), 1, 2)
    assert "larger than the whole bound" in caplog.text


def test_two_processes_on_one_directory(tmp_path):
    one, two = store_at(tmp_path, 3 * RUN_BYTES), store_at(tmp_path, 3 * RUN_BYTES)
    one.write(*run_of(1))
    two.write(*run_of(2))
    two.write(*run_of(1))  # the same pages: the file is replaced by its equal
    one.refresh()
    assert same(read_all(one, 2, 2), 2, 2)
    two.remove(None)
    assert read_all(one, 1, 2) == []  # gone between look-up and reading
    one.refresh()
    assert (one.num_files, one.nbytes, one.counts.corrupt) == (0, 0, 0)


def test_two_processes_keep_the_bound_together(tmp_path):
    stores = [store_at(tmp_path, 5 * RUN_BYTES) for _ in range(2)]
    for seed in range(20):
        stores[seed % 2].refresh()
        stores[seed % 2].write(*run_of(seed))
    assert sum(path.stat().st_size for path in (tmp_path / FOLDER).iterdir()) <= 5 * RUN_BYTES


def test_pages_cut_into_files_differently_serve_each_other(tmp_path):
    store = store_at(tmp_path)
    store.write(*run_of(1, 0, 4))
    store.write(*run_of(1, 2, 2))
    assert same(read_all(store, 1, 4), 1, 4)
    keys = page_keys(tokens_of(1, 4), NAMESPACE, PAGE)
    store.remove([name for name in store._index.runs if name.endswith(".0.run")])
    assert store.count(keys) == 0
    assert store.missing(keys) == [0, 1]


def test_parts_of_the_dead_are_swept_up_and_those_of_the_living_are_not(tmp_path):
    store = store_at(tmp_path)
    dead, living = store.folder / f".{'0' * 16}.part", store.folder / f".{'1' * 16}.part"
    dead.write_bytes(b"x" * 9000)
    with living.open("wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        store_at(tmp_path)
        assert names(store) == {living.name}
    store_at(tmp_path)
    assert names(store) == set()


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO], ids=lambda code: os.strerror(code)
)
def test_a_disk_that_refuses_costs_one_line_and_leaves_nothing(tmp_path, monkeypatch, caplog, code):
    store = store_at(tmp_path)
    store.write(*run_of(1))
    real = os.write
    written = []

    def refuse(descriptor: int, data: memoryview) -> int:
        if written:
            raise OSError(code, os.strerror(code))
        written.append(real(descriptor, data[:100]))  # a short write first
        return written[0]

    monkeypatch.setattr(os, "write", refuse)
    for seed in range(2, 6):
        assert not store.write(*run_of(seed))
    assert len(written) == 1, "after a refusal the disk is left alone for a while"
    assert len(caplog.records) == store.counts.write_errors == 1
    assert len(names(store)) == 1
    assert same(read_all(store, 1, 2), 1, 2)
    monkeypatch.setattr(os, "write", real)
    monkeypatch.setattr(store, "_no_writes_before", time.monotonic())
    assert store.write(*run_of(2))


@pytest.mark.parametrize("below", ["file", "file/sub"])
def test_a_directory_that_cannot_be_made_keeps_nothing(tmp_path, caplog, below):
    (tmp_path / "file").write_text("")
    store = store_at(tmp_path / below)
    assert not store.write(*run_of(1))
    assert (store.documents(), read_all(store, 1, 2), store.remove(None), len(caplog.records)) == ([], [], [], 1)
    store.make_room()
    store.touch(["x"])


def test_a_folder_removed_under_a_running_server_is_made_again(tmp_path):
    store = store_at(tmp_path)
    store.write(*run_of(1))
    for path in store.folder.iterdir():
        path.unlink()
    store.folder.rmdir()
    assert read_all(store, 1, 2) == []
    assert not store.write(*run_of(2))
    assert store.write(*run_of(2))
    assert same(read_all(store, 2, 2), 2, 2)


def test_a_disk_that_does_not_give_a_file_loses_it(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    store.write(*run_of(1))
    monkeypatch.setattr(disk, "OpenRun", _broken)
    assert read_all(store, 1, 2) == []
    assert store.counts.corrupt == 1
    assert names(store) == set()


def _broken(descriptor: int) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_documents_share_files_and_go_one_by_one(tmp_path):
    store = store_at(tmp_path)
    first = tokens_of(1, 4)
    second = first[: 2 * PAGE] + tokens_of(2, 2)
    store.write(*run_of(1, 0, 2))
    store.write(*run_of(1, 2, 2))
    store.write(*run_of(2, 2, 2, tokens=second))
    store.write(*run_of(9, 0, 1))
    found = store.documents()
    assert [(item.tokens, item.nbytes, item.own_bytes) for item in found] == [
        (PAGE, 2 * 4096, 2 * 4096),
        (4 * PAGE, 2 * RUN_BYTES, RUN_BYTES),
        (4 * PAGE, 2 * RUN_BYTES, RUN_BYTES),
    ]
    assert store.delete(found[1].own_keys) == []
    left = store.documents()
    assert len(left) == 2
    assert left[1].own_bytes == 2 * RUN_BYTES


def two_questions(store: PageStore) -> tuple[list[int], list[int]]:
    """Two documents in the store: the second goes on behind page 3 of the five that are the only file of the first."""
    one = tokens_of(1, 5)
    two = one[: 3 * PAGE] + tokens_of(2, 3)
    store.write(*run_of(1, 0, 5))
    store.write(*run_of(2, 3, 3, tokens=two))
    return one, two


def own_keys(store: PageStore, keys: list[bytes]) -> tuple[bytes, ...]:
    """Of the document that ends with the last of ``keys``."""
    (found,) = [item for item in store.documents() if item.id == keys[-1].hex()[:32]]
    return found.own_keys


def test_what_only_one_document_holds_goes_out_of_a_shared_file(tmp_path):
    store = store_at(tmp_path)
    one, two = two_questions(store)
    keys = page_keys(one, NAMESPACE, PAGE), page_keys(two, NAMESPACE, PAGE)
    (first,) = [item for item in store.documents() if item.id == keys[0][-1].hex()[:32]]
    assert (set(first.own_keys), first.own_bytes) == (set(keys[0][3:]), 2 * 4096)
    used = {run.header.first_page: run.used for run in store._index.runs.values()}[0]
    before = store.nbytes
    assert store.delete(first.own_keys) == []
    assert store.nbytes == before - first.own_bytes
    assert (store.count(keys[0]), store.count(keys[1])) == (3, 6)
    for again in (store, store_at(tmp_path)):
        assert same(read_all(again, 1, 3), 1, 3), "what the other document begins with is as it was"
        (left,) = again.documents()
        assert (left.id, set(left.own_keys)) == (keys[1][-1].hex()[:32], set(keys[1]))
        assert again.counts.corrupt == 0
    for path in store.folder.iterdir():
        data = path.read_bytes()
        for index in (3, 4):
            assert pack_tokens(one[index * PAGE : (index + 1) * PAGE]) not in data
            assert pages_of(1, index, 1, 3000).numpy().tobytes()[:3000] not in data
    assert {run.header.first_page: run.used for run in store._index.runs.values()}[0] == used
    assert store.delete(left.own_keys) == []
    assert (names(store), store.nbytes) == (set(), 0)


def test_documents_go_in_any_order_and_nothing_is_left(tmp_path):
    for place, order in enumerate(itertools.permutations(range(3))):
        store = store_at(tmp_path / str(place))
        one, two = two_questions(store)
        three = one[: 4 * PAGE] + tokens_of(3, 1)
        store.write(*run_of(3, 4, 1, tokens=three))
        prompts = [page_keys(tokens, NAMESPACE, PAGE) for tokens in (one, two, three)]
        for done, index in enumerate(order, 1):
            assert store.delete(own_keys(store, prompts[index])) == []
            assert {item.id for item in store.documents()} == {prompts[i][-1].hex()[:32] for i in order[done:]}
            for left in order[done:]:
                assert store.count(prompts[left]) == len(prompts[left])
        assert names(store) == set()


def test_a_document_goes_out_of_all_files_that_hold_it(tmp_path):
    """As two processes leave them that wrote the same prompt in other pieces, each with a question of its own."""
    store = store_at(tmp_path)
    one, two = tokens_of(1, 4), tokens_of(1, 3) + tokens_of(2, 1)
    store.write(*run_of(1, 0, 4, tokens=one))
    store.write(*run_of(1, 0, 2))
    store.write(*run_of(1, 2, 2, tokens=one))
    store.write(*run_of(1, 0, 4, tokens=two))
    ends = [page_keys(tokens, NAMESPACE, PAGE) for tokens in (one, two)]
    assert {item.id for item in store.documents()} == {keys[-1].hex()[:32] for keys in ends}
    assert store.delete(own_keys(store, ends[0])) == []
    assert store.count(page_keys(two, NAMESPACE, PAGE)) == 4
    assert all(pack_tokens(one[3 * PAGE :]) not in path.read_bytes() for path in store.folder.iterdir())
    assert store.delete(own_keys(store, ends[1])) == []
    assert names(store) == set()


def test_what_came_to_continue_a_deleted_page_goes_with_it(tmp_path):
    store = store_at(tmp_path)
    one, two = two_questions(store)
    own = own_keys(store, page_keys(one, NAMESPACE, PAGE))
    store.write(*run_of(1, 5))
    store.write(*run_of(1, 7))
    assert store.delete(own) == []
    assert store.count(page_keys(two, NAMESPACE, PAGE)) == 6
    assert [item.tokens for item in store.documents()] == [6 * PAGE]


@pytest.mark.parametrize("damage", ["full", "page"])
def test_a_shared_file_that_cannot_be_written_anew_goes_as_a_whole(tmp_path, monkeypatch, damage, caplog):
    store = store_at(tmp_path)
    one, two = two_questions(store)
    (path,) = store.folder.glob("*.0.run")
    if damage == "full":
        monkeypatch.setattr(os, "write", _no_space)
    else:
        data = bytearray(path.read_bytes())
        data[-4096 * 4] ^= 1
        path.write_bytes(data)
    assert store.delete(own_keys(store, page_keys(one, NAMESPACE, PAGE))) == []
    assert not path.exists()
    assert len(names(store)) == 1
    assert store.count(page_keys(two, NAMESPACE, PAGE)) == 0
    assert "go, too" in caplog.text


def _no_space(descriptor: int, data: memoryview) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_does_not_let_go_is_told_of(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    one, _ = two_questions(store)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert store.delete(own_keys(store, page_keys(one, NAMESPACE, PAGE)))
        assert len(store.remove(None)) == store.num_files > 0
    assert store.remove(None) == []
    assert names(store) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("stats", "page"),
    [((), PAGE), ((KEY_MIN, KEY_MAX, KEY_SUM), PAGE), ((KEY_SUM, KEY_SUM_16), 64)],
    ids=["plain", "stats", "runs"],
)
def test_a_page_of_the_pool_comes_back_as_it_was(dtype, stats, page):
    pool = PagePool(CacheGeometry(2, 3, 8, page, 4, dtype), stats)
    layout = PageBytes(pool, stats)
    for tensor in pool._tensors():
        tensor.copy_(torch.randint(-100, 100, tensor.shape).to(tensor.dtype))
    before = [tensor.clone() for tensor in pool._tensors()]
    data = torch.full((layout.nbytes + 100,), 7, dtype=torch.uint8)
    layout.copy_out(2, data)
    assert layout.is_finite(data)
    assert data[layout.nbytes :].sum() == 0
    for tensor in pool._tensors():
        tensor[:, 2].zero_()
    layout.copy_in(2, data)
    assert all(torch.equal(a, b) for a, b in zip(before, pool._tensors(), strict=True))
    if dtype != torch.int8:
        for bad in (float("nan"), float("inf"), float("-inf")):
            pool.values[1, 2, 1, 3, 5] = bad
            layout.copy_out(2, data)
            assert not layout.is_finite(data)
