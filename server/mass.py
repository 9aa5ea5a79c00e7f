"""How the attention mass that audited selections kept is spread."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

# Upper bounds; what matters lies close to 1.
BOUNDS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class MassHistogram:
    """One value per audited token: the mean over the heads and layers that were measured.

    Attributes:
        counts: Tokens up to each of ``BOUNDS``, the lower ones not counted in.
        total: Sum of the values.
    """

    counts: tuple[int, ...] = (0,) * len(BOUNDS)
    total: float = 0.0

    def plus(self, mass: float) -> MassHistogram:
        """This and one more token."""
        place = bisect_left(BOUNDS, mass)
        counts = tuple(count + (index == place) for index, count in enumerate(self.counts))
        return MassHistogram(counts, self.total + mass)
