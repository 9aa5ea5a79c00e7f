"""Numbers that a report gives: percentiles, shares, growth. Plain arithmetic, without the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the others lie, linear between neighbours.

    Raises:
        ValueError: there are no values, or ``share`` is not from 0 to 1.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"no percentile {share} of {len(values)} values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99 and the largest; ``None`` of nothing."""
    if not values:
        return None
    return {
        "p50": percentile(values, 0.5),
        "p90": percentile(values, 0.9),
        "p99": percentile(values, 0.99),
        "max": max(values),
    }


def shares(parts: Mapping[str, float], total: float) -> dict[str, float]:
    """Parts of ``total`` as shares of it, and what is left over as ``rest``; they add up to 1."""
    found = {part: seconds / total for part, seconds in parts.items()}
    return {**found, "rest": 1 - sum(found.values())}


def growth(shorter: int, seconds: float, longer: int, more_seconds: float) -> float:
    """The power of the length that time grows by between two lengths: 1 is linear, 2 quadratic."""
    return math.log(more_seconds / seconds) / math.log(longer / shorter)
