"""The Triton kernel of ``top_units``, against torch's.

Run by Triton's interpreter, or on a GPU where there is one; see ``script.py``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from .script import DEVICE, Measured, measure, tell_cases

# Rows, kinds, units; how many of a row; how many at most; where candidates come from; which of equal ones; scores.
CASES: dict[str, tuple[int, int, int, int | list[int], int | None, str, str, str]] = {
    "one-unit": (1, 1, 1, 1, None, "range", "lower", "normal"),
    "few": (3, 2, 17, 5, None, "range", "lower", "normal"),
    "per-row": (4, 2, 300, [0, 7, 299, 40], 299, "range", "lower", "normal"),
    "more-than-there-are": (3, 1, 64, 100, None, "range", "higher", "normal"),
    "mask-ties-lower": (5, 3, 700, 50, None, "mask", "lower", "rounded"),
    "mask-ties-higher": (5, 3, 700, 50, None, "mask", "higher", "rounded"),
    "mask-per-kind": (2, 4, 130, [9, 3], 9, "kinds", "lower", "rounded"),
    "all-equal": (2, 2, 999, 10, None, "range", "higher", "zeros"),
    "several-blocks": (2, 2, 20000, [2000, 1], 2000, "range", "lower", "shares"),
    "several-blocks-ties": (1, 2, 17000, 1234, None, "mask", "higher", "rounded"),
    "extremes": (2, 1, 90, 30, None, "range", "lower", "extremes"),
}
EXTREMES = [-float("inf"), -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3e38, float("inf")]


def run(
    rows: int, kinds: int, units: int, k: int | list[int], most: int | None, given: str, ties: Any, kind: str
) -> dict[str, Any]:
    from foveate.sparse_attn.ops.topk import top_units

    generator = torch.Generator().manual_seed(0)
    shape = rows, kinds, units
    scores = {
        "normal": lambda: torch.randn(shape, generator=generator),
        "rounded": lambda: torch.randn(shape, generator=generator).round(),
        "zeros": lambda: torch.zeros(shape),
        "shares": lambda: torch.rand(shape, generator=generator) ** 40,
        "extremes": lambda: torch.tensor(EXTREMES)[torch.randint(10, shape, generator=generator)],
    }[kind]()
    candidates: Any
    if given == "range":
        first = torch.arange(rows, dtype=torch.int32) * 3 % units
        candidates = first.to(DEVICE), torch.full((rows,), units, dtype=torch.int32, device=DEVICE)
    else:
        mask = torch.rand(shape, generator=generator) < 0.5
        candidates = (mask if given == "kinds" else mask[:, 0]).to(DEVICE)
    limits = torch.tensor(k, device=DEVICE) if isinstance(k, list) else k
    got, want = (
        top_units(scores.to(DEVICE), candidates, limits, most=most, ties=ties, backend=backend)
        for backend in ("triton", "torch")
    )
    return {"same": [bool(torch.equal(a, b)) for a, b in zip(got, want, strict=True)], "chosen": int(want[1].sum())}


@pytest.fixture(scope="module")
def measured() -> Measured:
    return measure("test_topk_triton", seconds=250)


@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name, measured):
    assert measured[name]["same"] == [True, True]
    assert measured[name]["chosen"] > 0


def main() -> None:
    tell_cases({name: partial(run, *case) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
