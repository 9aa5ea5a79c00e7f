"""What ``Selection.validate`` refuses: tests of every scheme lean on it."""

from __future__ import annotations

import pytest
import torch

from foveate.kv_cache.view import Rows
from foveate.sparse_attn.selection import Selection, Tiles

# One tile of positions 10 to 15, one of 16 to 19: with 4 tokens to a unit they see the units up to 3 and up to 4.
ROWS = Rows.build([[0, 0]], [20], [10], torch.device("cpu"))
GOOD = [[[0, 2, -1], [3, -1, -1]], [[1, 3, 4], [-1, -1, -1]]]


def validate(indices=GOOD, counts=((2, 1), (3, 0)), dtype=torch.int32, counts_dtype=torch.int32):
    made = torch.tensor(indices, dtype=dtype), torch.tensor(counts, dtype=counts_dtype)
    Selection(*made, 4, Tiles.of(ROWS, 8)).validate(ROWS)


def test_what_is_as_it_should_be_passes():
    validate()
    validate([[[3]], [[-1]]], [[1], [0]])


@pytest.mark.parametrize(
    ("row", "count"),
    [([2, 0, -1], 2), ([2, 2, -1], 2), ([0, 2, 1], 3)],
    ids=["descending", "repeated", "last-descends"],
)
def test_indices_that_do_not_ascend(row, count):
    with pytest.raises(ValueError, match="must ascend"):
        validate([[row, GOOD[0][1]], GOOD[1]], [[count, 1], [3, 0]])


@pytest.mark.parametrize(
    ("row", "count"),
    [([0, 2, -1], 1), ([0, 2, -1], 3), ([0, -1, 2], 2), ([-1, 0, 2], 2), ([-1, -1, -1], 1)],
    ids=["counts-too-few", "counts-too-many", "a-gap", "begins-with-a-gap", "counts-nothing"],
)
def test_counts_that_are_not_those_of_the_indices(row, count):
    with pytest.raises(ValueError, match="the rest is -1"):
        validate([[row, GOOD[0][1]], GOOD[1]], [[count, 1], [3, 0]])


@pytest.mark.parametrize(("tile", "unit"), [(0, 4), (1, 5)], ids=["within-the-chunk", "behind-the-last-key"])
def test_a_unit_that_no_query_of_the_tile_sees(tile, unit):
    indices, counts = [[[0]], [[0]]], [[1], [1]]
    indices[tile][0][0] = unit - 1
    validate(indices, counts)
    indices[tile][0][0] = unit
    with pytest.raises(ValueError, match="behind the tile's last query"):
        validate(indices, counts)


@pytest.mark.parametrize(
    "types", [{"dtype": torch.int64}, {"counts_dtype": torch.int64}], ids=lambda types: next(iter(types))
)
def test_other_types(types):
    with pytest.raises(ValueError, match="must be int32"):
        validate(**types)


@pytest.mark.parametrize(
    ("indices", "counts"),
    [(GOOD[:1], [[2, 1]]), (GOOD, [[2], [3]]), (GOOD, [[2, 1]])],
    ids=["a-tile-too-few", "a-head-too-few-in-counts", "a-tile-too-few-in-counts"],
)
def test_other_shapes(indices, counts):
    with pytest.raises(ValueError, match="per tile"):
        validate(indices, counts)
