"""Triton kernels of chunks, against their references.

Run by Triton's interpreter, or on a GPU where there is one; see ``script.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from .script import DEVICE, Measured, measure, on_device, tell_cases

# KV heads, head dim, page size, type of the pool, contexts.
VIEWS: dict[str, tuple[int, int, int, str, tuple[int, ...]]] = {
    "d64-g2-page16": (2, 64, 16, "float32", (111, 1, 63)),
    "d80-g1-page64-bf16": (1, 80, 64, "bfloat16", (1000, 5)),
    "d128-g3-page16-f16": (3, 128, 16, "float16", (90, 111)),
    "d256-g1-page32": (1, 256, 32, "float32", (63, 130)),
}
# Window, segment and segments.
CHANGES = {"w4-segments": (4, 32, 4), "w2-one-segment": (2, 1000, 1), "w1": (1, 16, 3)}
# Every view under one change, and every change of one view.
CHANGE_CASES = {
    f"{change}-{view}": (change, view)
    for change in CHANGES
    for view in VIEWS
    if change == "w4-segments" or view == "d64-g2-page16"
}
# Length of rows, distance, threshold.
PICKS = {"short": (1, 0, 0.0), "segment": (63, 8, 0.3), "long": (512, 3, float("-inf")), "sparse": (111, 40, 1.5)}


def make_view(kv_heads: int, dim: int, page: int, dtype: str, contexts: tuple[int, ...]) -> Any:
    from foveate.kv_cache.view import LayerPages, PagedView, Rows

    generator = torch.Generator().manual_seed(0)
    needed = [-(-context // page) for context in contexts]
    keys = torch.full((sum(needed) + 2, kv_heads, page, dim), float("nan"), dtype=getattr(torch, dtype))
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    for table, context in zip(tables, contexts, strict=True):
        for place in range(context):
            keys[table[place // page], :, place % page] = torch.randn(kv_heads, dim, generator=generator)
    rows = Rows.build(tables, list(contexts), [1] * len(contexts), torch.device("cpu"))
    return on_device(PagedView(LayerPages(keys, keys, {}), rows))


def run_sums(name: str) -> float:
    from foveate.sparse_attn.ops import sums

    view, generator = make_view(*VIEWS[name]), torch.Generator().manual_seed(1)
    lengths = torch.tensor(view.rows.host_context_lens)[:, None]
    start = (torch.rand(len(lengths), 9, generator=generator) * lengths).int()
    length = (torch.rand(len(lengths), 9, generator=generator) * (lengths - start + 1)).int()
    length[:, 3] = 0
    start[:, 0], length[:, 0] = 0, lengths[:, 0]
    start, length = start.to(DEVICE), length.to(DEVICE)
    want = sums.chunk_sums(view, start, length, backend="reference")
    return float((sums.chunk_sums(view, start, length, backend="triton") - want).abs().max())


def run_change(name: str, window: int, segment: int, segments: int) -> dict[str, Any]:
    from foveate.sparse_attn.ops.key_change import key_change

    view = make_view(*VIEWS[name])
    want = key_change(view, window, segment, segments, backend="reference")
    got = key_change(view, window, segment, segments, backend="triton")
    known = torch.isfinite(want)
    return {
        "error": float((got - want)[known].abs().max()),
        "same_gaps": bool(torch.equal(torch.isfinite(got), known)),
        "gaps": int(known.sum()),
    }


def run_wide_window() -> bool:
    """A window of which no two fit a segment is not walked: the interpreter would take minutes."""
    from foveate.sparse_attn.ops.key_change import key_change

    scores = key_change(make_view(*VIEWS["d64-g2-page16"]), 2**24, 512, 1, backend="triton")
    return bool(scores.isneginf().all())


def run_pick(length: int, distance: int, threshold: float) -> dict[str, Any]:
    from foveate.sparse_attn.ops.boundaries import pick_boundaries

    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(5, length, generator=generator)
    scores[2] = scores[2].round()  # ties
    scores[3, ::2] = float("-inf")
    # More than 32 bits hold: what a request asks for is up to it.
    scores, limits = scores.to(DEVICE), torch.tensor([length, 3, 2**32, 7, 0], device=DEVICE)
    want = pick_boundaries(scores, limits, threshold, distance, backend="reference")
    got = pick_boundaries(scores, limits, threshold, distance, backend="triton")
    return {"same": bool(torch.equal(got, want)), "picks": int(want.sum())}


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure("test_chunks_triton", seconds=250)


@pytest.mark.parametrize("view", VIEWS)
def test_sums_of_chunks_equal_reference(view, measured):
    assert measured[f"sums-{view}"] < 2e-4


@pytest.mark.parametrize("case", CHANGE_CASES)
def test_change_of_keys_equals_reference(case, measured):
    got = measured[case]
    assert got["same_gaps"]
    assert got["gaps"] > 0
    assert got["error"] < 1e-5


def test_window_that_fits_nowhere_costs_nothing(measured):
    assert measured["wide-window"]


@pytest.mark.parametrize("pick", PICKS)
def test_picked_boundaries_equal_reference(pick, measured):
    assert measured[pick]["same"]
    assert measured[pick]["picks"] > 0


def main() -> None:
    sums = {f"sums-{name}": partial(run_sums, name) for name in VIEWS}
    changes = {case: partial(run_change, view, *CHANGES[change]) for case, (change, view) in CHANGE_CASES.items()}
    wide = {"wide-window": run_wide_window}
    tell_cases(sums | changes | wide | {name: partial(run_pick, *sizes) for name, sizes in PICKS.items()})


if __name__ == "__main__":
    main()
