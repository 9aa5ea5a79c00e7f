"""Kascade: exact scores at a few anchor layers, whose choice the layers between them reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from foveate.kv_cache.view import PagedView

from .. import budget, ops
from ..errors import CalibrationMissing, ProfileError, SchemeConfigError
from ..profile import Profile
from ..protocol import LayerCall, LayerRole, Phase, Role, Scheme, SchemeOptions
from ..selection import CAUSAL, Plan, Selection, Tiles

if TYPE_CHECKING:
    from ..calibration.base import Calibrator, ModelShape


@dataclass(frozen=True, slots=True)
class KascadeOptions(SchemeOptions):
    """
    The paper's pure form has ``sink_tokens``, ``window_tokens`` and ``dense_tail_tokens`` 0; what
    these keep comes on top of the budget, and keeps a small budget from losing the answer.

    Args:
        sink_tokens: First tokens of the context, always read (ours).
        window_tokens: Last tokens before a query's tile, always read (ours).
        dense_tail_tokens: Last tokens of the prompt, whose queries read every key (ours).
        budget_tokens: Keys to choose per query tile and KV head; 0 takes ``budget_fraction``.
        budget_fraction: The same as a share of the keys: before the tile in prefill (the paper's
            rolling budget), of the context in decode.
        min_budget_tokens: Least that the share comes to.
        tile_tokens: Queries that share a choice in prefill, a power of two. Larger is cheaper.
        scored_queries: Queries of a tile, its last, that an anchor scores and pools (ours: scoring is
            what an anchor costs, and it costs by the query); 0 takes all, as the paper does.
        pool: ``group`` chooses per KV head, pooled over its query heads; ``all`` pools over all
            heads, so every head reads the same keys (the paper's variant without a head map).
        anchors: Number of anchor layers; 0 takes the profile's own.
        dense_first_layers: First layers, read whole (the paper: 1, since their attention is flat).
        uncalibrated: Without a profile, so many evenly spaced layers are anchors, with
            ``pool="all"``: a stopgap of ours. 0 refuses instead.
    """

    sink_tokens: int = 64
    window_tokens: int = 256
    dense_tail_tokens: int = 128
    budget_tokens: int = 0
    budget_fraction: float = 0.1
    min_budget_tokens: int = 128
    tile_tokens: int = 32
    scored_queries: int = 0
    pool: Literal["group", "all"] = "group"
    anchors: int = 0
    dense_first_layers: int = 1
    uncalibrated: int = 0

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        fraction = self.budget_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise SchemeConfigError(f"budget_fraction must lie between 0 and 1, got {fraction!r}")
        if self.tile_tokens < 1 or self.tile_tokens & (self.tile_tokens - 1):
            raise SchemeConfigError(f"tile_tokens must be a power of two, got {self.tile_tokens}")
        if self.pool not in ("group", "all"):
            raise SchemeConfigError(f"pool must be 'group' or 'all', got {self.pool!r}")
        for name in ("scored_queries", "anchors", "dense_first_layers", "uncalibrated"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise SchemeConfigError(f"{name} must be a whole number >= 0, got {value!r}")


class Kascade(Scheme):
    """Exact post-softmax top-k at anchor layers, reused in between (arXiv:2512.16391, section 3).

    An anchor scores every earlier key of a tile of queries exactly, pools the probabilities over
    tile and GQA group, and keeps the best; layers up to the next anchor read the same positions,
    each KV head those of the anchor's head that resembles it most. Which layers are anchors, and
    which head resembles which, is in the profile. Layer 0 is an anchor that is read whole itself.

    A tile of a prompt always reads its own tokens. In decode nothing is forced in, the newest token
    neither, unless ``window_tokens`` is set.
    """

    name: ClassVar[str] = "kascade"
    source: ClassVar[str] = "Kascade, arXiv:2512.16391"
    Options: ClassVar[type[SchemeOptions]] = KascadeOptions
    options: KascadeOptions
    calibrated: ClassVar[bool] = True
    pools_queries: ClassVar[bool] = True
    same_in_decode: ClassVar[bool] = False

    def __init__(self, options: KascadeOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        if self.profile is None and not options.uncalibrated:
            raise CalibrationMissing(self.name)
        self.tile = options.tile_tokens
        # Beside a window the newest token would be neither kept nor a candidate.
        self.keeps_own_token = options.window_tokens > 0
        self._pool = options.pool if self.profile is not None else "all"
        self._anchors: tuple[int, ...] = ()
        # One row per layer; ``None`` where every KV head reads its own row.
        self._head_maps: tuple[torch.Tensor | None, ...] = ()
        if self.profile is not None:
            self._anchors, head_map = _learnt(self.profile, options.anchors)
            if self._pool == "group":
                identity = torch.arange(head_map.shape[1])
                self._head_maps = tuple(None if torch.equal(row, identity) else row for row in head_map.long())

    @classmethod
    def calibrator(cls, shape: ModelShape, options: Mapping[str, Any]) -> Calibrator:
        from ..calibration.kascade import KascadeCalibration, KascadeCalibrator
        from ..protocol import options_from

        return KascadeCalibrator(options_from(KascadeCalibration, options), shape)

    def roles(self, num_layers: int) -> tuple[LayerRole, ...]:
        anchors = [anchor for anchor in self._anchors if anchor < num_layers]
        if self.profile is None:
            wanted = min(self.options.uncalibrated, num_layers)
            anchors = sorted({place * num_layers // wanted for place in range(wanted)})
        roles = []
        for layer in range(num_layers):
            earlier = [anchor for anchor in anchors if anchor <= layer]
            whole = layer < self.options.dense_first_layers
            if layer in anchors:
                roles.append(LayerRole(Role.DENSE_ANCHOR if whole else Role.SELECT))
            elif whole or not earlier:
                roles.append(LayerRole(Role.DENSE))
            else:
                roles.append(LayerRole(Role.REUSE, earlier[-1]))
        return tuple(roles)

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        return self._select(query, view, tiles, layer, Phase.PREFILL)

    def select_decode(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        return self._select(query, view, tiles, layer, Phase.DECODE)

    def remap(self, plan: Plan, layer: LayerCall) -> Plan:
        """Gives each KV head of ``layer`` the row of the anchor's head that its map names."""
        heads = self._head_maps[layer.index] if layer.index < len(self._head_maps) else None
        if heads is None or not isinstance(plan, Selection):
            return plan
        heads = heads.to(plan.indices.device, non_blocking=True)
        return replace(plan, indices=plan.indices.index_select(1, heads), counts=plan.counts.index_select(1, heads))

    def _select(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall, phase: Phase) -> Selection:
        # A profile names no anchor with a window of its own; without one the scores may come from such a layer.
        spec = replace(layer.spec, band=CAUSAL)
        candidates = budget.free_units(tiles, self, 1, phase)
        budgets = [self._budget(position, phase) for *_, position in tiles.host]
        wanted = self.options.scored_queries if phase is Phase.PREFILL else 0
        scored = tiles.last(wanted) if wanted else tiles
        chosen = ops.pooled_topk(query, view, scored, spec, candidates, budgets, pool=self._pool)
        return replace(chosen, tiles=tiles)

    def _budget(self, position: int, phase: Phase) -> int:
        options = self.options
        if options.budget_tokens:
            return options.budget_tokens
        keys = position + 1 if phase is Phase.DECODE else position // self.tile * self.tile
        return max(options.min_budget_tokens, int(options.budget_fraction * keys))


def _learnt(profile: Profile, wanted: int) -> tuple[tuple[int, ...], torch.Tensor]:
    """Anchors and head map ``[L, G]`` of a profile, for a number of anchors (0: its own choice).

    Raises:
        SchemeConfigError: it was not made for that many.
        ProfileError: its contents contradict each other.
    """
    made = sorted(int(name.partition(".")[2]) for name in profile.tensors if name.startswith("anchors."))
    count = wanted or int(profile.options.get("chosen_anchors", 0))
    if count not in made:
        raise SchemeConfigError(f"anchors must be one of those in the profile, {made}, got {count}")
    anchors = tuple(profile.tensors[f"anchors.{count}"].tolist())
    heads = profile.tensors.get(f"head_map.{count}", torch.empty(0))
    if heads.dim() != 2 or len(anchors) != count or list(anchors) != sorted({*anchors}):
        raise ProfileError("the profile for kascade names anchors twice, out of order, or without a head map")
    layers, kinds = heads.shape
    if anchors[0] < 0 or anchors[-1] >= layers or not bool(((heads >= 0) & (heads < kinds)).all()):
        raise ProfileError("the profile for kascade names layers or heads that the model does not have")
    if not bool((heads[list(anchors)] == torch.arange(kinds)).all()):
        raise ProfileError("the profile for kascade maps the heads of an anchor to others")
    return anchors, heads
