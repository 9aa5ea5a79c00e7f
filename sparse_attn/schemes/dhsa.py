"""DHSA: a token budget spent on chunks of keys that follow the text, scored by length-normalised means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import KEY_SUM, KEY_SUM_16, PageStat
from foveate.kv_cache.view import PagedView

from .. import budget, chunks
from ..chunks import Chunks, Cut
from ..errors import SchemeConfigError
from ..ops.boundary_predictor import BoundaryPredictor
from ..ops.gap_scores import delimiter_scores, predicted_scores, ratio_scores
from ..ops.key_change import key_change
from ..ops.scan_native import keeps_sums
from ..ops.sums import chunk_sums, cut_sums, tile_sums, unit_sums
from ..ops.walk import walk_chunks
from ..profile import Profile
from ..protocol import LayerCall, Phase, Scheme, SchemeOptions
from ..selection import Selection, Tiles
from ..slabs import by_sequence

Boundaries = Literal["fixed", "key_cos", "attn_ratio", "delimiter", "predictor"]
ShareHeads = Literal["all", "kv_group", "none"]
Aggregate = Literal["sqrt_length", "mean"]

# Scores held at a time: with what sorting them takes, 64 MiB.
SLAB_SCORES = (64 << 20) // 48


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    """Chunks, and what each tile may take of them.

    Attributes:
        table: The chunks of each sequence.
        unit: Tokens per selected index, and per number below.
        norm: ``[S, C]`` float32, factor from the product with the sum of a chunk's keys to its score.
        start: ``[R, C]`` first unit that may be taken of each chunk.
        length: ``[R, C]`` units that may be taken.
        room: ``[R]`` units that a tile takes.
        width: Bound of ``room``.
    """

    table: Chunks
    unit: int
    norm: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    room: torch.Tensor
    width: int


@dataclass(frozen=True, slots=True)
class DhsaOptions(SchemeOptions):
    """
    Args:
        sink_tokens: See ``SchemeOptions``; 128 in the paper's code, inside its budget.
        window_tokens: See ``SchemeOptions``; 0 in the paper's code, whose 128 local tokens are the tile's own.
        dense_tail_tokens: See ``SchemeOptions``; 64 in the paper's code.
        budget_tokens: Keys chosen for each tile (N_b; 1024 or 2048 in the paper).
        budget_includes_kept: Sinks, window and own tile are paid from the budget, as in the paper.
        block_tokens: Queries per tile (128; 256 in the paper's timings).
        boundaries: Where chunks begin. ``fixed``: every ``chunk_tokens``. ``key_cos``: where the mean
            keys on both sides differ most (ours). ``attn_ratio``: where the attention of the last
            queries differs most on both sides; in decode as ``fixed``. ``delimiter``: behind
            ``delimiter_ids``. ``predictor``: by the paper's network, read from a profile.
        chunk_tokens: Length of fixed chunks, a power of two; 16 is the mean length in the paper's code.
            Chunks of whole pages are scored from page sums, smaller ones read every key; but long
            chunks hide what stands in them, above all from the single query of decode.
        share_heads: Which heads choose together: ``kv_group``, the query heads on one KV head;
            ``all``, as in the paper's code, where heads that retrieve are outvoted; ``none``, the
            dearest, since every query head then reads keys of its own.
        aggregate: ``sqrt_length``: chunks and tiles are sums over the root of their length, as in the
            paper; ``mean``: plain means.
        min_chunk_tokens: Least tokens between boundaries.
        max_chunk_tokens: Longer chunks are cut into equal parts; at least twice the least.
        boundary_window_tokens: Tokens that are compared on each side of a gap (w); that of the profile
            for ``predictor``.
        nms_tokens: Boundaries lie further apart than this.
        boundary_threshold: Scores of ``attn_ratio`` and logits of ``predictor`` must exceed it (theta).
        chunks_per_block: Boundaries per ``block_tokens`` at most (chunk_beta).
        segment_tokens: Boundaries are chosen inside segments of so many positions, a multiple of
            ``block_tokens``; 0: in the whole prompt at once, as in the paper.
        delimiter_ids: Token ids that end a chunk.
        share_boundaries: Boundaries of the first layer stand for all.
    """

    sink_tokens: int = 64
    window_tokens: int = 256
    dense_tail_tokens: int = 128
    budget_tokens: int = 1024
    budget_includes_kept: bool = False
    block_tokens: int = 128
    boundaries: Boundaries = "fixed"
    chunk_tokens: int = 16
    share_heads: ShareHeads = "kv_group"
    aggregate: Aggregate = "sqrt_length"
    min_chunk_tokens: int = 8
    max_chunk_tokens: int = 128
    boundary_window_tokens: int = 4
    nms_tokens: int = 8
    boundary_threshold: float = 1.1
    chunks_per_block: int = 8
    segment_tokens: int = 512
    delimiter_ids: tuple[int, ...] = ()
    share_boundaries: bool = False

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        for name, allowed in (("boundaries", Boundaries), ("share_heads", ShareHeads), ("aggregate", Aggregate)):
            if getattr(self, name) not in get_args(allowed):
                given = getattr(self, name)
                raise SchemeConfigError(f"{name} must be one of {', '.join(get_args(allowed))}, got {given!r}")
        for name in ("boundary_window_tokens", "chunks_per_block", "min_chunk_tokens", "budget_tokens"):
            if not getattr(self, name):
                raise SchemeConfigError(f"{name} must be at least 1")
        if self.max_chunk_tokens < 2 * self.min_chunk_tokens:
            raise SchemeConfigError("max_chunk_tokens must be at least twice min_chunk_tokens")
        chunk = self.chunk_tokens
        if chunk & (chunk - 1) or not self.min_chunk_tokens <= chunk <= self.max_chunk_tokens:
            raise SchemeConfigError(
                f"chunk_tokens must be a power of two between min_chunk_tokens and max_chunk_tokens, got {chunk}"
            )
        if not self.block_tokens or self.block_tokens % chunk:
            raise SchemeConfigError(f"block_tokens must be a multiple of chunk_tokens, got {self.block_tokens}")
        if self.segment_tokens % self.block_tokens:
            raise SchemeConfigError(f"segment_tokens must be a multiple of block_tokens, got {self.segment_tokens}")
        self._check_delimiters()

    def _check_delimiters(self) -> None:
        ids = self.delimiter_ids
        whole = isinstance(ids, list | tuple) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or not all(0 <= i < 2**31 for i in ids):
            raise SchemeConfigError(f"delimiter_ids must be a list of token ids, got {ids!r}")
        object.__setattr__(self, "delimiter_ids", tuple(ids))
        if (self.boundaries == "delimiter") != bool(ids):
            raise SchemeConfigError("boundaries='delimiter' and delimiter_ids go together")


class Dhsa(Scheme):
    """Dynamic hierarchical sparse attention (Xiong et al., arXiv:2510.24606, first version and its code).

    Keys are cut into chunks, queries into tiles. A tile and a chunk are each the sum of their vectors over the
    root of their number; their product is the score of every key in the chunk. A tile reads the keys with the
    highest scores, of equal ones the lower: whole chunks, best first, and at most one of them in part.

    The pure form is ``sink_tokens=0, window_tokens=0, dense_tail_tokens=0, share_heads="all"``; with
    ``budget_includes_kept`` the own tile is paid from the budget. What differs from the authors' code: no key
    twice; a tile's own tokens are always read, and are no candidates; ties go to the lower key.

    **Chunks of prompt and cuts.** Boundaries are chosen inside finished segments of ``segment_tokens``, by the
    keys of the segment alone; tiles in a segment that is still open see it in fixed chunks. So a prompt cut at
    multiples of ``block_tokens`` chooses as a whole one. Not so ``attn_ratio``, which looks at the last
    queries of what is computed at a time, nor ``segment_tokens=0``, whose boundaries are those of all keys
    there are, and whose chunks may reach into a tile that they are scored for, as in the paper.

    **Decode.** Chunks of the prompt stay; all tokens generated since make one chunk, however long; the newest is
    always read. If nobody knows the prompt's length, all tokens but the newest count as prompt.

    **Cost.** ``fixed`` in whole pages reads no key to choose; nor, with the native kernels of a CPU, in multiples of 16
    tokens, but those at odd ends of the prompt. Every other form reads all keys once per layer and step, decode steps
    too, because a scheme keeps no state; ``predictor`` runs a network on each of them.
    Held at a time: one float32 vector per chunk, KV head and sequence, and 64 MiB of scores.
    """

    name: ClassVar[str] = "dhsa"
    source: ClassVar[str] = (
        "Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs,"
        " arXiv:2510.24606v1"
    )
    Options: ClassVar[type[SchemeOptions]] = DhsaOptions
    pools_queries: ClassVar[bool] = True
    same_in_decode: ClassVar[bool] = False
    options: DhsaOptions

    def __init__(self, options: DhsaOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        self.tile = options.block_tokens
        self.needs_token_ids = options.boundaries == "delimiter"
        self._predictor: BoundaryPredictor | None = None
        if options.boundaries == "predictor":
            if self.profile is None:
                raise SchemeConfigError(
                    "boundaries='predictor' needs a profile for dhsa that holds the network's weights: --profile FILE"
                )
            self._predictor = BoundaryPredictor(self.profile.tensors, self.profile.options)

    def page_stats(self, geometry: CacheGeometry) -> tuple[PageStat, ...]:
        if self._sums_runs(geometry.page_size):
            return (KEY_SUM_16,) if keeps_sums(geometry) else ()
        by_pages = self.options.boundaries in ("fixed", "attn_ratio")
        return (KEY_SUM,) if by_pages and self.options.chunk_tokens % geometry.page_size == 0 else ()

    def _sums_runs(self, page_size: int) -> bool:
        """Are chunks parts of pages, and made of runs whose sums can be kept?"""
        by_pages, chunk = self.options.boundaries in ("fixed", "attn_ratio"), self.options.chunk_tokens
        return by_pages and chunk % page_size != 0 and chunk % KEY_SUM_16.run_tokens == 0

    def _summed(self, view: PagedView) -> bool:
        return self._sums_runs(view.page_size) and KEY_SUM_16 in view.pages.stats

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        options, rows, device = self.options, view.rows, query.device
        spans = list(zip(rows.host_context_lens, rows.host_query_lens, strict=True))
        # No chunk is needed from where the last tile begins.
        ends = [(context - 1) // tiles.size * tiles.size for context, _ in spans]

        def lay() -> Chunks:
            segment = options.segment_tokens
            if options.boundaries == "fixed":
                return chunks.grid([0] * len(ends), ends, options.chunk_tokens, None, device)
            if not segment:
                return self._by_scores(query, view, layer, rows.host_context_lens)
            opened = [(context - count) // tiles.size * tiles.size // segment * segment for context, count in spans]
            last = chunks.grid(opened, ends, options.chunk_tokens, segment, device)
            return Chunks.joined([self._by_scores(query, view, layer, ends), last]) if max(ends) >= segment else last

        offer = self._offer(view, tiles, lay, Phase.PREFILL)
        if options.boundaries == "fixed":
            sums = unit_sums(view, options.chunk_tokens, self._summed(view))[:, : offer.table.start.shape[1]]
        else:
            sums = chunk_sums(view, offer.table.start, offer.table.length, self._summed(view))
        return self._choose(query, view, tiles, offer, sums, Phase.PREFILL)

    def select_decode(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        options, rows, device = self.options, view.rows, query.device
        newest = tuple(context - 1 for context in rows.host_context_lens)
        prompts = newest if rows.host_prompt_lens is None else rows.host_prompt_lens
        cuts = tuple(min(prompt, last) for prompt, last in zip(prompts, newest, strict=True))
        fixed = options.boundaries in ("fixed", "attn_ratio")

        def lay() -> Chunks:
            segment = options.segment_tokens
            if fixed or not max(cuts) or max(cuts) < segment:
                finished, opened = [], [0] * len(cuts)
            else:
                finished = [self._by_scores(query, view, layer, cuts)]
                opened = [cut // segment * segment if segment else cut for cut in cuts]
            rest = chunks.grid(opened, cuts, options.chunk_tokens, None, device, least=1)
            return Chunks.joined([*finished, rest, chunks.single(cuts, newest, device)])

        offer = self._offer(view, tiles, lay, Phase.DECODE)
        if fixed:
            sums = cut_sums(view, options.chunk_tokens, cuts, newest, self._summed(view))
        else:
            sums = chunk_sums(view, offer.table.start, offer.table.length)
        return self._choose(query, view, tiles, offer, sums, Phase.DECODE)

    def _offer(self, view: PagedView, tiles: Tiles, lay: Callable[[], Chunks], phase: Phase) -> _Offer:
        """What ``lay`` lays, and what tiles may take of it; made once per step where it is the same in all layers."""
        options, plans = self.options, view.rows.plans
        fixed = options.boundaries == "fixed" or (options.boundaries == "attn_ratio" and phase is Phase.DECODE)
        if fixed or options.share_boundaries or options.boundaries == "delimiter":
            if "dhsa" not in plans:
                plans["dhsa"] = self._take(view, tiles, lay(), phase)
            found: _Offer = plans["dhsa"]
            return found
        return self._take(view, tiles, lay(), phase)

    def _take(self, view: PagedView, tiles: Tiles, table: Chunks, phase: Phase) -> _Offer:
        options = self.options
        unit = self._unit(view.page_size, phase)
        first, end = (part.long() for part in budget.free_units(tiles, self, unit, phase))
        width = min(options.budget_tokens // unit, -(-max(view.rows.host_context_lens) // unit))
        room = torch.full_like(first, width)
        if options.budget_includes_kept:
            kept = tiles.position + tiles.query_count - (end - first).clamp(min=0)
            room = (options.budget_tokens - kept).clamp(0, width)
        owner = tiles.sequence.long()
        begun = (tiles.position // tiles.size * tiles.size)[:, None]
        start, length = table.start[owner], table.length[owner]
        live = (table.live_from[owner] <= begun) & (begun < table.live_until[owner])
        stop = torch.minimum((start + length) // unit, end[:, None])
        start = torch.maximum(start // unit, first[:, None])
        count = table.length.clamp(min=1).float()
        norm = count.rsqrt() if options.aggregate == "sqrt_length" else count.reciprocal()
        return _Offer(table, unit, norm, start, (stop - start).clamp(min=0) * live, room, width)

    def _by_scores(self, query: torch.Tensor, view: PagedView, layer: LayerCall, ends: Sequence[int]) -> Chunks:
        """Chunks of the keys before ``ends`` (host numbers per sequence), by the scores of the gaps."""
        options = self.options
        by_text = options.boundaries == "delimiter"
        window = 0 if by_text else self._predictor.window if self._predictor else options.boundary_window_tokens
        cut = Cut(
            block=options.block_tokens,
            per_block=options.block_tokens if by_text else options.chunks_per_block,
            threshold=float("-inf") if by_text or options.boundaries == "key_cos" else options.boundary_threshold,
            distance=0 if by_text else options.nms_tokens,
            window=window,
            shortest=options.min_chunk_tokens,
            longest=options.max_chunk_tokens,
            fallback=options.chunk_tokens,
        )
        segment = options.segment_tokens or max(ends)
        segments = max(ends) // segment
        if by_text:
            if view.rows.host_token_ids is None:
                raise SchemeConfigError("boundaries='delimiter' needs token ids, and only the engine knows them")
            scores = delimiter_scores(view.rows, options.delimiter_ids, segment, segments)
        elif options.boundaries == "attn_ratio":
            scores = ratio_scores(query, view, layer.spec, window, segment, segments)
        elif self._predictor:
            scores = predicted_scores(view, self._predictor, segment, segments)
        else:
            scores = key_change(view, window, segment, segments)
        end = torch.tensor(ends).to(query.device, non_blocking=True)
        return chunks.from_scores(scores, end, cut, whole=bool(options.segment_tokens))

    def _choose(
        self, query: torch.Tensor, view: PagedView, tiles: Tiles, offer: _Offer, sums: torch.Tensor, phase: Phase
    ) -> Selection:
        """Scores the chunks, whose key sums are ``sums`` ``[S, C, G, D]``, and walks them."""
        options = self.options
        keys, norm = sums, offer.norm[:, None]
        asked = tile_sums(query, tiles)  # the norm of a tile's own length changes no order
        if options.share_heads == "all":
            keys, asked = keys.mean(2, keepdim=True), asked.mean(1, keepdim=True)
        asked = torch.unflatten(asked, 1, (keys.shape[2], -1))
        if options.share_heads == "kv_group":
            asked = asked.mean(2, keepdim=True)
        found = []
        step = max(1, SLAB_SCORES // max(asked[0, ..., 0].numel() * keys.shape[1], 1))
        for rows, owner, product in by_sequence(tiles, step, phase):
            scores = torch.einsum(product, asked[rows], keys[owner]).flatten(1, 2).mul_(norm[owner])
            found.append(walk_chunks(scores, offer.start[rows], offer.length[rows], offer.room[rows], offer.width))
        indices, counts = (torch.cat(parts) for parts in zip(*found, strict=True)) if len(found) > 1 else found[0]
        if options.share_heads == "all":
            heads = view.num_kv_heads
            indices, counts = indices.expand(-1, heads, -1), counts.expand(-1, heads)
        return Selection(indices, counts, offer.unit, tiles)

    def _unit(self, page_size: int, phase: Phase) -> int:
        """Tokens per index: as many as leave budget, chunks and what is kept exact."""
        options = self.options
        if options.boundaries != "fixed" or options.budget_includes_kept or phase is Phase.DECODE:
            return 1
        kept = options.sink_tokens, options.window_tokens, options.block_tokens
        return math.gcd(page_size, options.chunk_tokens, options.budget_tokens, *kept)
