"""int8 rows: how far off they may be, what becomes of odd ones, and that every way of indexing reads them alike."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kv_cache.errors import CacheConfigError
from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stored import StoredRows, dequantize, quantize

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)
# Half a step, and what float32 adds: 2^-24 of 127 steps in the quotient, and as much in the product.
HALF_STEP = 0.5 + 2 * 127 * 2.0**-24


@settings(max_examples=300)
@given(st.lists(FLOATS, min_size=1, max_size=24), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_channel_is_off_by_more_than_half_a_step(values, dtype):
    row = torch.tensor(values).to(dtype)
    integers, scale = quantize(row)
    assert integers.dtype == torch.int8
    assert int(integers.abs().max()) <= 127
    largest = float(row.float().abs().max())
    assert float(scale) == pytest.approx(largest / 127, rel=1e-6, abs=1.2e-38)
    error = float((dequantize(integers, scale).double() - row.double()).abs().max())
    # Where the scale would be denormal, the row is zeros instead: 127 times the least normal number.
    assert error <= (float(scale) * HALF_STEP if scale > 0 else 1.5e-36)


def test_half_a_step_is_reached():
    """The bound above is no looser than it must be."""
    row = torch.tensor([127.0, 0.5001, -63.4999])
    integers, scale = quantize(row)
    assert float((dequantize(integers, scale) - row).abs().max()) > 0.499 * float(scale)


def test_a_row_and_its_negative_are_stored_alike():
    row = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantize(row)[0], -quantize(-row)[0])


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf], ids=str)
def test_a_row_that_is_not_finite_reads_as_nan_and_its_neighbours_as_before(odd):
    rows = torch.ones(3, 16)
    rows[1, 5] = odd
    read = dequantize(*quantize(rows))
    assert read[1].isnan().all()
    assert torch.equal(read[[0, 2]], rows[[0, 2]])


def test_zeros_stay_zeros():
    assert torch.equal(dequantize(*quantize(torch.zeros(2, 8))), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_way_of_reading_gives_the_same_rows(dtype):
    pages, heads, size, dim = 5, 2, 16, 8
    generator = torch.Generator().manual_seed(0)
    data, scales = quantize(torch.randn(pages, heads, size, dim, generator=generator))
    rows = StoredRows(data, scales, dtype)
    want = dequantize(data, scales, dtype)
    assert want.dtype == dtype
    chosen = torch.tensor([4, 0, 3])
    assert torch.equal(rows[chosen], want[chosen])
    assert torch.equal(rows[1:3], want[1:3])
    assert torch.equal(rows[2:3, :, 5:9], want[2:3, :, 5:9])
    assert torch.equal(rows[chosen, 1], want[chosen, 1])
    assert torch.equal(rows[chosen, :, torch.tensor([1, 2, 3])], want[chosen, :, torch.tensor([1, 2, 3])])
    assert torch.equal(rows.pages(chosen), want[chosen])
    flat = torch.tensor([159, 0, 33, 33])
    assert torch.equal(rows.flat(flat), want.view(-1, dim)[flat])
    runs = torch.tensor([39, 0, 17])
    assert torch.equal(rows.flat(runs, 4), want.view(-1, 4 * dim)[runs].view(-1, dim))


def test_floats_are_read_as_they_lie():
    data = torch.randn(3, 1, 16, 4).bfloat16()
    rows = StoredRows(data, None, torch.float32)
    assert rows[0:2].data_ptr() == data.data_ptr()
    assert rows[0:2].dtype == torch.bfloat16


def test_bytes_count_the_scales():
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "num_pages": 4}
    eight = CacheGeometry(**shape, dtype=torch.int8)
    assert eight.bytes_per_token == 2 * 3 * 2 * (64 + 4)
    assert eight.bytes_per_page == 16 * eight.bytes_per_token
    assert PagePool(eight).nbytes == 4 * eight.bytes_per_page
    assert CacheGeometry(**shape, dtype=torch.bfloat16).bytes_per_token == 2 * 3 * 2 * 128


def test_a_page_is_copied_with_its_scales():
    pool = PagePool(CacheGeometry(2, 1, 16, 16, 3, torch.int8))
    for number, tensor in enumerate((pool.keys, pool.values, pool.key_scales, pool.value_scales)):
        tensor.zero_()
        tensor[:, 1] = number + 1
    pool.copy_page(1, 2)
    for number, tensor in enumerate((pool.keys, pool.values, pool.key_scales, pool.value_scales)):
        assert (tensor[:, 2] == number + 1).all()
        assert (tensor[:, 0] == 0).all()


def test_int8_pages_are_for_the_cpu():
    with pytest.raises(CacheConfigError, match="CPU"):
        CacheGeometry(1, 1, 16, 16, 1, torch.int8, torch.device("cuda"))
