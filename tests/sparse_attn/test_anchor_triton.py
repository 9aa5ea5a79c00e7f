"""The Triton kernels of exact scores, against the float32 reference.

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
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops.anchor import anchor_scores
from foveate.sparse_attn.ops.tiling import Tiling
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Tiles

from .interpreter import teach_interpreter
from .script import DEVICE, INTERPRETED, Measured, measure, on_device, tell_cases

# Largest error of a pooled probability; logits are float32 sums of products of the same rounded inputs on both sides.
TOLERANCE = 2e-5
# Few large steps for the interpreter, which pays per step, not per element.
WIDE = Tiling(rows=128, keys=128, num_warps=4, num_stages=1)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One call, on the tiles from ``first`` on."""

    contexts: tuple[int, ...]
    queries: tuple[int, ...]
    kv_heads: int = 2
    group: int = 1
    dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    tile: int = 32
    every: int = 1
    first: int = 0
    pool: str = "group"
    facts: dict[str, Any] = field(default_factory=dict)
    tiling: Tiling | None = WIDE


def prefill(*contexts: int, queries: tuple[int, ...] = (), **rest: Any) -> Case:
    return Case(contexts, queries or contexts, **rest)


def decode(*contexts: int, **rest: Any) -> Case:
    return Case(contexts, (1,) * len(contexts), tile=1, **rest)


CHUNKS: dict[str, Any] = {"queries": (30, 16, 111)}
SINKS = [0.5, -2.0, 100.0, 1.0, 0.0, 3.0]
CASES = {
    "prefill-1": prefill(1, tiling=None),
    "prefill-63-d80-g3-softcap": prefill(63, group=3, dim=80, page_size=64, facts={"softcap": 2.0}),
    "prefill-111-d128-g7-bf16": prefill(111, group=7, dim=128, dtype="bfloat16", tiling=None),
    "prefill-111-d256-g8-f16-many-blocks-of-rows": prefill(
        111, kv_heads=1, group=8, dim=256, dtype="float16", tile=64, tiling=None
    ),
    "prefill-1000-tile128": prefill(1000, kv_heads=1, page_size=64, tile=128),
    "prefill-chunks-g3-every-fifth-query": prefill(130, 17, 300, group=3, **CHUNKS, every=5),
    "prefill-111-d256-g8-every-second-query-many-blocks-of-rows": prefill(
        111, kv_heads=1, group=8, dim=256, tile=64, every=2, tiling=None
    ),
    "prefill-chunks-g3-sinks": prefill(130, 17, 300, group=3, **CHUNKS, facts={"sinks": SINKS}),
    "prefill-chunks-g3-all-heads-from-the-third-tile": prefill(130, 17, 300, group=3, **CHUNKS, first=2, pool="all"),
    "decode-1": decode(1, group=3, tiling=None),
    "decode-lengths-g8-d128-bf16": decode(15, 16, 17, 1000, group=8, dim=128, dtype="bfloat16", tiling=None),
    "decode-d80-g7-sinks-all-heads": decode(
        1000, 3, kv_heads=1, group=7, dim=80, pool="all", tiling=None, facts={"sinks": [100.0, 1.0] * 3 + [-9.0]}
    ),
    "decode-g3-d256-softcap": decode(63, 600, group=3, dim=256, page_size=64, facts={"softcap": 2.0}),
}  # fmt: skip


def make_view(case: Case) -> PagedView:
    """A pool of NaN with random keys where sequences have tokens, pages in shuffled order."""
    generator = torch.Generator().manual_seed(0)
    size = case.page_size
    needed = [-(-context // size) for context in case.contexts]
    dtype = getattr(torch, case.dtype)
    pool = PagePool(CacheGeometry(1, case.kv_heads, case.dim, size, sum(needed) + 3, dtype))
    pool.keys.fill_(float("nan"))
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for pages, context in zip(tables, case.contexts, strict=True):
        at = torch.tensor([pages[i // size] * size + i % size for i in range(context)])
        rows = torch.randn(2, context, case.kv_heads, case.dim, generator=generator).to(dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), at, backend="torch")
    return on_device(PagedView(pool.layer(0), Rows.build(tables, list(case.contexts), list(case.queries), CPU)))


def run(case: Case) -> dict[str, Any]:
    from foveate.sparse_attn.ops import anchor_triton

    view = make_view(case)
    shape = (view.rows.num_queries, case.kv_heads * case.group, case.dim)
    # A view into a packed row: the kernels take strides as they are.
    query = torch.randn(shape[0], shape[1] + 2, shape[2], generator=torch.Generator().manual_seed(1))
    query = query.to(DEVICE, view.pages.keys.dtype)[:, : shape[1]]
    facts = dict(case.facts)
    if "sinks" in facts:
        facts["sinks"] = torch.tensor(facts["sinks"], device=DEVICE)
    # A scale above D^-0.5 spreads the logits, so that a wrong key shows.
    spec = AttentionSpec(3 * case.dim**-0.5, **facts)
    tiles = Tiles.of(view.rows, case.tile).every(case.every)
    rows = range(case.first, len(tiles))
    got = anchor_triton.scores(query, view, tiles, spec, rows, case.pool == "all", case.tiling if INTERPRETED else None)
    want = anchor_scores(query, view, tiles, spec, rows=rows, pool=case.pool, backend="reference")
    return {"shape": got.shape == want.shape, "error": float((got - want).abs().max()), "largest": float(want.max())}


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure("test_anchor_triton", seconds=900)


pytestmark = pytest.mark.timeout(1000)


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_reference(name, measured):
    got = measured[name]
    assert got["shape"]
    assert got["error"] < TOLERANCE * max(1.0, got["largest"]), f"largest error {got['error']:.2e}"


def main() -> None:
    teach_interpreter()
    tell_cases({name: partial(run, case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
