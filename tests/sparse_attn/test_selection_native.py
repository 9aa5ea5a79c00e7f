"""The compiled kernels that score, choose, keep and count, against the references of the same ops."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM, KEY_SUM_16
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import budget, counts, ops
from foveate.sparse_attn.ops import keep_native, native, scan_native, sums
from foveate.sparse_attn.ops.topk import top_units
from foveate.sparse_attn.ops.walk import walk_chunks
from foveate.sparse_attn.protocol import Phase, SchemeOptions
from foveate.sparse_attn.registry import build
from foveate.sparse_attn.selection import Band, Selection, Tiles

if native.library() is None:
    pytest.skip("the kernels were not built on this machine", allow_module_level=True)

CPU = torch.device("cpu")
ISAS = tuple(isa for isa in native.library().isas if isa in ("avx2", "avx512"))
CONTEXTS, PAGE, KV_HEADS = (1, 63, 200), 16, 2


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_view(dim: int, dtype: torch.dtype, stored: torch.dtype | None = None, queries: int = 1) -> PagedView:
    pool = PagePool(CacheGeometry(1, KV_HEADS, dim, PAGE, 30, stored or dtype), (KEY_SUM, KEY_MIN, KEY_MAX))
    pages = torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist()
    tables = []
    for context in CONTEXTS:
        table = [pages.pop() for _ in range(-(-context // PAGE))]
        slots = torch.tensor([table[at // PAGE] * PAGE + at % PAGE for at in range(context)])
        rows = random(2, context, KV_HEADS, dim, seed=context).to(dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots)
        tables.append(table)
    counts = [min(queries, context) for context in CONTEXTS]
    return PagedView(pool.layer(0), Rows.build(tables, list(CONTEXTS), counts, CPU))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [16, 64, 80, 256])
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.int8)],
    ids=["float32", "bfloat16", "int8"],
)
def test_sums_of_runs(isa, dim, dtype, stored):
    view = make_view(dim, dtype, stored)
    start = torch.tensor([[0, 0, 1], [0, 5, 62], [0, 15, 113]])
    length = torch.tensor([[1, 0, 0], [63, 20, 1], [200, 33, 87]], dtype=torch.int32)
    got = scan_native.chunk_sums(view, start, length, isa=isa)
    want = sums.chunk_sums(view, start, length, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)  # up to 200 sums, in another order: measured 8e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("stored", [None, torch.int8], ids=["float32", "int8"])
def test_sums_of_runs_read_no_key_that_is_summed_up_already(isa, stored):
    """NaN stands in every key of the whole 16s within the runs."""
    pool = PagePool(CacheGeometry(1, 2, 32, 64, 4, stored or torch.float32), (KEY_SUM_16,))
    rows = random(150, 2, 32)
    table = [2, 0, 3]
    slots = torch.tensor([table[at // 64] * 64 + at % 64 for at in range(150)])
    ops.write_kv(rows, rows, pool.layer(0), slots)
    view = PagedView(pool.layer(0), Rows.build([table], [150], [1], CPU))
    start, length = torch.tensor([[0, 16, 5, 40, 47, 150]]), torch.tensor([[150, 16, 11, 100, 2, 0]])
    want = sums.chunk_sums(view, start, length, backend="reference")
    got = sums.chunk_sums(view, start, length, True, backend="native")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    read = {*range(144, 150), *range(5, 16), *range(40, 48), *range(128, 140), 48}
    hidden = slots[[at for at in range(150) if at not in read]]
    if stored is None:
        view.pages.keys[hidden // 64, :, hidden % 64] = float("nan")
    else:
        view.pages.key_scales[hidden // 64, :, hidden % 64] = float("nan")
    got = scan_native.chunk_sums(view, start, length, True, isa=isa)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bounds_of_pages(isa, dim, dtype):
    view = make_view(dim, dtype)
    query = random(3, 6, 2 * dim).to(dtype)[..., :dim]
    got = scan_native.page_bounds(query, view, isa=isa)
    want = ops.page_bounds(query, view, Tiles.of(view.rows, 1), backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_bounds_of_tiles_of_queries_are_left_to_torch():
    view = make_view(16, torch.float32, queries=20)
    assert not scan_native.bounds_pages(random(41, 4, 16), view)


@pytest.mark.parametrize("ties", ["lower", "higher"])
@pytest.mark.parametrize("k", [0, 1, 7, 300, torch.tensor([0, 5, 40, 300])], ids=["0", "1", "7", "all", "each"])
def test_units_are_those_that_torch_chooses(ties, k):
    scores = (random(4, 3, 300) * 4).round()  # many are equal, and some are -0
    scores[0, 0, 9], scores[1, 1, 8], scores[2, 2, 7] = float("nan"), float("inf"), float("-inf")
    first, end = torch.tensor([0, 3, 10, 299], dtype=torch.int32), torch.tensor([300, 4, 5, 300], dtype=torch.int32)
    most = None if isinstance(k, int) else 300
    want, got = (
        top_units(scores, (first, end), k, most=most, ties=ties, backend=backend) for backend in ("torch", "native")
    )
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_walks_are_those_of_torch():
    scores = (random(5, 2, 90) * 4).round()
    length = torch.randint(0, 12, (5, 90), generator=torch.Generator().manual_seed(0))
    start = torch.cumsum(length, 1) - length + 3
    room = torch.tensor([0, 1, 100, 57, 100])
    want, got = (walk_chunks(scores, start, length, room, 100, backend=backend) for backend in ("torch", "native"))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def without_kernels() -> Any:
    return mock.patch.object(keep_native, "library", return_value=None)


def some_selection(tiles: Tiles, granularity: int) -> Selection:
    """A third of the units up to each tile's end, ascending."""
    units = max(position + count for *_, count, position in tiles.host) // granularity + 1
    last = (tiles.position + tiles.query_count - 1) // granularity
    mask = (random(len(tiles), 2, units) > 0.4) & (torch.arange(units) <= last[:, None, None])
    return Selection.from_mask(mask, granularity, tiles)


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("granularity", [1, 8, 32])
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (5, 0), (0, 20), (64, 256)])
@pytest.mark.parametrize("keeps_own", [True, False], ids=["own", "not-own"])
def test_what_is_kept_and_counted_is_what_torch_keeps_and_counts(queries, granularity, sinks, window, keeps_own):
    view = make_view(16, torch.float32, queries=queries)
    phase = Phase.DECODE if queries == 1 else Phase.PREFILL
    tiles = Tiles.of(view.rows, 1 if queries == 1 else 32)
    scheme = build("streaming")
    scheme.options = SchemeOptions(sink_tokens=sinks, window_tokens=window)
    scheme.keeps_own_tile = scheme.keeps_own_token = keeps_own
    selection = some_selection(tiles, granularity)
    got = budget.keep(selection, scheme, phase)
    with without_kernels():
        want = budget.keep(selection, scheme, phase)
    assert torch.equal(got.counts, want.counts)
    assert torch.equal(got.to_mask(view.rows), want.to_mask(view.rows))
    assert all(row[row >= 0].tolist() == sorted({*row[row >= 0].tolist()}) for row in got.indices.flatten(0, 1))
    for band in (Band(), Band(0, 30), Band(10, None), Band(5, 90)):
        pairs = counts.selected_pairs(want, view.rows, band, 6)
        with without_kernels():
            assert torch.equal(pairs, counts.selected_pairs(want, view.rows, band, 6))
