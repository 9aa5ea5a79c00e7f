from __future__ import annotations

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows, upload

CPU = torch.device("cpu")


def test_ragged_tables_are_padded_by_page_zero() -> None:
    rows = Rows.build([[5, 2, 9], [7], []], [40, 3, 0], [8, 1, 0], CPU)
    assert rows.block_tables.tolist() == [[5, 2, 9], [7, 0, 0], [0, 0, 0]]


def test_numbers_are_the_same_on_host_and_device() -> None:
    rows = Rows.build([[5, 2, 9], [7]], [40, 3], [8, 1], CPU)
    assert rows.context_lens.tolist() == list(rows.host_context_lens) == [40, 3]
    assert rows.query_offsets.tolist() == [0, 8, 9]
    assert rows.host_query_lens == (8, 1)
    assert (rows.num_sequences, rows.num_queries) == (2, 9)


def test_everything_is_int32() -> None:
    rows = Rows.build([[1]], [1], [1], CPU)
    assert {rows.block_tables.dtype, rows.context_lens.dtype, rows.query_offsets.dtype} == {torch.int32}


@pytest.mark.parametrize("tables", [[[]], [[], []]], ids=["one", "two"])
def test_tables_without_pages_still_have_a_column(tables: list[list[int]]) -> None:
    rows = Rows.build(tables, [0] * len(tables), [0] * len(tables), CPU)
    assert rows.block_tables.shape == (len(tables), 1)


def test_no_sequence_gives_one_offset() -> None:
    rows = Rows.build([], [], [], CPU)
    assert rows.query_offsets.tolist() == [0]
    assert (rows.num_sequences, rows.num_queries) == (0, 0)


def test_the_lists_given_are_left_alone() -> None:
    tables = [[5, 2, 9], [7]]
    Rows.build(tables, [40, 3], [8, 1], CPU)
    assert tables == [[5, 2, 9], [7]]


def test_a_view_tells_the_sizes_of_its_pages() -> None:
    pool = PagePool(CacheGeometry(num_layers=2, num_kv_heads=3, head_dim=80, page_size=32, num_pages=4))
    view = PagedView(pool.layer(1), Rows.build([[3]], [5], [5], CPU))
    assert (view.page_size, view.num_kv_heads, view.head_dim) == (32, 3, 80)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_parts_of_one_upload_begin_at_16_bytes(dtype: torch.dtype) -> None:
    parts = [[1], [], [2, 3, 4, 5, 6], [7, 8]]
    made = upload(parts, dtype, CPU)
    assert [part.tolist() for part in made] == parts
    assert {part.dtype for part in made} == {dtype}
    starts = {part.storage_offset() * part.element_size() % 16 for part in made}
    assert starts == {0}
    assert len({part.untyped_storage().data_ptr() for part in made}) == 1
