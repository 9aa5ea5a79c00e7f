"""Exact top-k: every layer scores all keys and reads the best, without a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from foveate.kv_cache.view import PagedView

from .. import budget, ops
from ..errors import SchemeConfigError
from ..ops.anchor import Pool
from ..profile import Profile
from ..protocol import LayerCall, LayerRole, Phase, Role, Scheme, SchemeOptions
from ..selection import CAUSAL, Ranking, Selection, Tiles


@dataclass(frozen=True, slots=True)
class ExactTopkOptions(SchemeOptions):
    """
    The pure form has ``sink_tokens``, ``window_tokens`` and ``dense_tail_tokens`` 0; what these keep
    comes on top of the budget, and keeps a small budget from losing the answer.

    Args:
        sink_tokens: First tokens of the context, always read (ours).
        window_tokens: Last tokens before a query's tile, always read (ours).
        dense_tail_tokens: Last tokens of the prompt, whose queries read every key (ours).
        budget_tokens: Keys to choose per query tile and KV head; 0 takes ``budget_fraction``.
        budget_fraction: The same as a share of the keys: before the tile in prefill (Kascade's
            rolling budget), of the context in decode.
        min_budget_tokens: Least that the share comes to.
        tile_tokens: Queries that share a choice in prefill, a power of two. Larger is cheaper.
        scored_queries: At least so many of a whole tile's queries, every second, third ... counted back from its last,
            are scored and pooled (ours: scoring costs by the query; docs/quality.md has what 16 and 8 of 32 lose);
            0 takes all.
        dense_first_layers: First layers, read whole, since their attention is flat.
    """

    sink_tokens: int = 64
    window_tokens: int = 256
    dense_tail_tokens: int = 128
    budget_tokens: int = 0
    budget_fraction: float = 0.1
    min_budget_tokens: int = 128
    tile_tokens: int = 64
    scored_queries: int = 0
    dense_first_layers: int = 1

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        if not 0 <= self.budget_fraction <= 1:
            raise SchemeConfigError(f"budget_fraction must lie between 0 and 1, got {self.budget_fraction}")
        if self.tile_tokens < 1 or self.tile_tokens & (self.tile_tokens - 1):
            raise SchemeConfigError(f"tile_tokens must be a power of two, got {self.tile_tokens}")


class ExactTopk(Scheme):
    """The keys with the most exact attention, per tile of queries and KV head, in every layer.

    What Kascade's anchors do (arXiv:2512.16391, section 3), with every layer an anchor: the oracle
    that other schemes are measured by, and a choice for models that have no profile.

    A tile of a prompt always reads its own tokens. In decode nothing is forced in, the newest token
    neither, unless ``window_tokens`` is set.
    """

    name: ClassVar[str] = "exact_topk"
    source: ClassVar[str] = "anchors of Kascade, arXiv:2512.16391, in every layer"
    Options: ClassVar[type[SchemeOptions]] = ExactTopkOptions
    options: ExactTopkOptions
    pools_queries: ClassVar[bool] = True
    same_in_decode: ClassVar[bool] = False
    pool: Pool = "group"

    def __init__(self, options: ExactTopkOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        self.tile = options.tile_tokens
        # Beside a window the newest token would be neither kept nor a candidate.
        self.keeps_own_token = options.window_tokens > 0

    def roles(self, num_layers: int) -> tuple[LayerRole, ...]:
        whole = min(self.options.dense_first_layers, num_layers)
        return (LayerRole(Role.DENSE),) * whole + (LayerRole(Role.SELECT),) * (num_layers - whole)

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        return self._select(query, view, tiles, layer, Phase.PREFILL)

    def select_decode(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        return self._select(query, view, tiles, layer, Phase.DECODE)

    def _select(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall, phase: Phase) -> Selection:
        # Layers with a window of their own are read whole, but where one is an anchor it is scored as others are.
        spec = layer.spec if layer.spec.band == CAUSAL else replace(layer.spec, band=CAUSAL)
        ranking = self.ranking(tiles, phase)
        wanted = self.options.scored_queries if phase is Phase.PREFILL else 0
        scored = tiles.every(max(1, self.tile // wanted)) if wanted else tiles
        chosen = ops.pooled_topk(query, view, scored, spec, ranking.candidates, ranking.budgets, pool=self.pool)
        return chosen if scored is tiles else replace(chosen, tiles=tiles)

    def ranking(self, tiles: Tiles, phase: Phase) -> Ranking:
        key = ("ranking", self, phase)
        if key not in tiles.plans:
            budgets = tuple(self._budget(position, phase) for *_, position in tiles.host)
            tiles.plans[key] = Ranking(budget.free_units(tiles, self, 1, phase), budgets, self.pool)
        found: Ranking = tiles.plans[key]
        return found

    def _budget(self, position: int, phase: Phase) -> int:
        options = self.options
        if options.budget_tokens:
            return options.budget_tokens
        keys = position + 1 if phase is Phase.DECODE else position // self.tile * self.tile
        return max(options.min_budget_tokens, int(options.budget_fraction * keys))
