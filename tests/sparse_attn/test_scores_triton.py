"""The Triton kernels that score pages and blocks, against the float32 reference.

Run by Triton's interpreter, or on a GPU where there is one; see ``script.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from .interpreter import teach_interpreter
from .script import DEVICE, Measured, measure, on_device, tell_cases


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
    from foveate.kv_cache.stats import KEY_MAX, KEY_MIN
    from foveate.sparse_attn import ops
    from foveate.sparse_attn.selection import Tiles

    from .paged import Paged

    shape = (case.kv_heads, case.group, case.dim, case.page_size)
    world = Paged(case.contexts, *shape, stats=(KEY_MIN, KEY_MAX), dtype=getattr(torch, case.dtype))
    query, view = world.view(case.queries)
    query, view = query.to(DEVICE), on_device(view)
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
    from foveate.sparse_attn.ops import antidiagonal_triton
    from foveate.sparse_attn.selection import Tiles

    from .paged import Paged

    query, view = Paged((150, 40)).view((150, 40))
    query, view = query.to(DEVICE), on_device(view)
    arguments = (query, view, Tiles.of(view.rows, 32), 8, 1.0)
    whole = antidiagonal_triton.antidiagonal_scores(*arguments)
    antidiagonal_triton._SLAB_SCORES = 3 * 4 * 4 * 5  # three tiles of four heads, four runs, five blocks
    return bool(torch.equal(antidiagonal_triton.antidiagonal_scores(*arguments), whole))


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure("test_scores_triton", seconds=300)


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
    assert measured["slabs"]


def main() -> None:
    teach_interpreter()
    tell_cases({name: partial(run, name, case) for name, case in CASES.items()} | {"slabs": run_slabs})


if __name__ == "__main__":
    main()
