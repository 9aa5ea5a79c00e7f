"""The two formats in which a scheme says which keys are read: a selection, or thresholds on the scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from foveate.kv_cache.view import Rows


@dataclass(frozen=True, slots=True)
class Band:
    """Distances at which a key is visible: query ``i`` sees key ``j`` iff ``nearest <= i - j < farthest``.

    ``Band()`` is causal attention; ``Band(0, w)`` the sliding window of w keys, the query's own
    among them; ``Band(w, None)`` all that lies behind that window.
    """

    nearest: int = 0
    farthest: int | None = None

    def within(self, other: Band) -> Band:
        """The intersection of two bands."""
        ends = [end for end in (self.farthest, other.farthest) if end is not None]
        return Band(max(self.nearest, other.nearest), min(ends) if ends else None)

    def visible(self, position: int) -> int:
        """Number of keys that a query at ``position`` sees."""
        first = 0 if self.farthest is None else max(0, position - self.farthest + 1)
        return max(0, position - self.nearest + 1 - first)


CAUSAL = Band()


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Runs of queries that share one selection row, cut at multiples of ``size`` in *position*.

    Cutting by position and not by place in the chunk makes a selection the same however a prompt
    is chunked. The first and last tile of a chunk may be partial.

    Attributes:
        size: Queries per full tile (1 in decode).
        sequence: ``[R]`` int32, the sequence a tile belongs to.
        query_start: ``[R]`` int32, its first query in the packed row.
        query_count: ``[R]`` int32.
        position: ``[R]`` int32, the position of its first query.
        host: The same four numbers per tile on the host.
        step: From one query of a tile to the next, in rows and in positions; only anchor scores take other than 1.
        plans: What was worked out from these tiles for one layer, kept for the other layers of the step.
    """

    size: int
    sequence: torch.Tensor
    query_start: torch.Tensor
    query_count: torch.Tensor
    position: torch.Tensor
    host: tuple[tuple[int, int, int, int], ...]
    step: int = 1
    plans: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Rows, size: int) -> Tiles:
        """Cuts the queries of ``rows`` into tiles of ``size`` positions."""
        host = []
        start = 0
        for sequence, (context, count) in enumerate(zip(rows.host_context_lens, rows.host_query_lens, strict=True)):
            position, end = context - count, context
            while position < end:
                length = min((position // size + 1) * size, end) - position
                host.append((sequence, start, length, position))
                start += length
                position += length
        table = torch.tensor(host, dtype=torch.int32).reshape(-1, 4)
        table = table.to(rows.block_tables.device, non_blocking=True)
        owner, query_start, query_count, first = (column.contiguous() for column in table.unbind(1))
        return cls(size, owner, query_start, query_count, first, tuple(host))

    def every(self, step: int) -> Tiles:
        """The same tiles with every ``step``-th query alone, counted back from their last; of tiles of step 1."""
        if ("every", step) in self.plans:
            found: Tiles = self.plans["every", step]
            return found
        cut = (self.query_count - 1) % step
        host = tuple(
            (sequence, start + (length - 1) % step, (length - 1) // step + 1, position + (length - 1) % step)
            for sequence, start, length, position in self.host
        )
        counts = torch.div(self.query_count - 1, step, rounding_mode="floor") + 1
        some = Tiles(self.size, self.sequence, self.query_start + cut, counts, self.position + cut, host, step)
        self.plans["every", step] = some
        return some

    @property
    def ends(self) -> list[int]:
        """Per tile, one more than the position of its last query."""
        return [position + (count - 1) * self.step + 1 for _, _, count, position in self.host]

    def __len__(self) -> int:
        return len(self.host)


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """A choice of single keys by exact scores alone: what ``ops.pooled_topk`` takes beside queries, for R tiles.

    Attributes:
        candidates: ``(first, end)`` ``[R]`` int32, as ``budget.free_units`` makes them.
        budgets: Keys to choose per tile, R numbers on the host.
        pool: ``group``: each KV head chooses for itself; ``all``: all of them together.
    """

    candidates: tuple[torch.Tensor, torch.Tensor]
    budgets: tuple[int, ...]
    pool: Literal["group", "all"]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Keys that each tile of queries reads.

    Attributes:
        indices: ``[R, G or H, M]`` int32, ascending logical units (``position // granularity``),
            padded by -1 at the end. Logical indices survive page moves; kernels translate them
            through the block table.
        counts: ``[R, G or H]`` int32, valid entries per row.
        granularity: Tokens per index: a power of two, of the page's size, smaller or larger.
        tiles: Which queries each of the R rows stands for.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    granularity: int
    tiles: Tiles

    def validate(self, rows: Rows) -> None:
        """Checks the format; meant for tests and for scheme authors.

        Raises:
            ValueError: naming the first rule that is broken.
        """
        width = self.indices.shape[2]
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise ValueError("indices and counts must be int32")
        if self.indices.shape[0] != len(self.tiles) or self.counts.shape != self.indices.shape[:2]:
            raise ValueError("one row of indices and counts per tile")
        valid = torch.arange(width, device=self.indices.device) < self.counts[..., None]
        if not torch.equal(valid, self.indices >= 0):
            raise ValueError("the first `counts` entries are indices and the rest is -1")
        if width > 1:
            ascending = self.indices[..., 1:] > self.indices[..., :-1]
            if not bool((ascending | ~valid[..., 1:]).all()):
                raise ValueError("indices must ascend")
        last = (self.tiles.position + self.tiles.query_count - 1) // self.granularity
        if bool((self.indices > last[:, None, None]).any()):
            raise ValueError("an index lies behind the tile's last query")

    def to_mask(self, rows: Rows) -> torch.Tensor:
        """Bool ``[R, heads, max context]``: the keys named, causality not applied."""
        longest = max(rows.host_context_lens, default=0)
        units = -(-longest // self.granularity)
        mask = torch.zeros(*self.indices.shape[:2], units + 1, dtype=torch.bool, device=self.indices.device)
        slots = torch.where(self.indices >= 0, self.indices, units).long()
        mask.scatter_(2, slots, True)
        return mask[..., :units].repeat_interleave(self.granularity, dim=2)[..., :longest]

    @classmethod
    def from_mask(cls, mask: torch.Tensor, granularity: int, tiles: Tiles) -> Selection:
        """From a bool mask over units ``[R, heads, U]``; the inverse of ``to_mask`` up to rounding to units."""
        counts = mask.sum(-1, dtype=torch.int32)
        width = int(counts.max()) if counts.numel() else 0
        order = torch.sort((~mask).to(torch.int8), dim=-1, stable=True).indices[..., : max(width, 1)].to(torch.int32)
        valid = torch.arange(order.shape[-1], device=mask.device) < counts[..., None]
        return cls(torch.where(valid, order, -1), counts, granularity, tiles)


@dataclass(frozen=True, slots=True, eq=False)
class ScoreThreshold:
    """Keys chosen inside the kernel, by their own score: the second and last kind of plan.

    A key is read iff its logit (scaled and capped) exceeds the query's threshold, or it is among
    the first ``sink_tokens`` or the last ``recent_tokens`` up to the query's own.
    ``budget.keep`` sets these two.

    Attributes:
        theta: ``[T, H]`` float32; ``-inf`` reads every key.
        dropped_sum: What stands in the softmax denominator for the keys left out: ``none``;
            ``exact``, their true sum (every key is scored anyway, so it costs nothing); ``bound``,
            their number times ``exp(theta)``; ``given``, ``expected``.
        dropped_scale: Factor on that term.
        expected: ``[T, H]`` float32, the sum left out in units of the query's largest visible
            weight, ``exp(logit - largest logit)``; for ``given``.
        value_mean: Give the probability that was left out to the mean of all visible values.
        union: Every head of a GQA group reads what any of them chose.
        sink_tokens: First tokens, always read.
        recent_tokens: Tokens up to the query's own, the first of them, always read.
    """

    theta: torch.Tensor
    dropped_sum: Literal["none", "exact", "bound", "given"] = "exact"
    dropped_scale: float = 1.0
    expected: torch.Tensor | None = None
    value_mean: bool = False
    union: bool = False
    sink_tokens: int = 0
    recent_tokens: int = 0

    def keeping(self, sink_tokens: int, recent_tokens: int) -> ScoreThreshold:
        """The same, with other tokens that are always read. (``dataclasses.replace`` takes three times as long.)"""
        chosen = (self.theta, self.dropped_sum, self.dropped_scale, self.expected, self.value_mean, self.union)
        return ScoreThreshold(*chosen, sink_tokens, recent_tokens)


Plan = Selection | ScoreThreshold


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the keys of one attention call; parts are merged by log-sum-exp.

    Attributes:
        keys: The plan, or ``None`` for every key in the band.
        band: Distances at which keys are visible.
        position_cap: Rotate queries as if they stood at ``min(position, position_cap)``; ``None``
            leaves them as the model rotated them.
    """

    keys: Plan | None
    band: Band = CAUSAL
    position_cap: int | None = None
