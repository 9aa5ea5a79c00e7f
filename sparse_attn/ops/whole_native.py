"""Decode, a layer at a time: rotation, writing and attention in one call of the kernels, or two with a choice between.

What is the same in all layers of a step, and what is the same in all steps of a layer, is prepared; a call hands over
addresses. Checking shapes, and asking who reads what, cost more than attention itself on short contexts.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from foveate.kv_cache.view import LayerPages, PagedView, Rows

from ..protocol import AttentionSpec, LayerPool, Phase, StepGroup, StepState
from ..selection import Band, Ranking, ScoreThreshold, Segment, Selection, Tiles
from . import attention_native, keep_native, write_native
from .keep_native import Runs
from .native import DTYPES, ISAS, NO_END, AnchorCall, WholeChoice, WholeLayer, WholeStep, library

# What is kept of a step in ``Rows.plans``.
_PLAN = "whole_native"
# What the kernels take of a pool, by heads and types.
_TAKEN: weakref.WeakKeyDictionary[LayerPool, dict[tuple[Any, ...], bool]] = weakref.WeakKeyDictionary()


class PreparedStep:
    """What all layers of a decode step share.

    Args:
        step: Of one decode group.
        heads: H.
        cos: ``[..., R]``, T rows, dense, of the queries' type.
        sin: Likewise.

    Attributes:
        call: ``foveate_whole_step``.
        dtype: Of queries, keys and values.
    """

    def __init__(self, step: StepState, heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        kernels = attention_native.opened()
        (group,) = step.groups
        rows, pages = group.rows, step.pool.layer(0)
        owners = group.owner_index(step.keys_read.device)
        lse = torch.empty((rows.num_queries, heads), dtype=torch.float32)
        self._alive = (rows, cos, sin, owners, lse, step.slots)
        self.dtype = cos.dtype
        dim, threads, dtype = pages.keys.shape[3], torch.get_num_threads(), DTYPES[cos.dtype]
        self.call = WholeStep(owners=owners.data_ptr(), keys_read=step.keys_read.data_ptr())
        write, attention = self.call.write, self.call.attention
        write.slots, write.cos, write.sin = step.slots.data_ptr(), cos.data_ptr(), sin.data_ptr()
        write.query_head_stride = write.key_head_stride = write.value_head_stride = dim
        write.num_tokens, write.num_pages = rows.num_queries, pages.keys.shape[0]
        write.num_heads, write.num_kv_heads = heads, pages.keys.shape[1]
        write.head_dim, write.rotary_dim, write.page_size = dim, cos.shape[-1], pages.page_size
        write.dtype, write.num_threads = dtype, threads
        attention.lse, attention.block_tables = lse.data_ptr(), rows.block_tables.data_ptr()
        attention.context_lens, attention.query_offsets = rows.context_lens.data_ptr(), rows.query_offsets.data_ptr()
        attention.query_head_stride, attention.table_stride = dim, rows.block_tables.stride(0)
        attention.num_sequences, attention.num_heads = rows.num_sequences, heads
        attention.num_kv_heads, attention.head_dim, attention.page_size = pages.keys.shape[1], dim, pages.page_size
        attention.dtype, attention.isa, attention.num_threads = dtype, ISAS.index(kernels.isa), threads

    @classmethod
    def of(
        cls, step: StepState, heads: int, dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor
    ) -> PreparedStep | None:
        """Made once per step and rotation; ``None`` if the kernels cannot compute it.

        They take decode steps of one group with nobody looking on, and what ``ops.rotate_write_kv`` and ``ops.decode``
        leave to compiled kernels.
        """
        if len(step.groups) != 1:
            return None
        plans = step.groups[0].rows.plans
        name = _PLAN, cos.data_ptr()  # layers may rotate by different frequencies
        if name not in plans:
            fits = _fits(step, step.groups[0], heads, dtype, cos, sin)
            plans[name] = cls(step, heads, cos, sin) if fits else None
        prepared: PreparedStep | None = plans[name]
        return prepared


def _fits(
    step: StepState, group: StepGroup, heads: int, dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor
) -> bool:
    if group.phase is not Phase.DECODE or step.observer is not None or cos.device.type != "cpu" or library() is None:
        return False
    tokens = group.rows.num_queries
    return (
        group.start == 0
        and tokens == group.rows.num_sequences
        and step.slots.dtype == torch.int64
        and step.slots.is_contiguous()
        and step.keys_read.device.type == "cpu"
        and cos.numel() == sin.numel() == tokens * cos.shape[-1]
        and cos.dtype == sin.dtype
        and cos.is_contiguous()
        and sin.is_contiguous()
        and _takes(step.pool, group.rows, heads, dtype, cos.dtype, cos.shape[-1])
    )


def _takes(pool: LayerPool, rows: Rows, heads: int, dtype: torch.dtype, rotation: torch.dtype, rotary_dim: int) -> bool:
    """Whether the kernels know heads and pages of these kinds; asked once per pool and its statistics."""
    pages = pool.layer(0)
    known = _TAKEN.setdefault(pool, {})
    name = heads, dtype, rotation, rotary_dim, len(pages.stats)
    if name not in known:
        dim = pages.keys.shape[3]
        query, key = torch.empty((1, heads, dim), dtype=dtype), torch.empty((1, pages.keys.shape[1], dim), dtype=dtype)
        angles = torch.empty((1, rotary_dim), dtype=rotation)
        known[name] = (
            write_native.supports(key, key, pages)
            and write_native.rotates(query, key, angles, angles)
            and attention_native.supports(query, PagedView(pages, rows), AttentionSpec(1.0))
        )
    return known[name]


class PreparedLayer:
    """What all steps of a layer share.

    Args:
        pages: Of the layer.
        spec: Its facts; causal, its scale above 0.
        rotates: Whether queries and keys are rotated.
        strides: Elements from one token's queries to the next one's, and of keys and values.

    Attributes:
        call: ``foveate_whole_layer``.
    """

    def __init__(self, pages: LayerPages, spec: AttentionSpec, rotates: bool, strides: tuple[int, int, int]) -> None:
        self._kernels = attention_native.opened()
        # No strong reference: the layer outlives the pool. Declaring a statistic leaves the keys where they are.
        self._keys, self._num_stats, self._strides = weakref.ref(pages.keys), len(pages.stats), strides
        self._sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
        self.call = WholeLayer(
            keys=pages.keys.data_ptr(),
            values=pages.values.data_ptr(),
            key_scales=None if pages.key_scales is None else pages.key_scales.data_ptr(),
            value_scales=None if pages.value_scales is None else pages.value_scales.data_ptr(),
            sinks=None if self._sinks is None else self._sinks.data_ptr(),
            query_token_stride=strides[0],
            key_token_stride=strides[1],
            value_token_stride=strides[2],
            rotates=rotates,
            farthest=NO_END if spec.band.farthest is None else min(spec.band.farthest, NO_END),
            scale=spec.scale,
            softcap=spec.softcap,
        )
        for stat, kept in pages.stats.items():
            setattr(self.call, stat.name, kept.data_ptr())

    def is_for(self, pages: LayerPages, strides: tuple[int, int, int]) -> bool:
        """Was it made for these pages, with the statistics that they have now, and for rows that lie so?"""
        return self._keys() is pages.keys and self._num_stats == len(pages.stats) and self._strides == strides

    def run(self, step: PreparedStep, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``write``, and then ``read`` of every key of the layer's band."""
        out = _output(query)
        self._run(step, None, query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr())
        return out

    def write(self, step: PreparedStep, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """``query [T, H, D]``, ``key`` and ``value [T, G, D]`` as they left their projections.

        Queries are rotated where they lie; keys and values go to their pages.

        Raises:
            IndexError: a slot lies behind the last page.
        """
        self._run(step, None, query.data_ptr(), key.data_ptr(), value.data_ptr(), None)

    def read(self, step: PreparedStep, query: torch.Tensor, choice: Choice) -> torch.Tensor:
        """Attention of the queries that ``write`` has rotated over what they chose, ``[T, H * D]``. Books the reads.

        Raises:
            MemoryError: no memory was left.
        """
        out = _output(query)
        self._run(step, choice.call, query.data_ptr(), None, None, out.data_ptr())
        return out

    def _run(self, step: PreparedStep, choice: WholeChoice | None, *addresses: int | None) -> None:
        check(self._kernels.whole(step.call, self.call, choice, *addresses), step)


class Choice:
    """What the kernels can read in one piece: every key of a layer's band, or a selection of them.

    Args:
        keys: ``None`` for every key. Its tensors may be filled later, before the layer runs.
        heads: ``[G]`` int64, the row of ``keys`` for each KV head; ``None`` where each has its own.

    Attributes:
        call: ``foveate_whole_choice``; ``None`` for every key.
    """

    def __init__(self, keys: Selection | None, heads: torch.Tensor | None = None) -> None:
        self.call: WholeChoice | None = None
        self._alive: list[Any] = []
        self._tiles: Tiles
        self._lasts, self._stage = False, 0
        if keys is not None:
            self._begin(keys.tiles, keys.granularity)
            self._give(keys.indices.contiguous(), keys.counts.contiguous(), heads)

    def _room(self, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices and counts of so many rows; the same for each layer of a step, unless later layers will read them.

        Layers that wait for their call would hold megabytes each, where only one runs at a time.
        """
        name = _PLAN, self._stage, shape
        self._stage += 1
        plans = {} if self._lasts else self._tiles.plans
        if name not in plans:
            plans[name] = torch.empty(shape, dtype=torch.int32), torch.empty(shape[:2], dtype=torch.int32)
        found: tuple[torch.Tensor, torch.Tensor] = plans[name]
        return found

    def _begin(self, tiles: Tiles, granularity: int) -> WholeChoice:
        self._tiles = tiles
        self.call = WholeChoice(
            tile_sequence=tiles.sequence.data_ptr(),
            tile_start=tiles.query_start.data_ptr(),
            tile_count=tiles.query_count.data_ptr(),
            tile_position=tiles.position.data_ptr(),
            num_tiles=len(tiles),
            granularity=granularity,
        )
        return self.call

    def _give(
        self, indices: torch.Tensor, counts: torch.Tensor, heads: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows ``[R, K, M]`` become what is read, one per KV head; returns that."""
        call = self.call
        assert call is not None  # `_begin` made it
        if heads is not None:
            call.from_indices, call.from_counts = indices.data_ptr(), counts.data_ptr()
            call.from_heads, call.head_map = indices.shape[1], heads.data_ptr()
            self._alive += indices, counts, heads
            indices, counts = self._room((len(indices), len(heads), indices.shape[2]))
        self._alive += indices, counts
        call.indices, call.counts = indices.data_ptr(), counts.data_ptr()
        call.selected_width, call.selected_heads = indices.shape[2], indices.shape[1]
        return indices, counts

    @classmethod
    def of(cls, segments: Sequence[Segment], band: Band, heads: torch.Tensor | None = None) -> Choice | None:
        """``None`` for what is read in several pieces, at other positions or behind a threshold."""
        keys = segments[0].keys
        if not in_one_piece(segments, band) or isinstance(keys, ScoreThreshold):
            return None
        return cls(keys, heads)

    @classmethod
    def ranked(
        cls, ranking: Ranking, tiles: Tiles, kept: Runs | None, whole: bool, lasts: bool, step: PreparedStep
    ) -> tuple[Choice, Selection]:
        """What a layer chooses by the exact scores of its own keys, when it runs; and the same as a selection.

        Args:
            ranking: How it chooses.
            tiles: Of one query each.
            kept: What is read beside, as ``keep_native.keep`` takes it; ``None`` for nothing.
            whole: The layer reads every key all the same.
            lasts: Later layers will read the selection.
            step: Which it is run in.
        """
        made = cls(None)
        choice = made._begin(tiles, 1)
        choice.whole, made._lasts = whole, lasts
        kv_heads = step.call.attention.num_kv_heads
        rank, heads = _rank_of(ranking, tiles, step)
        indices, counts = made._room((len(tiles), 1 if rank.pool_all else kv_heads, rank.index_width))
        rank.indices, rank.counts = indices.data_ptr(), counts.data_ptr()
        choice.rank = ctypes.addressof(rank)
        made._alive += ranking, rank, indices, counts
        if kept is not None:
            rows, kinds, width = indices.shape
            into = made._room((rows, kinds, width + kept[3]))
            keep = keep_native.prepared(indices, kept, *into)
            indices, counts = into
            choice.keep = ctypes.addressof(keep)
            made._alive += keep, kept
        indices, counts = made._give(indices, counts, heads)
        return made, Selection(indices, counts, 1, tiles)


def in_one_piece(segments: Sequence[Segment], band: Band) -> bool:
    """Is all read within a layer's band, positions as the model has them?"""
    return segments == (Segment(segments[0].keys, band),)


def _rank_of(ranking: Ranking, tiles: Tiles, step: PreparedStep) -> tuple[AnchorCall, torch.Tensor | None]:
    """``foveate_anchor`` without what a layer gives, and the row for each KV head where they choose together."""
    name = _PLAN, ranking, step
    if name not in tiles.plans:
        first, end = (bound.to(torch.int32).contiguous() for bound in ranking.candidates)
        budgets = [min(pair) for pair in zip(ranking.budgets, tiles.ends, strict=True)]
        wanted = torch.tensor(budgets, dtype=torch.int32)
        call = AnchorCall(
            attention=step.call.attention,
            first=first.data_ptr(),
            end=end.data_ptr(),
            budgets=wanted.data_ptr(),
            index_width=max(max(budgets, default=0), 1),
            pool_all=ranking.pool == "all",
            query_step=tiles.step,
        )
        facts = call.attention
        facts.tile_sequence, facts.tile_start = tiles.sequence.data_ptr(), tiles.query_start.data_ptr()
        facts.tile_count, facts.tile_position = tiles.query_count.data_ptr(), tiles.position.data_ptr()
        facts.num_tiles, facts.farthest = len(tiles), NO_END
        together = torch.zeros(facts.num_kv_heads, dtype=torch.int64) if call.pool_all else None
        tiles.plans[name] = call, together, (first, end, wanted)
    call, together, _ = tiles.plans[name]
    return AnchorCall.from_buffer_copy(call), together


def check(code: int, step: PreparedStep) -> None:
    """What a kernel answered.

    Raises:
        MemoryError: no memory was left.
        IndexError: a slot lies behind the last page.
    """
    if code == 1:
        raise MemoryError("no memory for the scratch space of the attention kernels")
    if code:
        raise IndexError(f"a slot lies behind the {step.call.write.num_pages} pages")


def _output(query: torch.Tensor) -> torch.Tensor:
    tokens, heads, dim = query.shape
    return torch.empty((tokens, heads * dim), dtype=query.dtype)
