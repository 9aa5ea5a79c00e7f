"""The Triton kernels that score pages and blocks, run by Triton's interpreter, against the float32 reference.

A script too, for the reason given in ``test_triton_interpreter.py``: it prints one JSON object per case, and the tests
below start it once, in its own process, and judge those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Case:
    """One call of both ops; ``tile`` is the tile of the antidiagonals, ``bound_tile`` that of the page bounds."""

    contexts: tuple[int, ...]
    queries: tuple[int, ...]
    kv_heads: int
    group: int
    dim: int
    page_size: int
    tile: int
    stride: int
    bound_tile: int
    dtype: str = "float32"


CASES = {
    "1": Case((1,), (1,), 1, 1, 64, 16, 16, 4, 1),
    "63-cut-inside-a-run-g3-d80": Case((63,), (38,), 2, 3, 80, 64, 32, 8, 32),
    "111-g7-d128-bf16": Case((111,), (111,), 1, 7, 128, 16, 64, 16, 128, "bfloat16"),
    "1000-and-17-g8-d64-f16": Case((1000, 17), (130, 17), 1, 8, 64, 32, 128, 8, 64, "float16"),
    "decode-1000-3-111-g3": Case((1000, 3, 111), (1, 1, 1), 2, 3, 64, 16, 32, 16, 1),
    "decode-300-g1-d256-bf16": Case((300, 40), (1, 1), 1, 1, 256, 64, 64, 8, 1, "bfloat16"),
    "prefill-300-d256-stride4-packed": Case((300, 64), (77, 64), 1, 2, 256, 16, 128, 4, 16),
}
# Products of 16-bit queries and keys are exact in float32; sums of up to 16 x 256 of them are added in another order.
TOLERANCE = 1e-4


def run(name: str, case: Case) -> dict[str, Any]:
    from paged import Paged

    from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
    from foveate.sparse_attn import ops
    from foveate.sparse_attn.selection import Tiles

    shape = (case.kv_heads, case.group, case.dim, case.page_size)
    world = Paged(case.contexts, *shape, stats=(KEY_MIN, KEY_MAX), dtype=getattr(torch, case.dtype))
    query, view = world.view(case.queries)
    if "packed" in name:  # a view into a packed QKV row
        query = torch.cat([query, query], dim=1)[:, : query.shape[1]]
    tiles = Tiles.of(view.rows, case.bound_tile)
    bounds, wanted_bounds = (ops.page_bounds(query, view, tiles, backend=b) for b in ("triton", "reference"))
    tiles = Tiles.of(view.rows, case.tile)
    scale = 3 * case.dim**-0.5
    shares, wanted_shares = (
        ops.antidiagonal_scores(query, view, tiles, case.stride, scale, backend=b) for b in ("triton", "reference")
    )
    used = ~torch.isinf(wanted_bounds)
    return {
        "bounds": float((bounds - wanted_bounds)[used].abs().max() / wanted_bounds[used].abs().max()),
        "unused": bool(torch.equal(torch.isinf(bounds), ~used)),
        "shares": float((shares - wanted_shares).abs().max()),
        "spread": float(wanted_shares.std(correction=0)),
        "shapes": [list(bounds.shape) == list(wanted_bounds.shape), list(shares.shape) == list(wanted_shares.shape)],
    }


def run_slabs() -> bool:
    """Tiles handled a few at a time give what they give together."""
    from paged import Paged

    from foveate.sparse_attn.ops import antidiagonal_triton
    from foveate.sparse_attn.selection import Tiles

    query, view = Paged((150, 40)).view((150, 40))
    arguments = (query, view, Tiles.of(view.rows, 32), 8, 1.0)
    whole = antidiagonal_triton.antidiagonal_scores(*arguments)
    antidiagonal_triton._SLAB_SCORES = 3 * 4 * 4 * 5  # three tiles of four heads, four runs, five blocks
    return bool(torch.equal(antidiagonal_triton.antidiagonal_scores(*arguments), whole))


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {entry.pop("case"): entry for entry in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_page_bounds_equal_reference(name, measured):
    got = measured[name]
    assert got["bounds"] < TOLERANCE, f"largest error {got['bounds']:.2e} of the largest bound"
    assert got["unused"], "-inf exactly where a page holds no key of the sequence"
    assert got["shapes"][0]


@pytest.mark.parametrize("name", CASES)
def test_antidiagonal_scores_equal_reference(name, measured):
    got = measured[name]
    assert got["shares"] < TOLERANCE, f"largest error {got['shares']:.2e}"
    assert got["spread"] > 0.05 or name == "1", "scores that are all alike would hide a wrong key"
    assert got["shapes"][1]


def test_slabs_change_nothing(measured):
    assert measured["slabs"]["same"]


def main() -> None:
    from test_triton_interpreter import teach_bfloat16_products

    teach_bfloat16_products()
    for name, case in CASES.items():
        print(json.dumps({"case": name, **run(name, case)}), flush=True)
    print(json.dumps({"case": "slabs", "same": run_slabs()}), flush=True)


if __name__ == "__main__":
    main()
