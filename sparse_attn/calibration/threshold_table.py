"""Thresholds by layer, head, number of candidates and budget: what ``top_theta`` learns, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ProfileError
from ..profile import Profile

# One table is of all visible keys, as in the paper; the other of those that sinks and window do not keep anyway.
VARIANTS = ("all", "free")
# Number of candidates at which thresholds are worked out before a run: four points per octave.
_POINTS = [2 ** (step / 4) for step in range(12, 85)]


@dataclass(frozen=True, slots=True, eq=False)
class ThresholdTable:
    """
    Attributes:
        layers: The N attention layers it knows.
        sizes: ``[P]`` numbers of candidates, ascending.
        budgets: ``[K]`` numbers of candidates above the threshold, ascending.
        theta: ``[N, H, P, K]`` float32 logits.
        expected: ``[N, H, P, K]`` float32, natural log of the sum of ``exp(logit - largest)`` over the
            candidates that are not above it.
    """

    layers: tuple[int, ...]
    sizes: torch.Tensor
    budgets: torch.Tensor
    theta: torch.Tensor
    expected: torch.Tensor

    def tensors(self, variant: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Tensors of a profile that holds it."""
        return {
            "layers": torch.tensor(self.layers, dtype=torch.int32),
            "budgets": self.budgets.to(torch.int32),
            f"{variant}.sizes": self.sizes.to(torch.int32),
            f"{variant}.theta": self.theta.to(dtype),
            f"{variant}.expected": self.expected.to(dtype),
        }

    @classmethod
    def of(cls, profile: Profile, variant: str) -> ThresholdTable:
        """
        Raises:
            ProfileError: the profile does not hold this table.
        """
        held = profile.tensors
        missing = {"layers", "budgets", *(f"{variant}.{name}" for name in ("sizes", "theta", "expected"))} - set(held)
        if missing:
            raise ProfileError(f"the profile for {profile.scheme} lacks {', '.join(sorted(missing))}: calibrate again")
        table = cls(
            tuple(held["layers"].tolist()),
            held[f"{variant}.sizes"],
            held["budgets"],
            held[f"{variant}.theta"].float(),
            held[f"{variant}.expected"].float(),
        )
        shape = (len(table.layers), table.theta.shape[1], len(table.sizes), len(table.budgets))
        if table.theta.shape != shape or table.expected.shape != shape:
            raise ProfileError(f"the profile for {profile.scheme} is malformed: thresholds {tuple(table.theta.shape)}")
        return table

    def points(self) -> torch.Tensor:
        """``[M]`` numbers of candidates, ascending, fine enough to interpolate between: its own among them."""
        return torch.tensor(sorted({*_POINTS, *map(float, self.sizes.tolist())}))

    def at(self, points: torch.Tensor, budget: int) -> Mapping[str, torch.Tensor]:
        """Both tables for one budget at ``points [M]``: ``[N, H, M]`` each.

        Linear in the logarithms of candidates and budget. Outside the sizes that were seen, and
        above the largest budget, it takes the same *share* at the nearest size (budget): scores are
        spread alike in rows of like length, so their quantiles move little.
        """
        most = float(self.budgets[-1])
        scale = min(1.0, most / budget)
        size = points.double() * scale
        near = size.clamp(float(self.sizes[0]), float(self.sizes[-1]))
        wanted = (budget * scale * near / size).clamp(float(self.budgets[0]), most)
        row, across = _place(self.sizes.double().log(), near.log())
        column, along = _place(self.budgets.double().log(), wanted.log())
        # What is left out grows with the number of candidates, at the same share.
        growth = (points.double() / near).log().float()
        return {
            "theta": _between(self.theta, row, across, column, along),
            "expected": _between(self.expected, row, across, column, along) + growth,
        }


def _place(grid: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid interval of each value, and how far into it: 0 to 1."""
    if len(grid) == 1:
        return torch.zeros_like(at, dtype=torch.int64), torch.zeros_like(at)
    low = (torch.searchsorted(grid, at, right=True) - 1).clamp(0, len(grid) - 2)
    return low, (at - grid[low]) / (grid[low + 1] - grid[low])


def _between(
    table: torch.Tensor, row: torch.Tensor, across: torch.Tensor, column: torch.Tensor, along: torch.Tensor
) -> torch.Tensor:
    next_row, next_column = (row + 1).clamp(max=table.shape[2] - 1), (column + 1).clamp(max=table.shape[3] - 1)
    table = table.double()
    upper = torch.lerp(table[:, :, row, column], table[:, :, row, next_column], along)
    lower = torch.lerp(table[:, :, next_row, column], table[:, :, next_row, next_column], along)
    return torch.lerp(upper, lower, across).float()
