"""DHSA as its second version was released: fixed blocks of queries and keys, each head for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import KEY_SUM, PageStat
from foveate.kv_cache.view import PagedView, Rows

from .. import budget
from ..errors import SchemeConfigError
from ..ops.line_scores import line_scores
from ..ops.sums import cut_sums, tile_sums, unit_sums
from ..ops.topk import top_units
from ..profile import Profile
from ..protocol import LayerCall, Phase, Scheme, SchemeOptions
from ..selection import Selection, Tiles
from ..slabs import by_sequence
from .dense import DENSE

Variant = Literal["topk", "a", "vs", "vsb"]

# Scores held at a time: with what ranking them takes, 64 MiB.
SLAB_SCORES = (64 << 20) // 40


@dataclass(frozen=True, slots=True)
class DhsaBlockOptions(SchemeOptions):
    """
    Args:
        sink_tokens: See ``SchemeOptions``, in whole key blocks; 0 in the released code.
        window_tokens: See ``SchemeOptions``, in whole key blocks; 0 in the released code.
        dense_tail_tokens: See ``SchemeOptions``; 0 in the released code.
        density: Share of the prompt's key blocks that a tile chooses, rounded down, one at least; 1 is dense.
        budget_tokens: If above 0: tokens that a tile chooses, in whole blocks, instead of ``density``.
        min_budget_tokens: Least number of tokens that ``density`` chooses; not in the released code.
        budget_includes_kept: What is read anyway, the tile's own blocks and a forced first block among
            it, is paid from the budget, as in the released code.
        query_block_tokens: Queries per tile (128 or a multiple in the released code).
        key_block_tokens: Keys per block (32, 64 or 128 there), a power of two. Blocks of whole pages are
            scored from page sums; smaller ones read every key.
        variant: How blocks are scored. ``topk``: mean of the tile's queries by mean of the block's
            keys. ``a``: the same, and the first block is always read. ``vs``: by the keys and distances
            that the last queries attend to most. ``vsb``: the same by block means.
        vertical_slash_ratio: Share of the budget of ``vs`` and ``vsb`` for keys; distances have the rest.
        sparse_decode: Choose blocks in decode too (``vs`` and ``vsb`` as ``a``); not in the released code,
            whose decode is dense.
    """

    sink_tokens: int = 64
    window_tokens: int = 256
    dense_tail_tokens: int = 128
    density: float = 0.125
    budget_tokens: int = 0
    min_budget_tokens: int = 0
    budget_includes_kept: bool = False
    query_block_tokens: int = 128
    key_block_tokens: int = 32
    variant: Variant = "topk"
    vertical_slash_ratio: float = 0.5
    sparse_decode: bool = False

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        for name in ("density", "vertical_slash_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise SchemeConfigError(f"{name} must be a number from 0 to 1, got {getattr(self, name)}")
        size = self.key_block_tokens
        if not 16 <= size <= 128 or size & (size - 1):
            raise SchemeConfigError(f"key_block_tokens must be 16, 32, 64 or 128, got {size}")
        if not self.query_block_tokens or self.query_block_tokens % size:
            raise SchemeConfigError(
                f"query_block_tokens must be a multiple of key_block_tokens, got {self.query_block_tokens}"
            )
        if self.variant not in get_args(Variant):
            raise SchemeConfigError(f"variant must be one of {', '.join(get_args(Variant))}, got {self.variant!r}")


class DhsaBlock(Scheme):
    """The released block form of DHSA (Xiong et al., arXiv:2510.24606v2, the authors' ``DHSA_patch.py``).

    Each query head chooses key blocks for each tile of queries. ``k = max(1, density * prompt / block)``; where the
    prompt's length is not known, the keys there are count. The pure form is ``sink_tokens=0, window_tokens=0,
    dense_tail_tokens=0, budget_includes_kept=True``. What differs from the code there: blocks behind a tile are no
    candidates, a tile's own blocks are always read (their last one is there, but for ``vsb``), nothing is padded,
    and ties go to the lower block.

    ``vs`` and ``vsb`` score by the last ``query_block_tokens`` of what is computed at a time: of a chunk, not of the
    prompt. So they depend on how a prompt is cut, and a tile's keys on later queries. The tiles in the first
    ``k * block`` tokens and the last tile of the prompt read everything. ``topk`` and ``a`` choose the same however a
    prompt is cut between tiles; with ``density``, where its length is known.
    """

    name: ClassVar[str] = "dhsa_block"
    source: ClassVar[str] = (
        "Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention for Memory-Constrained LLM"
        " Inference, arXiv:2510.24606v2"
    )
    Options: ClassVar[type[SchemeOptions]] = DhsaBlockOptions
    pools_queries: ClassVar[bool] = True
    same_in_decode: ClassVar[bool] = False
    options: DhsaBlockOptions

    def __init__(self, options: DhsaBlockOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        self.tile, self.granularity = options.query_block_tokens, options.key_block_tokens
        self._answer: Scheme = self if options.sparse_decode else DENSE

    def for_phase(self, phase: Phase) -> Scheme:
        return self if phase is Phase.PREFILL else self._answer

    def page_stats(self, geometry: CacheGeometry) -> tuple[PageStat, ...]:
        return (KEY_SUM,) if self.options.key_block_tokens % geometry.page_size == 0 else ()

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        if self.options.variant == "vs":
            lines = [self._token_lines(query, view, sequence, layer) for sequence in range(view.rows.num_sequences)]
        elif self.options.variant == "vsb":
            lines = self._block_lines(query, view, layer)
        else:
            return self._choose_by_means(query, view, tiles, Phase.PREFILL)
        begun = tiles.position.long() // tiles.size * tiles.size
        units = -(-max(view.rows.host_context_lens) // self.granularity)

        def scores(rows: slice, owner: Any, product: str) -> torch.Tensor:
            found: torch.Tensor = lines[owner].scores(begun[rows])
            return found

        return self._choose(view, tiles, Phase.PREFILL, query.shape[1] * units, scores)

    def select_decode(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        return self._choose_by_means(query, view, tiles, Phase.DECODE)

    def _choose_by_means(self, query: torch.Tensor, view: PagedView, tiles: Tiles, phase: Phase) -> Selection:
        # Candidates have all their keys and a tile one number of queries, so sums have the order of means.
        keys = unit_sums(view, self.granularity)
        asked = torch.unflatten(tile_sums(query, tiles), 1, (view.num_kv_heads, -1))

        def scores(rows: slice, owner: Any, product: str) -> torch.Tensor:
            return torch.einsum(product, asked[rows], keys[owner]).flatten(1, 2)

        return self._choose(view, tiles, phase, query.shape[1] * keys.shape[1], scores)

    def _choose(
        self, view: PagedView, tiles: Tiles, phase: Phase, each: int, scores: Callable[[slice, Any, str], torch.Tensor]
    ) -> Selection:
        """The best blocks by ``scores(rows, owner, product)`` ``[rows, H, units]``, see ``slabs.by_sequence``.

        ``each`` is their number per tile.
        """
        size, options = self.granularity, self.options
        wanted = self._wanted(view.rows, tiles, phase)
        first, end = budget.free_units(tiles, self, size, phase)
        forced = options.variant != "topk"
        if forced:
            first = first.clamp(min=1)
        most = torch.tensor(wanted).to(first.device, non_blocking=True)
        if options.budget_includes_kept:
            visible = (tiles.position + tiles.query_count - 1) // size + 1
            most = (most - (visible - (end - first).clamp(min=0))).clamp(min=0)
        found = []
        for rows, owner, product in by_sequence(tiles, max(1, SLAB_SCORES // each), phase):
            candidates = first[rows], end[rows]
            found.append(top_units(scores(rows, owner, product), candidates, most[rows], most=max(wanted)))
        indices, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
        if forced:
            indices, counts = torch.cat([torch.zeros_like(indices[..., :1]), indices], dim=2), counts + 1
        return Selection(indices, counts, size, tiles)

    def _wanted(self, rows: Rows, tiles: Tiles, phase: Phase) -> list[int]:
        """Blocks per tile, before what is kept is paid; host numbers."""
        lines = phase is Phase.PREFILL and self.options.variant in ("vs", "vsb")
        wanted = []
        for place, (sequence, _, count, position) in enumerate(tiles.host):
            blocks = self._blocks(rows, sequence, phase)
            last = place + 1 == len(tiles.host) or tiles.host[place + 1][0] != sequence
            ends_prompt = rows.host_prompt_lens is None or position + count == rows.host_prompt_lens[sequence]
            early = position // tiles.size * tiles.size < blocks * self.granularity
            everything = -(-(position + count) // self.granularity)
            wanted.append(everything if lines and (early or (last and ends_prompt)) else blocks)
        return wanted

    def _blocks(self, rows: Rows, sequence: int, phase: Phase) -> int:
        """``k`` of a sequence."""
        options, size = self.options, self.granularity
        if options.budget_tokens:
            return max(1, options.budget_tokens // size)
        length = rows.host_context_lens[sequence]
        if phase is Phase.PREFILL and rows.host_prompt_lens is not None:
            length = rows.host_prompt_lens[sequence]
        # Rounded down, as in the released code; but the whole is the whole, a last block cut short included.
        share = -(-length // size) if options.density == 1 else int(options.density * length / size)
        return max(1, share, options.min_budget_tokens // size)

    def _last_queries(self, query: torch.Tensor, rows: Rows, sequence: int) -> torch.Tensor:
        stop = sum(rows.host_query_lens[: sequence + 1])
        return query[stop - min(self.tile, rows.host_query_lens[sequence]) : stop]

    def _token_lines(self, query: torch.Tensor, view: PagedView, sequence: int, layer: LayerCall) -> _Lines:
        context, size = view.rows.host_context_lens[sequence], self.granularity
        columns, diagonals = line_scores(self._last_queries(query, view.rows, sequence), view, sequence, layer.spec)
        tokens = min(context, self._blocks(view.rows, sequence, Phase.PREFILL) * size)
        vertical = int(tokens * self.options.vertical_slash_ratio)
        kept = torch.nn.functional.pad(_best(columns, vertical), (0, -context % size))
        blocks = torch.unflatten(kept, 1, (-1, size)).sum(2)
        units = -(-max(view.rows.host_context_lens) // size)
        blocks = torch.nn.functional.pad(blocks, (0, units - blocks.shape[1]))
        return _Lines(blocks, _best(diagonals, tokens - vertical), self.tile, size, 1)

    def _block_lines(self, query: torch.Tensor, view: PagedView, layer: LayerCall) -> list[_Lines]:
        contexts, size = view.rows.host_context_lens, self.granularity
        sums = cut_sums(view, size, contexts, contexts)[:, :-1]
        found = []
        for sequence, context in enumerate(contexts):
            queries = self._last_queries(query, view.rows, sequence).float().mean(0)
            seen = -(-context // size)
            filled = torch.full((seen,), float(size), device=query.device)
            filled[-1] = context - (seen - 1) * size
            means = sums[sequence, :seen] / filled[:, None, None]
            asked = torch.unflatten(queries, 0, (view.num_kv_heads, -1))
            scores = torch.einsum("gjd,ugd->gju", asked, means).flatten(0, 1) * layer.spec.scale
            blocks = min(self._blocks(view.rows, sequence, Phase.PREFILL), seen)
            vertical = int(blocks * self.options.vertical_slash_ratio)
            columns = torch.nn.functional.pad(_best(scores, vertical), (0, sums.shape[1] - seen))
            # Distances in blocks from the last one.
            found.append(_Lines(columns, _best(scores, blocks - vertical).flip(1), self.tile, size, size))
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Lines:
    """Vertical and slash lines of one sequence.

    Attributes:
        columns: ``[H, U]`` score of each key block.
        diagonals: ``[H, N]`` score of each distance, 0 for those that are not chosen.
        tile: Queries per tile.
        size: Keys per block.
        step: Tokens per unit of distance: 1, or ``size``.
    """

    columns: torch.Tensor
    diagonals: torch.Tensor
    tile: int
    size: int
    step: int

    def scores(self, begun: torch.Tensor) -> torch.Tensor:
        """``[rows, H, U]`` for tiles that begin at ``begun``: each distance counts for every block that it touches."""
        before = torch.nn.functional.pad(self.diagonals.double().cumsum(1), (1, 0))
        block = torch.arange(self.columns.shape[1], device=begun.device)
        # The tile's queries and the block's keys, in units of distance.
        nearest = begun[:, None] // self.step - ((block + 1) * self.size - 1) // self.step
        farthest = (begun[:, None] + self.tile - 1) // self.step - block * self.size // self.step
        most = before.shape[1] - 1
        touched = before[:, (farthest + 1).clamp(0, most)] - before[:, nearest.clamp(0, most)]
        return (self.columns[:, None] + touched).transpose(0, 1).float()


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """``[H, N]`` with only the ``count`` best scores of each row, of equal ones the lower; 0 elsewhere."""
    everything = scores.new_zeros(1, dtype=torch.int32), scores.new_full((1,), scores.shape[1], dtype=torch.int32)
    chosen = top_units(scores[None], everything, count)[0][0].long()
    place = torch.where(chosen < 0, scores.shape[1], chosen)
    mask = scores.new_zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool).scatter_(1, place, True)
    return torch.where(mask[:, :-1], scores, 0.0)
