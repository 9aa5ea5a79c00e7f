"""``top_units`` against a stable sort, ties and all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.sparse_attn.ops.topk import top_units


def oracle(scores, candidates, counts, ties="lower"):
    """Per row the chosen units, ascending, by sorting ``(score, index)`` pairs."""
    chosen = []
    for row, kinds in enumerate(scores.tolist()):
        for values in kinds:
            pairs = [(value, index) for index, value in enumerate(values) if candidates[row][index]]
            pairs.sort(key=lambda pair: (-pair[0], pair[1] if ties == "lower" else -pair[1]))
            chosen.append(sorted(index for _, index in pairs[: counts[row]]))
    return chosen


def rows_of(indices, counts):
    assert indices.dtype == counts.dtype == torch.int32
    rows = [row.tolist() for row in indices.flatten(0, 1)]
    lengths = counts.flatten().tolist()
    assert all(set(row[length:]) <= {-1} for row, length in zip(rows, lengths, strict=True))
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


VALUES = st.sampled_from([-float("inf"), -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38, float("inf")])


@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.sampled_from(["lower", "higher"]))
def test_equals_a_stable_sort(data, rows, kinds, units, ties):
    flat = data.draw(st.lists(VALUES, min_size=rows * kinds * units, max_size=rows * kinds * units))
    scores = torch.tensor(flat, dtype=torch.float32).view(rows, kinds, units)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * units, max_size=rows * units)))
    mask = mask.view(rows, units)
    counts = data.draw(st.lists(st.integers(0, units + 2), min_size=rows, max_size=rows))
    got = rows_of(*top_units(scores, mask, torch.tensor(counts), ties=ties))
    assert got == oracle(scores, mask.tolist(), counts, ties)
    same = rows_of(*top_units(scores, mask, counts[0], ties=ties))
    assert same == oracle(scores, mask.tolist(), [counts[0]] * rows, ties)


def test_range_of_candidates():
    scores = torch.arange(12.0).view(2, 1, 6)
    first, end = torch.tensor([1, 4], dtype=torch.int32), torch.tensor([4, 2], dtype=torch.int32)
    indices, counts = top_units(scores, (first, end), 2)
    assert indices.tolist() == [[[2, 3]], [[-1, -1]]]
    assert counts.tolist() == [[2], [0]]


@pytest.mark.parametrize(("k", "most", "width"), [(0, None, 1), (3, None, 3), (99, None, 5), ([1, 2], 2, 2)], ids=str)
def test_width_is_known_from_host_numbers(k, most, width):
    count = torch.tensor(k) if isinstance(k, list) else k
    indices, counts = top_units(torch.zeros(2, 3, 5), torch.ones(2, 5, dtype=torch.bool), count, most=most)
    assert indices.shape == (2, 3, width)
    want = torch.as_tensor(k).clamp(max=5).reshape(-1, 1).expand(2, 3)
    assert torch.equal(counts.long(), want.long())
