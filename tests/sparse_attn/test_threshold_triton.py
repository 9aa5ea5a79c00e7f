"""The Triton kernels of score thresholds, against the float32 reference.

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
from foveate.kv_cache.stats import VALUE_SUM
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops.reference import visible_mask
from foveate.sparse_attn.ops.tiling import Tiling
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band, ScoreThreshold

from .interpreter import teach_interpreter
from .script import DEVICE, INTERPRETED, Measured, measure, on_device, tell_cases

# RMS error over RMS of the reference; see test_attention_triton.py for what 16 bits cost there.
TOLERANCE = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 5e-3}
# Few large steps for the interpreter, which pays per step, not per element.
WIDE = Tiling(rows=128, keys=128, num_warps=4, num_stages=1)
NARROW = Tiling(rows=16, keys=128, num_warps=4, num_stages=1)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One call; ``tail`` tokens stand behind each sequence's last query, as a dense tail in the same step would."""

    contexts: tuple[int, ...]
    queries: tuple[int, ...]
    kv_heads: int = 2
    group: int = 1
    dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    tail: int = 0
    dropped_sum: str = "exact"
    scale: float = 1.0
    value_mean: bool = False
    plan: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    tiling: Tiling | None = None
    splits: int | None = None


def prefill(*contexts: int, queries: tuple[int, ...] = (), **rest: Any) -> Case:
    return Case(contexts, queries or contexts, **{"tiling": WIDE, **rest})


def decode(*contexts: int, **rest: Any) -> Case:
    return Case(contexts, (1,) * len(contexts), **{"tiling": NARROW, **rest})


CHUNKS: dict[str, Any] = {"queries": (30, 16, 111)}
SINKS = [0.5, -2.0, 100.0, 1.0, 0.0, 3.0]
CASES = {
    "prefill-1": prefill(1, tiling=None, value_mean=True),
    "prefill-63-g3-d80-mean": prefill(63, group=3, dim=80, page_size=64, value_mean=True),
    "prefill-111-g7-d128-bf16-union": prefill(
        111, kv_heads=1, group=7, dim=128, dtype="bfloat16", tiling=None, plan={"union": True}
    ),
    "prefill-111-g8-d256-f16-bound": prefill(
        111, kv_heads=1, group=8, dim=256, dtype="float16", dropped_sum="bound", scale=0.3, tiling=None
    ),
    "prefill-1000": prefill(1000, kv_heads=1, page_size=64, value_mean=True),
    "prefill-chunks-g3-union-sinks-tail": prefill(
        130, 17, 300, **CHUNKS, group=3, tail=5, value_mean=True, plan={"union": True}, facts={"sinks": SINKS}
    ),
    "prefill-chunks-window-always-read": prefill(
        130, 17, 300, **CHUNKS, facts={"band": Band(0, 37)}, plan={"sink_tokens": 100, "recent_tokens": 3}
    ),
    "prefill-chunks-ring-softcap-given": prefill(
        130, 17, 200, **CHUNKS, dropped_sum="given", facts={"band": Band(5, 60), "softcap": 3.0}
    ),
    "prefill-chunks-none-always-read": prefill(
        130, 17, 200, **CHUNKS, group=3, dropped_sum="none", plan={"sink_tokens": 5, "recent_tokens": 20}
    ),
    "decode-1": decode(1, group=3, tiling=None, value_mean=True),
    "decode-lengths-g8-d128-bf16-mean": decode(
        15, 16, 17, 1000, group=8, dim=128, dtype="bfloat16", tiling=None, value_mean=True
    ),
    "decode-d256-g3-softcap-f16": decode(
        63, 600, group=3, dim=256, page_size=64, dtype="float16", facts={"softcap": 2.0}
    ),
    "decode-d80-g7-sinks-splits": decode(
        1000, 3, kv_heads=1, group=7, dim=80, tail=3, value_mean=True, splits=4,
        facts={"sinks": [100.0, 1.0, 100.0, 1.0, 100.0, 1.0, -9.0]},
    ),
    "decode-page128-splits-mean": decode(300, 128, 129, 1000, page_size=128, value_mean=True, splits=8, tail=40),
    "decode-window-always-read": decode(
        1000, 3, 200, group=3, facts={"band": Band(0, 37)}, plan={"sink_tokens": 5, "recent_tokens": 3}, splits=2
    ),
    "decode-behind-window-nothing-seen": decode(5, 700, group=3, facts={"band": Band(20, None)}, splits=2),
    "decode-union-bound": decode(
        700, 33, group=3, dropped_sum="bound", scale=0.3, plan={"union": True}, value_mean=True, splits=2
    ),
    "decode-given-always-read": decode(
        700, 33, group=3, dropped_sum="given", plan={"sink_tokens": 4, "recent_tokens": 20}, value_mean=True, splits=2
    ),
    "decode-none": decode(700, 33, group=3, dropped_sum="none", splits=2),
}  # fmt: skip


def make_view(case: Case) -> PagedView:
    """A pool of NaN with random rows where sequences have tokens, pages in shuffled order."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-(context + case.tail) // case.page_size) for context in case.contexts]
    geometry = CacheGeometry(1, case.kv_heads, case.dim, case.page_size, sum(needed) + 3, getattr(torch, case.dtype))
    pool = PagePool(geometry, (VALUE_SUM,))
    pool.keys.fill_(float("nan"))
    pool.values.fill_(float("nan"))
    order = torch.randperm(sum(needed) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    size = case.page_size
    for pages, context in zip(tables, case.contexts, strict=True):
        slots = torch.tensor([pages[i // size] * size + i % size for i in range(context + case.tail)])
        rows = torch.randn(2, len(slots), case.kv_heads, case.dim, generator=generator).to(geometry.dtype)
        ops.write_kv(rows[0], rows[1], pool.layer(0), slots, backend="torch")
    return on_device(PagedView(pool.layer(0), Rows.build(tables, list(case.contexts), list(case.queries), CPU)))


def make_plan(case: Case, query: torch.Tensor, view: PagedView, spec: AttentionSpec) -> ScoreThreshold:
    """Thresholds in the widest gap among each query's 3rd to 15th logit, where rounding decides nothing.

    Every seventh query reads all, every eleventh nothing.
    """
    theta, start = torch.zeros(query.shape[:2], device=DEVICE), 0
    for sequence, visible in enumerate(visible_mask(view, None, spec, query.shape[1])):
        count, context = visible.shape[1:]
        pages = torch.tensor(view.rows.host_block_tables[sequence], device=DEVICE)
        keys = view.pages.keys[pages].transpose(0, 1).flatten(1, 2)[:, :context].repeat_interleave(case.group, 0)
        logits = torch.einsum("qhd,hkd->hqk", query[start : start + count].float(), keys.float()) * spec.scale
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        top = logits.masked_fill(~visible, -30.0).sort(-1, descending=True).values[..., 2:15]
        if top.shape[-1] > 1:
            gap = (top[..., :-1] - top[..., 1:]).argmax(-1, keepdim=True)
            theta[start : start + count] = ((top.gather(-1, gap) + top.gather(-1, gap + 1)) / 2)[..., 0].T
        start += count
    if case.dropped_sum != "bound":
        theta[5::11] = 1e4
    theta[::7] = float("-inf") if len(theta) > 7 else theta[::7]
    given = 3 * torch.rand(theta.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    expected = given if case.dropped_sum == "given" else None
    return ScoreThreshold(theta, case.dropped_sum, case.scale, expected, case.value_mean, **case.plan)


def run(case: Case) -> dict[str, Any]:
    from foveate.sparse_attn.ops import threshold_decode_triton, threshold_prefill_triton

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
    plan = make_plan(case, query, view, spec)
    if all(count == 1 for count in case.queries):
        got = threshold_decode_triton.decode(query, view, plan, spec, case.tiling if INTERPRETED else None, case.splits)
    else:
        got = threshold_prefill_triton.prefill(query, view, plan, spec, case.tiling if INTERPRETED else None)
    want = ops.thresholded(query, view, plan, spec, backend="reference")
    nothing = torch.isinf(want[1])
    return {
        "out": rms(got[0].double() - want[0].double()) / rms(want[0].double()),
        "lse": float((got[1] - want[1])[~nothing].abs().max()),
        "nothing": int(nothing.sum()),
        "nothing_agrees": bool(torch.equal(torch.isinf(got[1]), nothing)),
        "kept": bool(torch.equal(got[2], want[2])),
        "share": float(want[2].sum() / sum(m.sum() for m in visible_mask(view, None, spec, shape[1]))),
        "dtypes": [str(part.dtype) for part in got],
    }


def run_unread_values() -> dict[str, Any]:
    """Values that no head keeps are poisoned: reading one, even at weight zero, would show."""
    from foveate.sparse_attn.ops import threshold_decode_triton

    case = decode(700, group=3, kv_heads=2)
    view = make_view(case)
    query = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    spec = AttentionSpec(3 * 64**-0.5)
    plan = ScoreThreshold(torch.full((1, 6), 6.0, device=DEVICE), "exact")
    want = ops.thresholded(query, view, plan, spec, backend="reference")
    pages = torch.tensor(view.rows.host_block_tables[0], device=DEVICE)
    keys = view.pages.keys[pages].transpose(0, 1).flatten(1, 2)[:, :700]
    kept = (torch.einsum("grd,gkd->grk", query.view(2, 3, 64), keys) * spec.scale > 6.0).any(1)
    for head, position in (~kept).nonzero().tolist():
        view.pages.values[pages[position // 16], head, position % 16] = float("nan")
    got = threshold_decode_triton.decode(query, view, plan, spec, splits=2)
    return {"out": rms(got[0] - want[0]) / rms(want[0]), "share": float(kept.float().mean())}


def run_not_a_number() -> dict[str, Any]:
    """Which outputs are NaN where a key is."""
    told = {}
    for name, case in {"prefill": prefill(70, queries=(40,)), "decode": decode(70)}.items():
        view = make_view(case)
        heads = case.kv_heads * case.group
        query = torch.randn(view.rows.num_queries, heads, case.dim, generator=torch.Generator().manual_seed(1)).to(
            DEVICE
        )
        view.pages.keys[view.rows.host_block_tables[0][60 // view.page_size], :, 60 % view.page_size] = float("nan")
        plan = ScoreThreshold(torch.full(query.shape[:2], 1.0, device=DEVICE), "exact")
        parts = [
            ops.thresholded(query, view, plan, AttentionSpec(0.5), backend=kind) for kind in ("triton", "reference")
        ]
        told[name] = all(
            torch.equal(got.isnan(), want.isnan()) for got, want in zip(*(p[:2] for p in parts), strict=True)
        )
        told[name] &= bool(parts[1][0].isnan().any())
    return told


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.pow(2).mean().sqrt())


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure("test_threshold_triton", seconds=900)


pytestmark = pytest.mark.timeout(1000)


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_reference(name, measured):
    case, got = CASES[name], measured[name]
    assert got["out"] < TOLERANCE[case.dtype], f"out: RMS error {got['out']:.2e} of the reference's RMS"
    assert got["lse"] < 1e-4, f"lse: largest error {got['lse']:.2e}"
    assert got["nothing_agrees"], "lse = -inf exactly where the reference reads no key"
    assert got["kept"], "other numbers of keys are read"
    assert got["dtypes"] == [f"torch.{case.dtype}", "torch.float32", "torch.int32"]


def test_cases_leave_keys_out_and_some_queries_read_nothing(measured):
    assert sum(measured[name]["share"] < 0.5 for name in CASES) > len(CASES) // 2
    nothing = [name for name in CASES if measured[name]["nothing"]]
    assert any(name.startswith("prefill") for name in nothing)
    assert any(name.startswith("decode") for name in nothing)


def test_values_that_no_head_keeps_are_not_read(measured):
    assert measured["unread-values"]["share"] < 0.2
    assert measured["unread-values"]["out"] < 1e-5


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_key_that_is_not_a_number_is_told(phase, measured):
    """By every query that sees it and by no other: it is above no threshold, but it must not be lost."""
    assert measured["not-a-number"][phase]


def main() -> None:
    teach_interpreter()
    tell_cases(
        {name: partial(run, case) for name, case in CASES.items()}
        | {"unread-values": run_unread_values, "not-a-number": run_not_a_number}
    )


if __name__ == "__main__":
    main()
