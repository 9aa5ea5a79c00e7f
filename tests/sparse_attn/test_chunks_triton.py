"""Triton kernels of chunks, run by the interpreter on a CPU, against their references.

Triton reads ``TRITON_INTERPRET`` when it is first imported, so this file is also a script: it prints one JSON object
per case, and the tests below start it once, in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
    return PagedView(LayerPages(keys, keys, {}), rows)


def run_sums(view: Any) -> float:
    from foveate.sparse_attn.ops import sums

    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(view.rows.host_context_lens)[:, None]
    start = (torch.rand(len(lengths), 9, generator=generator) * lengths).int()
    length = (torch.rand(len(lengths), 9, generator=generator) * (lengths - start + 1)).int()
    length[:, 3] = 0
    start[:, 0], length[:, 0] = 0, lengths[:, 0]
    want = sums.chunk_sums(view, start, length, backend="reference")
    return float((sums.chunk_sums(view, start, length, backend="triton") - want).abs().max())


def run_change(view: Any, window: int, segment: int, segments: int) -> dict[str, Any]:
    from foveate.sparse_attn.ops.key_change import key_change

    want = key_change(view, window, segment, segments, backend="reference")
    got = key_change(view, window, segment, segments, backend="triton")
    known = torch.isfinite(want)
    return {
        "error": float((got - want)[known].abs().max()),
        "same_gaps": bool(torch.equal(torch.isfinite(got), known)),
        "gaps": int(known.sum()),
    }


def run_pick(length: int, distance: int, threshold: float) -> dict[str, Any]:
    from foveate.sparse_attn.ops.boundaries import pick_boundaries

    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(5, length, generator=generator)
    scores[2] = scores[2].round()  # ties
    scores[3, ::2] = float("-inf")
    limits = torch.tensor([length, 3, length, 7, 0])
    want = pick_boundaries(scores, limits, threshold, distance, backend="reference")
    got = pick_boundaries(scores, limits, threshold, distance, backend="triton")
    return {"same": bool(torch.equal(got, want)), "picks": int(want.sum())}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What the interpreter made of every case, by name."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize("view", VIEWS)
def test_sums_of_chunks_equal_reference(view, measured):
    assert measured[f"sums-{view}"] < 2e-4


@pytest.mark.parametrize("case", CHANGE_CASES)
def test_change_of_keys_equals_reference(case, measured):
    got = measured[case]
    assert got["same_gaps"]
    assert got["gaps"] > 0
    assert got["error"] < 1e-5


@pytest.mark.parametrize("pick", PICKS)
def test_picked_boundaries_equal_reference(pick, measured):
    assert measured[pick]["same"]
    assert measured[pick]["picks"] > 0


def main() -> None:
    for name, arguments in VIEWS.items():
        view = make_view(*arguments)
        print(json.dumps([f"sums-{name}", run_sums(view)]), flush=True)
        for case, (change, of) in CHANGE_CASES.items():
            if of == name:
                print(json.dumps([case, run_change(view, *CHANGES[change])]), flush=True)
    for name, sizes in PICKS.items():
        print(json.dumps([name, run_pick(*sizes)]), flush=True)


if __name__ == "__main__":
    main()
