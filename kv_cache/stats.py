"""Page statistics: what a scheme asks the pool to keep about the keys or values of each page.

A scheme declares; the pool stores; ``sparse_attn.ops.write_kv`` keeps them right while tokens are
appended. A page's statistics start from ``empty`` whenever its first slot is written, so a freed
and reused page never shows its former owner.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch


class Fold(Enum):
    """How one more token changes a statistic."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"

    @property
    def empty(self) -> float:
        """The value of the statistic over no token."""
        return {Fold.SUM: 0.0, Fold.MIN: float("inf"), Fold.MAX: float("-inf")}[self]

    def reduce(self, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """The statistic over all of ``rows`` along ``dim``."""
        if self is Fold.SUM:
            return rows.sum(dim)
        return rows.amin(dim) if self is Fold.MIN else rows.amax(dim)


@dataclass(frozen=True, slots=True)
class PageStat:
    """One statistic per (layer, page, KV head), a float32 vector of the head dim.

    Equal declarations of two schemes share one tensor.

    Args:
        source: Which rows of the page it is taken over.
        fold: How it is taken.
    """

    source: Literal["key", "value"]
    fold: Fold

    @property
    def name(self) -> str:
        return f"{self.source}_{self.fold.value}"


KEY_SUM = PageStat("key", Fold.SUM)
KEY_MIN = PageStat("key", Fold.MIN)
KEY_MAX = PageStat("key", Fold.MAX)
VALUE_SUM = PageStat("value", Fold.SUM)
