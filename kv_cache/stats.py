"""Page statistics: what a scheme asks the pool to keep about the keys or values of each page, or of runs in it.

A scheme declares; the pool stores; ``sparse_attn.ops.write_kv`` keeps them right while tokens are
appended. A page's statistics start from ``empty`` whenever its first slot is written, and those of a
run when its own is, so a freed and reused page never shows its former owner.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

from .geometry import CacheGeometry


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
    """One statistic per (layer, page, KV head), a float32 vector of the head dim; or one per run of tokens in it.

    Equal declarations of two schemes share one tensor.

    Args:
        source: Which rows of the page it is taken over.
        fold: How it is taken.
        run_tokens: Tokens of each run, of which a page holds a whole number; 0: the page is one.
    """

    source: Literal["key", "value"]
    fold: Fold
    run_tokens: int = 0

    @property
    def name(self) -> str:
        return f"{self.source}_{self.fold.value}" + (f"_{self.run_tokens}" if self.run_tokens else "")

    def shape(self, geometry: CacheGeometry) -> tuple[int, ...]:
        """``(L, P, G, D)``, or ``(L, P, G, R, D)`` with R runs in a page.

        Raises:
            ValueError: a page does not hold a whole number of runs.
        """
        runs, rest = divmod(geometry.page_size, self.run_tokens or geometry.page_size)
        if rest:
            raise ValueError(f"pages of {geometry.page_size} tokens do not hold whole runs of {self.run_tokens}")
        within = (runs,) if self.run_tokens else ()
        return (geometry.num_layers, geometry.num_pages, geometry.num_kv_heads, *within, geometry.head_dim)


KEY_SUM = PageStat("key", Fold.SUM)
KEY_SUM_16 = PageStat("key", Fold.SUM, run_tokens=16)
KEY_MIN = PageStat("key", Fold.MIN)
KEY_MAX = PageStat("key", Fold.MAX)
VALUE_SUM = PageStat("value", Fold.SUM)
