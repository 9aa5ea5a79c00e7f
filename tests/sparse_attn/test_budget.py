"""What is read beside a scheme's own choice, and how reads are counted."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kv_cache.view import Rows
from foveate.sparse_attn import budget, counts
from foveate.sparse_attn.ops import keep_native
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, SchemeOptions, StepGroup, StepState
from foveate.sparse_attn.schemes.dense import Dense
from foveate.sparse_attn.selection import Band, Segment, Selection, Tiles

CPU = torch.device("cpu")
SIZES = st.sampled_from([1, 4, 16, 32])  # pages hold 16


def rows_of(*sequences):
    """Rows from ``(context, queries)`` pairs."""
    contexts, queries = zip(*sequences, strict=True)
    return Rows.build([[0] * -(-context // 16) for context in contexts], list(contexts), list(queries), CPU)


def random_selection(rows, size, tile, seed):
    tiles = Tiles.of(rows, tile)
    units = -(-max(rows.host_context_lens) // size)
    mask = torch.rand(len(tiles), 2, units, generator=torch.Generator().manual_seed(seed)) < 0.3
    mask &= torch.arange(units) <= ((tiles.position + tiles.query_count - 1) // size)[:, None, None]
    return Selection.from_mask(mask, size, tiles)


def without_kernels():
    return mock.patch.object(keep_native, "library", return_value=None)


both_ways = pytest.mark.parametrize("counted_by", [nullcontext, without_kernels], ids=["default", "torch"])
CHUNKS = st.lists(
    st.tuples(st.integers(0, 70), st.integers(1, 40)).map(lambda p: (sum(p), p[1])), min_size=1, max_size=3
)


@given(chunks=CHUNKS, size=SIZES, sinks=st.integers(0, 40), window=st.integers(0, 40), seed=st.integers(0, 99))
@settings(max_examples=80)
def test_keep_adds_exactly_sinks_window_and_own_tile(chunks, size, sinks, window, seed):
    rows = rows_of(*chunks)
    chosen = random_selection(rows, size, 8, seed)
    kept = budget.keep(chosen, Dense(SchemeOptions(sink_tokens=sinks, window_tokens=window)), Phase.PREFILL)
    kept.validate(rows)
    before, after = chosen.to_mask(rows), kept.to_mask(rows)
    for row, (_, _, count, position) in enumerate(chosen.tiles.host):
        want = before[row].clone()
        last = (position + count - 1) // size * size + size
        want[:, : min(-(-sinks // size) * size, last)] = True
        want[:, max(position // 8 * 8 - window, 0) // size * size : last] = True
        assert torch.equal(after[row], want)


def test_a_scheme_that_reads_its_own_tile_elsewhere_is_given_sinks_alone():
    scheme = Dense(SchemeOptions(sink_tokens=3))
    scheme.keeps_own_tile = False
    rows = rows_of((100, 20))
    tiles = Tiles.of(rows, 8)
    none = torch.full((len(tiles), 1, 1), -1, dtype=torch.int32)
    empty = Selection(none, torch.zeros(len(tiles), 1, dtype=torch.int32), 1, tiles)
    kept = budget.keep(empty, scheme, Phase.PREFILL)
    assert kept.indices[:, 0, :3].tolist() == [[0, 1, 2]] * len(tiles)
    assert kept.counts.unique().tolist() == [3]


@given(prompt=st.integers(1, 90), answer=st.integers(0, 20), tail=st.integers(0, 100), data=st.data())
@settings(max_examples=200)
def test_exactly_the_last_tokens_of_the_prompt_are_dense(prompt, answer, tail, data):
    total = prompt + answer
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    dense = []
    for start, stop in itertools.pairwise(cuts):
        parts = budget.spans(start, stop, prompt, SchemeOptions(dense_tail_tokens=tail))
        assert [position for first, last, _ in parts for position in range(first, last)] == list(range(start, stop))
        dense += [position for first, last, is_dense in parts if is_dense for position in range(first, last)]
    assert dense == list(range(max(prompt - tail, 0), prompt))


@both_ways
@given(
    chunks=CHUNKS,
    size=SIZES,
    nearest=st.integers(0, 30),
    farthest=st.none() | st.integers(1, 60),
    tile=st.sampled_from([1, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_selected_pairs_are_those_of_the_masks(counted_by, chunks, size, nearest, farthest, tile, seed):
    rows, band = rows_of(*chunks), Band(nearest, farthest)
    selection = random_selection(rows, size, tile, seed)
    want = torch.zeros(rows.num_sequences, dtype=torch.float64)
    mask = selection.to_mask(rows)
    for row, (sequence, _, count, position) in enumerate(selection.tiles.host):
        distance = torch.arange(position, position + count)[:, None] - torch.arange(mask.shape[-1])
        seen = (distance >= nearest) & (distance < (farthest or 10**6))
        want[sequence] += (mask[row, :, None, :] & seen).sum() * 3
    with counted_by():
        assert torch.equal(counts.selected_pairs(selection, rows, band, 6), want)


def test_layers_of_several_bands_are_counted_each_by_its_own():
    """Models mix sliding and global layers, and what was counted for one of them is kept for the rest of the step."""
    rows = rows_of((60, 20), (33, 1))
    chosen = random_selection(rows, 4, 8, 0)
    bands = [Band(), Band(0, 16), Band(16, None)]
    layers = [((Segment(keys, band),), band) for keys in (None, chosen) for band in bands]
    layers += [((Segment(chosen, Band(20, None)),), band) for band in bands]  # other bands than the layer's own

    def reads(layers):
        rows.plans.clear()
        group = StepGroup(None, Phase.PREFILL, 0, rows, (0, 1), carried={0: chosen})
        step = StepState(None, None, None, [group], None, torch.zeros(2, 2, dtype=torch.float64))
        for segments, band in layers:
            counts.book(segments, [None], LayerCall(0, AttentionSpec(1.0, band=band)), step, group, 6)
        return step.keys_read

    assert torch.equal(reads(layers), sum(reads([layer]) for layer in layers))


@given(chunks=CHUNKS, size=st.sampled_from([1, 8, 128]))
def test_tiles_are_cut_by_position_and_cover_every_query_once(chunks, size):
    rows = rows_of(*chunks)
    tiles = Tiles.of(rows, size)
    assert [q for _, start, count, _ in tiles.host for q in range(start, start + count)] == list(
        range(rows.num_queries)
    )
    for _, _, count, position in tiles.host:
        assert position // size == (position + count - 1) // size
