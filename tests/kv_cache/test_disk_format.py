"""A file of pages: what is read is what was written, or an error."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kv_cache.disk_format import OpenRun, RunHeader, head_of, pack_tokens, peek
from foveate.kv_cache.errors import DamagedRun
from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.page_bytes import PageBytes
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM, VALUE_SUM

from .disk_runs import run_of


def write(path: Path, header: RunHeader, token_ids: bytes, pages: torch.Tensor) -> bytes:
    data = head_of(header, token_ids) + pages.numpy().tobytes()
    path.write_bytes(data)
    return data


def with_file(path: Path, work: Callable[[int], object]) -> object:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return work(descriptor)
    finally:
        os.close(descriptor)


def read_everything(descriptor: int) -> tuple[RunHeader, bytes, list[bytes]]:
    peek(descriptor)
    run = OpenRun(descriptor)
    return run.header, run.token_ids, [run.page(index).numpy().tobytes() for index in range(run.header.num_pages)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("format") / "run"


@pytest.fixture(scope="module")
def original(path: Path) -> tuple[bytes, tuple[RunHeader, bytes, list[bytes]]]:
    """A file of 2 pages behind 3 others: its bytes, and what is read from them."""
    data = write(path, *run_of(7, first=3, count=2, page_bytes=5000))
    return data, with_file(path, read_everything)  # type: ignore[return-value]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 100), first=st.integers(0, 300), count=st.integers(1, 5), page_bytes=st.integers(1, 9000),
    about=st.dictionaries(st.text(max_size=20), st.text(max_size=40) | st.integers(-9, 9), max_size=4),
)  # fmt: skip
def test_what_is_read_is_what_was_written(path, seed, first, count, page_bytes, about):
    header, tokens, pages = run_of(seed, first, count, page_bytes)
    header = replace(header, about=about)
    write(path, header, tokens, pages)
    got, got_tokens, got_pages = with_file(path, read_everything)
    assert (got, got_tokens) == (header, tokens)
    assert got_pages == [page.numpy().tobytes() for page in pages]


@settings(max_examples=300)
@given(data=st.data())
def test_every_flipped_bit_is_found(path, original, data):
    good, _ = original
    place = data.draw(st.integers(0, len(good) - 1) | st.integers(0, 4095), label="byte")
    bit = data.draw(st.integers(0, 7), label="bit")
    bad = bytearray(good)
    bad[place] ^= 1 << bit
    path.write_bytes(bad)
    with pytest.raises(DamagedRun):
        with_file(path, read_everything)


@settings(max_examples=60)
@given(data=st.data())
def test_every_cut_and_every_addition_is_found(path, original, data):
    good, _ = original
    length = data.draw(st.integers(0, len(good) - 1) | st.integers(len(good) + 1, len(good) + 9000), label="length")
    path.write_bytes(good[:length].ljust(length, b"\0"))
    with pytest.raises(DamagedRun):
        with_file(path, peek)
    with pytest.raises(DamagedRun):
        with_file(path, OpenRun)


@settings(max_examples=60)
@given(junk=st.binary(max_size=9000))
def test_junk_is_refused(path, junk):
    path.write_bytes(junk)
    for reader in (peek, OpenRun):
        with pytest.raises(DamagedRun):
            with_file(path, reader)


def test_a_block_of_zeros_as_after_a_power_cut_is_found(path, original):
    good, _ = original
    for start in range(0, len(good), 4096):
        path.write_bytes(good[:start] + bytes(min(4096, len(good) - start)) + good[start + 4096 :])
        with pytest.raises(DamagedRun):
            with_file(path, read_everything)


def test_a_file_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(path):
    write(path, *run_of(1, count=3))
    run: OpenRun = with_file(path, OpenRun)  # type: ignore[assignment]
    size = path.stat().st_size
    run.page(0)
    os.truncate(path, size - 4096)
    with pytest.raises(OSError, match="Bad address"):
        run.page(2)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"null", b"\xff", b'{"namespace": 3}', b"[" * 5000],
    ids=["empty", "list", "nothing-in-it", "null", "no-utf8", "wrong-type", "deep"],
)
def test_a_header_of_another_shape_is_refused(text):
    with pytest.raises(DamagedRun):
        RunHeader.from_json(text)


@pytest.mark.parametrize("field", ["first_page", "page_tokens", "page_bytes"])
@pytest.mark.parametrize("value", [-1, 2**60, 1.5, True, "3", None])
def test_sizes_that_cannot_be_are_refused(field, value):
    found = json.loads(run_of(1)[0].to_json())
    found[field] = value
    with pytest.raises(DamagedRun):
        RunHeader.from_json(json.dumps(found).encode())


def test_tokens_beyond_32_bits_are_refused():
    with pytest.raises(OverflowError):
        pack_tokens([2**32])


@pytest.mark.parametrize("stats", [*itertools.permutations((KEY_MAX, KEY_MIN, KEY_SUM, VALUE_SUM))])
def test_statistics_of_a_page_in_bytes_stand_in_the_order_of_their_names(stats):
    """On disk they outlive the process, whose sets have an order of their own."""
    pool = PagePool(CacheGeometry(1, 1, 8, 16, 2), stats)
    for place, stat in enumerate(sorted(stats, key=lambda stat: stat.name)):
        pool.stats[stat].fill_(float(place))
    pool.keys.zero_()
    pool.values.zero_()
    layout = PageBytes(pool, stats)
    data = torch.empty(layout.nbytes, dtype=torch.uint8)
    layout.copy_out(0, data)
    assert data[-4 * 4 * 8 :].view(torch.float32).tolist() == [float(place) for place in range(4) for _ in range(8)]


@pytest.mark.parametrize(
    "changes",
    [{"keys": (), "checksums": ()}, {"checksums": ()}, {"keys": (b"k" * 32,)}],
    ids=["no-pages", "no-checksums", "fewer-keys"],
)
def test_a_header_that_does_not_name_every_page_is_refused(tmp_path, changes):
    """Signed all the same: what another program wrote there must not stop a server from starting."""
    header, tokens, pages = run_of(1, count=2)
    path = tmp_path / "run"
    forged = replace(header, **changes)
    path.write_bytes(head_of(forged, tokens[: 4 * forged.num_tokens]) + pages[: forged.num_pages].numpy().tobytes())
    with path.open("rb") as file, pytest.raises(DamagedRun):
        peek(file.fileno())
