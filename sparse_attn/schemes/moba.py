"""MoBA: each query attends to its own block of keys and to the past blocks whose mean key it likes best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import KEY_SUM, PageStat
from foveate.kv_cache.view import PagedView

from .. import budget, ops
from ..errors import SchemeConfigError
from ..profile import Profile
from ..protocol import LayerCall, LayerRole, Phase, Role, Scheme, SchemeOptions
from ..selection import Selection, Tiles
from .dense import DENSE


@dataclass(frozen=True, slots=True)
class MobaOptions(SchemeOptions):
    """
    Args:
        block_tokens: Keys per block, a power of two. Blocks of 64 to 128 retrieve best: the mean of a
            block dilutes one relevant key by its size (FlashMoBA, arXiv:2511.11571, section 3).
        top_k: Blocks that a query reads, its own among them.
        budget_tokens: Another way of saying ``top_k``: as many blocks as hold so many tokens. 0 is off.
        dense_last_layers: Last layers that read everything: 3 in the paper's evaluation (section 3.3).
            The first layer always selects, also in a model of so few layers.
        keep_first_block: Ours: also read the first block, beside the ``top_k``.
        sparse_decode: Ours: select for generated tokens too. The paper generates with full attention.
        share_heads: Ours: one choice per KV head, by the sum of its query heads' gates.
    """

    block_tokens: int = 64
    top_k: int = 16
    budget_tokens: int = 0
    dense_last_layers: int = 3
    keep_first_block: bool = False
    sparse_decode: bool = False
    share_heads: bool = False

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        if self.block_tokens < 1 or self.block_tokens & (self.block_tokens - 1):
            raise SchemeConfigError(f"block_tokens must be a power of two, got {self.block_tokens}")
        if not self.top_k:
            raise SchemeConfigError("top_k must be at least 1")


class Moba(Scheme):
    """Mixture of Block Attention (Lu et al., arXiv:2502.13189, section 2.2), per query and query head.

    Of query ``q`` at position ``t``, block ``t // block_tokens`` is read causally, and of the blocks
    before it the ``top_k - 1`` with the highest ``q . mean(K)``: one softmax over their union. The
    paper's form by default: no sinks, no window, full attention for generated tokens. Needs
    ``T * H * top_k * 4`` bytes for the selection of T queries and 8 MiB of scores, a few times.
    """

    name: ClassVar[str] = "moba"
    source: ClassVar[str] = "Lu et al., MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv:2502.13189"
    Options: ClassVar[type[SchemeOptions]] = MobaOptions
    same_in_decode: ClassVar[bool] = False
    options: MobaOptions

    tile = 1
    # The own block is part of the selection, from its start and not from the query's window.
    keeps_own_tile = False
    keeps_own_token = False

    def __init__(self, options: MobaOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        if options.keep_first_block:
            options = replace(options, sink_tokens=max(options.sink_tokens, options.block_tokens))
        super().__init__(options, profiles)
        self.granularity = options.block_tokens

    @property
    def blocks_read(self) -> int:
        """Blocks per query, its own among them."""
        options = self.options
        return -(-options.budget_tokens // options.block_tokens) if options.budget_tokens else options.top_k

    def for_phase(self, phase: Phase) -> Scheme:
        return self if phase is Phase.PREFILL or self.options.sparse_decode else DENSE

    def page_stats(self, geometry: CacheGeometry) -> tuple[PageStat, ...]:
        return (KEY_SUM,) if self.options.block_tokens % geometry.page_size == 0 else ()

    def roles(self, num_layers: int) -> tuple[LayerRole, ...]:
        selecting = max(num_layers - self.options.dense_last_layers, min(num_layers, 1))
        return (LayerRole(Role.SELECT),) * selecting + (LayerRole(Role.DENSE),) * (num_layers - selecting)

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        block = self.options.block_tokens
        # In both phases only what lies before the own block is a candidate, as for a prompt's tile.
        candidates = budget.free_units(tiles, self, block, Phase.PREFILL)
        # No wider than the context, or a large budget would cost its width on short prompts; a power of two,
        # because a kernel is compiled per width.
        blocks = -(-max(view.rows.host_context_lens) // block)
        most = min(self.blocks_read, 1 << (blocks - 1).bit_length())
        indices, counts = ops.gate_blocks(query, view, block, most, candidates, pooled=self.options.share_heads)
        return Selection(indices, counts, block, tiles)

    select_decode = select_prefill
