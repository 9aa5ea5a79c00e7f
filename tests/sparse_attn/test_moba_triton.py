"""Triton kernels of MoBA, against their references.

Run by Triton's interpreter, or on a GPU where there is one; see ``script.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from .interpreter import teach_interpreter
from .script import DEVICE, Measured, measure, on_device, tell_cases

# Head dim, page size, block, top_k, gates pooled over a group, type; beside them the contexts and queries.
GATES: dict[str, tuple[int, int, int, int, bool, str, tuple[int, ...], tuple[int, ...]]] = {
    "one-token": (64, 16, 16, 3, False, "float32", (1,), (1,)),
    "chunks": (64, 16, 16, 4, False, "float32", (63, 17, 111), (20, 17, 5)),
    "pages-of-many-blocks-bf16": (80, 64, 16, 3, False, "bfloat16", (111, 20), (30, 1)),
    "pooled-f16": (128, 16, 32, 2, True, "float16", (111,), (33,)),
    "long-list-d256": (256, 16, 16, 20, False, "float32", (1000,), (3,)),
    "own-block-only": (64, 16, 64, 1, False, "float32", (70,), (70,)),
    "ties": (16, 16, 16, 3, False, "float32", (130,), (130,)),
}
# KV heads, query heads per KV head, head dim, page size, unit, row per KV head, type, facts.
ATTENTION: dict[str, tuple[int, int, int, int, int, bool, str, dict[str, Any]]] = {
    "d64-g3": (1, 3, 64, 16, 32, False, "float32", {}),
    "d80-g1-unit-in-page-softcap": (2, 1, 80, 64, 16, False, "float32", {"softcap": 2.0}),
    "d128-g7-per-kv-head-bf16": (1, 7, 128, 16, 64, True, "bfloat16", {}),
    "d256-f16-window": (1, 1, 256, 32, 32, False, "float16", {"band": (0, 37)}),
    "d64-large-sinks": (1, 2, 64, 16, 32, False, "float32", {"sinks": [100.0, -2.0]}),
    "d64-behind-window": (1, 1, 64, 16, 32, False, "float32", {"band": (20, None)}),
}
TOLERANCE = {"float32": 2e-5, "float16": 1.5e-3, "bfloat16": 8e-3}


def run_gate(
    dim: int, page: int, block: int, top_k: int, pooled: bool, dtype: str, contexts: tuple[int, ...], counts: Any
) -> dict[str, Any]:
    """Both choices, and by how much the worst differing one was the worse by the reference's gates."""
    from foveate.kv_cache.stats import KEY_SUM
    from foveate.sparse_attn import ops
    from foveate.sparse_attn.ops import block_gate_torch

    view, query = make_call(2, 2, dim, page, dtype, contexts, counts, stats=[KEY_SUM], ties=top_k == 3 and dim == 16)
    spans = zip(contexts, counts, strict=True)
    own = torch.cat([torch.arange(context - count, context) for context, count in spans]).int().to(DEVICE) // block
    candidates = (own > 2).int(), own
    arguments = (query, view, block, top_k, candidates)
    got, want = (ops.gate_blocks(*arguments, pooled=pooled, backend=backend) for backend in ("triton", "reference"))
    gap = 0.0
    first = 0
    for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        means = block_gate_torch.block_means(view, sequence, block, context // block).repeat_interleave(2, 0)
        gates = torch.einsum("qhd,hud->qhu", query[first : first + count].float(), means)
        if pooled:
            gates = gates.view(count, 2, 2, -1).sum(2)
        for row, head in (got[0] != want[0])[first : first + count].any(-1).nonzero().tolist():
            sets = [set(part[0][first + row, head].tolist()) for part in (got, want)]
            gap = max(
                gap,
                float(
                    gates[row, head, list(sets[1] - sets[0])].max() - gates[row, head, list(sets[0] - sets[1])].min()
                ),
            )
        first += count
    return {"gap": gap, "same": bool(torch.equal(got[0], want[0])), "counts": bool(torch.equal(got[1], want[1]))}


def make_call(
    kv_heads: int, group: int, dim: int, page: int, dtype: str, contexts: Any, counts: Any, stats: Any = (), ties=False
) -> tuple[Any, torch.Tensor]:
    """A pool of NaN with random keys where sequences have tokens, pages in shuffled order, and queries."""
    from foveate.kv_cache.geometry import CacheGeometry
    from foveate.kv_cache.pool import PagePool
    from foveate.kv_cache.view import PagedView, Rows
    from foveate.sparse_attn import ops

    generator = torch.Generator().manual_seed(0)
    needed = [-(-context // page) for context in contexts]
    kind = getattr(torch, dtype)
    pool = PagePool(CacheGeometry(1, kv_heads, dim, page, sum(needed) + 2, kind), stats)
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    tables = [[order.pop() for _ in range(number)] for number in needed]
    for table, context in zip(tables, contexts, strict=True):
        slots = torch.tensor([table[i // page] * page + i % page for i in range(context)])
        rows = torch.randn(2, context, kv_heads, dim, generator=generator)
        rows = (rows.round().clamp(-1, 1) if ties else rows).to(kind)
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots, backend="torch")
    query = torch.randn(sum(counts), kv_heads * group, dim, generator=generator)
    query = (query.round().clamp(-1, 1) if ties else query).to(kind)
    rows = Rows.build(tables, list(contexts), list(counts), torch.device("cpu"))
    return on_device(PagedView(pool.layer(0), rows)), query.to(DEVICE)


def run_attention(
    kv_heads: int, group: int, dim: int, page: int, unit: int, pooled: bool, dtype: str, facts: dict[str, Any]
) -> dict[str, Any]:
    from foveate.sparse_attn import ops
    from foveate.sparse_attn.ops import gathered_triton
    from foveate.sparse_attn.protocol import AttentionSpec
    from foveate.sparse_attn.selection import Band, Selection, Tiles

    contexts, counts = (70, 17, 111), (20, 17, 1)
    view, query = make_call(kv_heads, group, dim, page, dtype, contexts, counts)
    tiles = Tiles.of(view.rows, 1)
    kinds = kv_heads if pooled else kv_heads * group
    mask = torch.rand(len(tiles), kinds, -(-111 // unit), generator=torch.Generator().manual_seed(2)) < 0.5
    mask &= torch.arange(mask.shape[2]) <= (tiles.position // unit).cpu()[:, None, None]
    mask[0, -1] = False
    selection = Selection.from_mask(mask.to(DEVICE), unit, tiles)
    known = dict(facts)
    if "band" in known:
        known["band"] = Band(*known["band"])
    if "sinks" in known:
        known["sinks"] = torch.tensor(known["sinks"], device=DEVICE)
    spec = AttentionSpec(3 * dim**-0.5, **known)
    gathered_triton._SLAB_BYTES = 20 * query[0].numel() * query.element_size() * selection.indices.shape[2]
    out, lse = gathered_triton.prefill(query, view, selection, spec)
    want, want_lse = ops.prefill(query, view, selection, spec, backend="reference")
    unseen = torch.isinf(want_lse)
    return {
        "out": float((out.double() - want.double()).pow(2).mean().sqrt() / want.double().pow(2).mean().sqrt()),
        "lse": float((lse - want_lse)[~unseen].abs().max()),
        "unseen": int(unseen.sum()),
        "unseen_agrees": bool(torch.equal(lse == float("-inf"), unseen) and not out[unseen].any()),
    }


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure("test_moba_triton", seconds=800)


pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("case", GATES)
def test_gate_equals_reference(case, measured):
    got = measured[f"gate-{case}"]
    assert got["counts"]
    assert got["same"] or (got["gap"] < 1e-4 and case != "ties"), (
        f"a block was chosen that is worse by {got['gap']:.1e}"
    )


@pytest.mark.parametrize("case", ATTENTION)
def test_gathered_attention_equals_reference(case, measured):
    got = measured[case]
    assert got["out"] < TOLERANCE[ATTENTION[case][6]], f"out: RMS error {got['out']:.2e} of the reference's RMS"
    assert got["lse"] < 1e-4, f"lse: largest error {got['lse']:.2e}"
    assert got["unseen"] > 0
    assert got["unseen_agrees"], "out = 0 and lse = -inf exactly where the reference sees no key"


def main() -> None:
    teach_interpreter()
    gates = {f"gate-{name}": partial(run_gate, *gate) for name, gate in GATES.items()}
    tell_cases(gates | {name: partial(run_attention, *attention) for name, attention in ATTENTION.items()})


if __name__ == "__main__":
    main()
