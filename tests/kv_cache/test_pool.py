from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM, KEY_SUM_16, VALUE_SUM, PageStat

GEOMETRY = CacheGeometry(num_layers=3, num_kv_heads=2, head_dim=5, page_size=16, num_pages=7, dtype=torch.bfloat16)
ALL_STATS = (KEY_SUM, KEY_MIN, KEY_MAX, VALUE_SUM, KEY_SUM_16)


def filled(stats: tuple[PageStat, ...] = ALL_STATS) -> PagePool:
    """A pool where every element differs from those of other pages."""
    pool = PagePool(GEOMETRY, stats)
    generator = torch.Generator().manual_seed(0)
    for tensor in (pool.keys, pool.values, *pool.stats.values()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pool


def test_shapes_and_types_follow_the_geometry() -> None:
    pool = PagePool(GEOMETRY, [KEY_MIN])
    assert pool.keys.shape == pool.values.shape == (3, 7, 2, 16, 5)
    assert pool.keys.dtype == pool.values.dtype == torch.bfloat16
    assert pool.stats[KEY_MIN].shape == (3, 7, 2, 5)
    assert pool.stats[KEY_MIN].dtype == torch.float32


def test_a_page_holds_whole_runs_of_a_statistic() -> None:
    two = CacheGeometry(num_layers=3, num_kv_heads=2, head_dim=5, page_size=32, num_pages=7)
    assert PagePool(two, [KEY_SUM_16]).stats[KEY_SUM_16].shape == (3, 7, 2, 2, 5)
    with pytest.raises(ValueError, match="pages of 32 tokens do not hold whole runs of 24"):
        PagePool(two, [replace(KEY_SUM_16, run_tokens=24)])


@pytest.mark.parametrize("stat", ALL_STATS, ids=lambda stat: stat.name)
def test_a_statistic_starts_from_its_empty_value(stat: PageStat) -> None:
    rows = PagePool(GEOMETRY, [stat]).stats[stat]
    assert torch.equal(rows, torch.full_like(rows, stat.fold.empty))


def test_sums_take_no_memory_before_they_are_written() -> None:
    """Of a sum's 128 MiB only what is written is mapped."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    large = CacheGeometry(num_layers=4, num_kv_heads=2, head_dim=64, page_size=64, num_pages=16384)
    pool = PagePool(large)
    before = resident()
    pool.declare([KEY_SUM_16])
    assert pool.stats[KEY_SUM_16].nbytes == 128 * 2**20
    pool.stats[KEY_SUM_16][1, 3] += 1
    assert resident() - before < 16 * 2**20
    assert pool.stats[KEY_SUM_16][1, 3:5].sum() == 2 * 4 * 64


def test_declaring_again_keeps_the_tensor_and_its_contents() -> None:
    pool = filled((KEY_SUM,))
    tensor, before = pool.stats[KEY_SUM], pool.stats[KEY_SUM].clone()
    pool.declare([KEY_SUM, PageStat(KEY_SUM.source, KEY_SUM.fold)])
    assert pool.stats[KEY_SUM] is tensor
    assert torch.equal(tensor, before)
    assert set(pool.stats) == {KEY_SUM}


def test_a_later_declaration_shows_in_every_layer() -> None:
    pool = filled((KEY_SUM,))
    pool.declare([VALUE_SUM])
    for index in range(GEOMETRY.num_layers):
        assert set(pool.layer(index).stats) == {KEY_SUM, VALUE_SUM}


def test_a_layer_is_a_window_on_the_pool_made_once() -> None:
    pool = PagePool(GEOMETRY, ALL_STATS)
    layer = pool.layer(1)
    assert pool.layer(1) is layer
    assert layer.page_size == 16
    layer.keys[4].fill_(3)
    layer.values[5].fill_(4)
    layer.stats[KEY_MAX][6].fill_(5)
    assert (pool.keys[1, 4] == 3).all()
    assert (pool.values[1, 5] == 4).all()
    assert (pool.stats[KEY_MAX][1, 6] == 5).all()
    assert torch.isinf(pool.stats[KEY_MAX][0]).all()
    assert torch.isinf(pool.stats[KEY_MAX][2]).all()


def test_copy_page_copies_everything_of_that_page_and_nothing_else() -> None:
    pool = filled()
    tensors = (pool.keys, pool.values, *pool.stats.values())
    before = [tensor.clone() for tensor in tensors]
    pool.copy_page(2, 5)
    for tensor, old in zip(tensors, before, strict=True):
        expected = old.clone()
        expected[:, 5] = old[:, 2]
        assert torch.equal(tensor, expected)
        assert not torch.equal(tensor, old)


@pytest.mark.parametrize("stats", [(), (KEY_MIN, KEY_MAX)], ids=["no statistics", "two statistics"])
def test_nbytes_counts_pages_and_statistics(stats: tuple[PageStat, ...]) -> None:
    expected = GEOMETRY.bytes_per_page * 7 + len(stats) * 3 * 7 * 2 * 5 * 4
    assert PagePool(GEOMETRY, stats).nbytes == expected
