"""The Triton kernels of attention and of writing pages, against the float32 reference.

Run by Triton's interpreter, or on a GPU where there is one; see ``script.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import Fold, PageStat
from foveate.kv_cache.view import LayerPages, PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops.tiling import Tiling
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band, Selection, Tiles

from .interpreter import teach_interpreter
from .script import DEVICE, INTERPRETED, Measured, measure, on_device, tell_cases

# RMS error over RMS of the reference, which sees the same rounded inputs. In 16 bits the kernels round weights and
# output; to bfloat16 the interpreter truncates, which costs up to 2^-7 of a value and 0.0044 here, a GPU half of it.
TOLERANCE = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 5e-3}
LSE_TOLERANCE = 1e-4
# Few large steps for the interpreter, which pays per step, not per element.
WIDE = Tiling(rows=128, keys=128, num_warps=4, num_stages=1)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One attention call; ``granularity=None`` is dense."""

    phase: str
    contexts: tuple[int, ...]
    queries: tuple[int, ...] = ()
    kv_heads: int = 2
    group: int = 1
    dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    granularity: int | None = None
    tile: int = 32
    per_query_head: bool = False
    packed: bool = False  # queries are a view into a packed QKV row
    facts: dict[str, Any] = field(default_factory=dict)
    tiling: Tiling | None = WIDE


def prefill(*contexts: int, queries: tuple[int, ...] = (), **rest: Any) -> Case:
    return Case("prefill", contexts, queries or contexts, **rest)


def decode(*contexts: int, **rest: Any) -> Case:
    return Case("decode", contexts, (1,) * len(contexts), **rest)


CHUNKS: dict[str, Any] = {"queries": (30, 16, 111)}
ATTENTION = {
    "prefill-1": prefill(1, tiling=None),
    "prefill-63-d80-g3-softcap": prefill(63, group=3, dim=80, page_size=64, facts={"softcap": 2.0}),
    "prefill-111-d128-g7-bf16": prefill(111, group=7, dim=128, dtype="bfloat16", tiling=None),
    "prefill-111-d256-g8-f16": prefill(111, kv_heads=1, group=8, dim=256, dtype="float16", tiling=None),
    "prefill-111-d96-g3-packed-query": prefill(111, group=3, dim=96, packed=True),
    "prefill-1000": prefill(1000, kv_heads=1, page_size=64),
    "prefill-1000-window": prefill(1000, kv_heads=1, facts={"band": Band(0, 100)}),
    "prefill-chunks-g3": prefill(130, 17, 1000, group=3, **CHUNKS),
    "prefill-chunks-small-blocks": prefill(47, 3, 70, queries=(9, 3, 11), group=3, tiling=None),
    "prefill-chunks-window-large-sinks": prefill(
        130, 17, 300, group=3, **CHUNKS, facts={"band": Band(0, 37), "sinks": [0.5, -2.0, 100.0, 1.0, 0.0, 3.0]}
    ),
    "prefill-chunks-behind-window-bf16": prefill(
        130, 17, 300, group=8, page_size=64, dtype="bfloat16", **CHUNKS, facts={"band": Band(40, None)}
    ),
    "prefill-chunks-ring-softcap-sinks": prefill(
        130, 17, 200, **CHUNKS, facts={"band": Band(5, 60), "softcap": 3.0, "sinks": [100.0, -100.0]}
    ),
    "prefill-selected1-g3": prefill(130, 17, 200, **CHUNKS, group=3, granularity=1),
    "prefill-selected16-g8-blocks-of-a-tile": prefill(
        300, queries=(200,), kv_heads=1, group=8, granularity=16, tile=128, dtype="bfloat16", tiling=None
    ),
    "prefill-selected16-in-page64-window-softcap": prefill(
        130, 17, 200, **CHUNKS, page_size=64, granularity=16, facts={"band": Band(0, 50), "softcap": 2.0}
    ),
    "prefill-selected64-g7-per-query-head-bf16": prefill(
        130, 170, queries=(30, 111), group=7, dim=80, page_size=64, granularity=64, tile=64,
        dtype="bfloat16", per_query_head=True,
    ),
    "prefill-selected4-tile1-large-sinks": prefill(
        40, 9, queries=(12, 9), group=3, granularity=4, tile=1, facts={"sinks": [0.5, -2.0, 100.0, 1.0, 0.0, 3.0]}
    ),
    "prefill-selected256-beyond-the-context-ring": prefill(
        600, 17, 300, **CHUNKS, granularity=256, facts={"band": Band(5, 400)}
    ),
    "decode-1": decode(1, group=3, tiling=None),
    "decode-lengths-g8-d128-bf16": decode(15, 16, 17, 1000, group=8, dim=128, dtype="bfloat16", tiling=None),
    "decode-d256-g3-softcap": decode(63, 600, group=3, dim=256, page_size=64, facts={"softcap": 2.0}),
    "decode-d80-g7-sinks-merged": decode(
        1000, 3, kv_heads=1, group=7, dim=80, facts={"sinks": [100.0, 1.0, 100.0, 1.0, 100.0, 1.0, -9.0]}
    ),
    "decode-window": decode(1000, 3, 200, group=3, facts={"band": Band(0, 37), "sinks": [1.0] * 6}),
    "decode-behind-window-nothing-seen": decode(5, 700, group=3, facts={"band": Band(20, None)}),
    "decode-selected1-g3": decode(1000, 3, 200, group=3, granularity=1),
    "decode-selected16-g8-f16-softcap": decode(
        1000, 33, group=8, granularity=16, page_size=64, dtype="float16", facts={"softcap": 2.0}
    ),
    "decode-selected64-per-query-head-sinks": decode(
        1000, 77, group=3, granularity=64, page_size=64, per_query_head=True, facts={"sinks": [0.0, 100.0, 2.0] * 2}
    ),
    "decode-selected256-beyond-the-context-ring": decode(
        1000, 3, 300, group=3, granularity=256, facts={"band": Band(3, 900)}
    ),
}  # fmt: skip
# Head dim, page size, the pool's type and that of the rows written. None rounds to bfloat16; see above.
WRITES = {
    "write-d64-f32": (64, 16, torch.float32, torch.float32),
    "write-d64-f32-into-f16": (64, 16, torch.float16, torch.float32),
    "write-d80-bf16": (80, 64, torch.bfloat16, torch.bfloat16),
}


def make_view(case: Case) -> PagedView:
    """A pool of NaN with random keys where sequences have tokens, pages in shuffled order."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-context // case.page_size) for context in case.contexts]
    dtype = getattr(torch, case.dtype)
    pool = PagePool(CacheGeometry(1, case.kv_heads, case.dim, case.page_size, sum(needed) + 3, dtype))
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for pages, context in zip(tables, case.contexts, strict=True):
        at = torch.tensor([pages[i // case.page_size] * case.page_size + i % case.page_size for i in range(context)])
        rows = torch.randn(2, context, case.kv_heads, case.dim, generator=generator).to(dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), at, backend="torch")
    return on_device(PagedView(pool.layer(0), Rows.build(tables, list(case.contexts), list(case.queries), CPU)))


def make_query(case: Case, view: PagedView) -> torch.Tensor:
    heads = case.kv_heads * case.group
    shape = (view.rows.num_queries, heads + (2 if case.packed else 0), case.dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(view.pages.keys.dtype)
    return query.to(DEVICE)[:, :heads]


def make_selection(case: Case, view: PagedView) -> Selection | None:
    """Two units of five, and some rows that read nothing."""
    if case.granularity is None:
        return None
    generator = torch.Generator().manual_seed(2)
    tiles = Tiles.of(view.rows, case.tile if case.phase == "prefill" else 1)
    heads = case.kv_heads * (case.group if case.per_query_head else 1)
    units = -(-max(case.contexts) // case.granularity)
    mask = torch.rand(len(tiles), heads, units, generator=generator) < 0.4
    last = (tiles.position + tiles.query_count - 1).cpu() // case.granularity
    mask &= torch.arange(units) <= last[:, None, None]
    mask[0, -1] = False
    selection = Selection.from_mask(mask.to(DEVICE), case.granularity, tiles)
    selection.validate(view.rows)
    return selection


def run_attention(case: Case) -> dict[str, Any]:
    from foveate.sparse_attn.ops import decode_triton, prefill_triton

    view = make_view(case)
    query, selection = make_query(case, view), make_selection(case, view)
    facts = dict(case.facts)
    if "sinks" in facts:
        facts["sinks"] = torch.tensor(facts["sinks"], device=DEVICE)
    # A scale above D^-0.5 spreads the logits, so that a wrong key shows.
    spec = AttentionSpec(3 * case.dim**-0.5, **facts)
    kernel = prefill_triton.prefill if case.phase == "prefill" else decode_triton.decode
    out, lse = kernel(query, view, selection, spec, case.tiling if INTERPRETED else None)
    want, want_lse = ops.prefill(query, view, selection, spec, backend="reference")
    unseen = torch.isinf(want_lse)
    return {
        "out": rms(out.double() - want.double()) / rms(want.double()),
        "lse": float((lse - want_lse)[~unseen].abs().max()),
        "unseen": int(unseen.sum()),
        "unseen_agrees": bool(torch.equal(lse == float("-inf"), unseen) and not out[unseen].any()),
        "dtypes": [str(out.dtype), str(lse.dtype)],
    }


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.pow(2).mean().sqrt())


def run_bad_key() -> dict[str, bool]:
    """Decode over several splits of keys, one of which has a key that is no number."""
    pool = PagePool(CacheGeometry(1, 1, 64, 32, 32))
    keys, values, query = (torch.randn(count, 1, 64) for count in (1024, 1024, 1))
    keys[10] = float("nan")
    ops.write_kv(keys, values, pool.layer(0), torch.arange(1024), backend="torch")
    view = on_device(PagedView(pool.layer(0), Rows.build([list(range(32))], [1024], [1], torch.device("cpu"))))
    spec = AttentionSpec(0.125)
    outs = {name: ops.decode(query.to(DEVICE), view, None, spec, backend=name)[0] for name in ("reference", "triton")}
    return {name: bool(out.isnan().all()) for name, out in outs.items()}


def run_places() -> list[list[int]]:
    """Places of rows of units of 256 tokens, up to position 700, for blocks of 64 keys and of 256."""
    from .places_triton import places_kernel

    indices = torch.tensor([[0, 1, 2], [0, 2, -1], [0, 1, -1], [2, 3, -1], [-1, -1, -1]], dtype=torch.int32)
    counts = torch.tensor([3, 2, 2, 2, 0], dtype=torch.int32, device=DEVICE)
    found = torch.empty(2, 5, dtype=torch.int32, device=DEVICE)
    for row, block in zip(found, (64, 256), strict=True):
        places_kernel[(5,)](indices.to(DEVICE), counts, row, 700, 3, 256, block)
    return found.tolist()


def run_far_page() -> dict[str, Any]:
    """A page whose first element lies beyond 2^31; the memory before it is reserved and never touched."""
    from foveate.sparse_attn.ops import decode_triton, write_triton

    page = 2**31 // (16 * 64) + 1
    keys = torch.empty(page + 1, 1, 16, 64, dtype=torch.float16, device=DEVICE)
    view = PagedView(LayerPages(keys, keys, {}), Rows.build([[page]], [16], [1], DEVICE))
    rows = torch.randn(16, 1, 64, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    write_triton.write_kv(rows, rows, view.pages, torch.arange(16, device=DEVICE) + page * 16)
    spec = AttentionSpec(0.1)
    out, _ = decode_triton.decode(rows[:1], view, None, spec)
    want, _ = ops.decode(rows[:1], view, None, spec, backend="reference")
    return {"stored": bool(torch.equal(keys[page, 0], rows[:, 0])), "out": rms(out.float() - want.float())}


def run_write(dim: int, page_size: int, dtype: torch.dtype, given: torch.dtype) -> dict[str, Any]:
    """Pages of two sequences filled in three steps, with tokens that go nowhere, against the torch path."""
    stats = [PageStat(source, fold) for source in ("key", "value") for fold in Fold]
    pools = [PagePool(CacheGeometry(1, 3, dim, page_size, 7, dtype, DEVICE), stats) for _ in range(2)]
    for pool in pools:
        pool.keys.fill_(float("nan"))
        pool.values.fill_(float("nan"))
        for kept in pool.stats.values():
            kept.fill_(12345.0)  # what a former owner left
    generator = torch.Generator().manual_seed(4)
    tables = [[5, 2], [6, 0, 1]]
    done = [0, 0]
    for counts in ((page_size + 3, 5), (1, 1), (page_size // 2, 2 * page_size - 7)):
        slots = [-1]
        for sequence, count in enumerate(counts):
            places = range(done[sequence], done[sequence] + count)
            slots += [tables[sequence][i // page_size] * page_size + i % page_size for i in places]
            slots.append(-1)
            done[sequence] += count
        # One row wide: the kernels take strides as they are. In the pool's type, since the interpreter rounds
        # float32 to bfloat16 in another way than torch and than a GPU.
        rows = torch.randn(len(slots), 5, 2, dim, generator=generator).to(DEVICE, dtype)[:, 1:4]
        for pool, backend in zip(pools, ("triton", "torch"), strict=True):
            ops.write_kv(
                rows[:, :, 0], rows[:, :, 1], pool.layer(0), torch.tensor(slots, device=DEVICE), backend=backend
            )
    got, want = pools
    written = [page for pages in tables for page in pages]
    return {
        "pages": all(
            torch.equal(a.nan_to_num(nan=9.0), b.nan_to_num(nan=9.0))
            for a, b in ((got.keys, want.keys), (got.values, want.values))
        ),
        "stats": {
            stat.name: [
                float((got.stats[stat] - want.stats[stat])[0, written].abs().max()),
                bool(torch.equal(got.stats[stat][0, [3, 4]], want.stats[stat][0, [3, 4]])),
            ]
            for stat in stats
        },
    }


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure("test_attention_triton", seconds=900)


pytestmark = pytest.mark.timeout(1000)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_equals_reference(name, measured):
    case, got = ATTENTION[name], measured[name]
    assert got["out"] < TOLERANCE[case.dtype], f"out: RMS error {got['out']:.2e} of the reference's RMS"
    assert got["lse"] < LSE_TOLERANCE, f"lse: largest error {got['lse']:.2e}"
    assert got["unseen_agrees"], "out = 0 and lse = -inf exactly where the reference sees no key"
    assert got["dtypes"] == [f"torch.{case.dtype}", "torch.float32"]


def test_cases_include_queries_that_see_nothing(measured):
    unseen = [name for name in ATTENTION if measured[name]["unseen"]]
    assert any("decode" in name for name in unseen)
    assert any("prefill-selected" in name for name in unseen)
    assert any("behind-window" in name for name in unseen)


@pytest.mark.parametrize("name", WRITES)
def test_write_equals_torch(name, measured):
    got = measured[name]
    assert got["pages"], "stored rows differ, or a slot was written that should not be"
    for stat, (error, untouched) in got["stats"].items():
        assert error <= (1e-4 if stat.endswith("sum") else 0), f"{stat}: largest error {error:.2e}"
        assert untouched, f"{stat}: a page without tokens was changed"


def test_a_key_that_is_no_number_shows_behind_splits(measured):
    assert measured["bad-key"] == {"reference": True, "triton": True}


def test_of_the_last_unit_nothing_behind_the_end_is_walked(measured):
    """No result tells: what lies there is masked. But a unit may be many times as long as the context."""
    assert measured["places"] == [[700, 444, 512, 256, 0], [768, 512, 512, 512, 0]]


def test_addresses_beyond_32_bits(measured):
    assert measured["far-page"]["stored"], "keys: not where page 2^21 + 1 lies"
    assert measured["far-page"]["out"] < 1e-3, "out: read from elsewhere"


def main() -> None:
    teach_interpreter()
    attention = {name: partial(run_attention, case) for name, case in ATTENTION.items()}
    writes = {name: partial(run_write, *arguments) for name, arguments in WRITES.items()}
    tell_cases(attention | writes | {"far-page": run_far_page, "bad-key": run_bad_key, "places": run_places})


if __name__ == "__main__":
    main()
