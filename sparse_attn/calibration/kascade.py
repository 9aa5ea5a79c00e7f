"""Kascade's calibration: how alike layers and heads choose, which layers to anchor, and the head map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from foveate.kv_cache.view import PagedView

from .. import ops
from ..errors import SchemeConfigError
from ..protocol import LayerCall, Phase, StepGroup
from ..selection import CAUSAL, Segment
from .base import CalibrationOptions, Calibrator, ModelShape

# Profiles hold a choice for each number of anchors up to this one.
MOST_ANCHORS = 8


@dataclass(frozen=True, slots=True)
class KascadeCalibration(CalibrationOptions):
    """
    Args:
        anchors: Anchor layers that the profile proposes; 0: as many per layer as in the paper
            (5 of 32), and 2 at least.
        top_tokens: Keys per tile and head whose probability is compared (kappa, 64 in the paper).
        tile_tokens: Queries per tile.
        decode_tokens: Last tokens of each sample, each a tile of its own, as in decode.
    """

    anchors: int = 0
    top_tokens: int = 64
    tile_tokens: int = 32
    decode_tokens: int = 16

    def __post_init__(self) -> None:
        CalibrationOptions.__post_init__(self)
        if not isinstance(self.anchors, int) or isinstance(self.anchors, bool) or not 0 <= self.anchors <= MOST_ANCHORS:
            raise SchemeConfigError(f"anchors must be a whole number from 0 to {MOST_ANCHORS}, got {self.anchors!r}")
        if not self.top_tokens or not self.tile_tokens:
            raise SchemeConfigError("top_tokens and tile_tokens must be at least 1")


class KascadeCalibrator(Calibrator):
    """Collects layer similarity and importance (arXiv:2512.16391, section 3), on dense forward passes.

    For layers a <= b, KV heads x of a and y of b and a tile, the similarity is the share of the
    probability that y's own best keys hold which x's best keys hold too, the tile's own tokens
    counted to both::

        r = (sum over top(a, x) of A(b, y) + own(b, y)) / (sum over top(b, y) of A(b, y) + own(b, y))

    its minimum over the tiles of a sample, and the mean of that over samples. The paper's code
    collects while the model runs sparse already; here it runs dense, so statistics of late layers
    do not depend on what was kept in early ones.

    Layers with a window of their own are left out: they are read whole anyway. Holds the pooled
    maps of one chunk, layers * KV heads * (chunk / tile) * context float32 numbers, and
    ``layers^2 * KV heads^2`` float64 sums.
    """

    Options: ClassVar[type[CalibrationOptions]] = KascadeCalibration
    options: KascadeCalibration
    needs_residual: ClassVar[bool] = True

    def __init__(self, options: KascadeCalibration, shape: ModelShape) -> None:
        super().__init__(options, shape)
        self.tile_tokens = options.tile_tokens
        self.decode_tokens = options.decode_tokens
        self._layers = shape.global_layers
        if not self._layers:
            raise SchemeConfigError("every layer of this model has a window of its own: nothing is left to select")
        count, heads = len(self._layers), shape.num_kv_heads
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        # [a, b, y, x]: what heads x of layer a hold of heads y of layer b.
        self._similarity = torch.zeros(count, count, heads, heads, dtype=torch.float64)
        self._change = torch.zeros(count, dtype=torch.float64)
        self._seen = torch.zeros(2, dtype=torch.float64)  # samples, tokens
        self._begin()

    def _begin(self) -> None:
        count, heads = len(self._layers), self.shape.num_kv_heads
        self._maps: list[torch.Tensor] = []
        self._own: list[torch.Tensor] = []
        self._least = torch.full((count, count, heads, heads), float("inf"))
        self._sample_change = torch.zeros(count, dtype=torch.float64)
        self._sample_tokens = 0

    def see(
        self,
        query: torch.Tensor,
        view: PagedView,
        layer: LayerCall,
        group: StepGroup,
        segments: Sequence[Segment],
        lse: torch.Tensor,
    ) -> None:
        if layer.index not in self._place:
            return
        prefill = group.phase is Phase.PREFILL
        tiles = group.tiles_of(self.tile_tokens if prefill else 1)
        pooled = ops.anchor_scores(query, view, tiles, replace(layer.spec, band=CAUSAL)).cpu()
        if prefill:
            start = tiles.position.cpu() // self.tile_tokens * self.tile_tokens
            own = torch.arange(pooled.shape[2]) >= start[:, None, None]
            self._own.append((pooled * own).sum(-1))
            pooled = pooled.masked_fill_(own, 0.0)
        else:
            self._own.append(torch.zeros(pooled.shape[:2]))
        self._maps.append(pooled)
        if layer.index == self._layers[-1]:
            found = similarity(torch.stack(self._maps), torch.stack(self._own), self.options.top_tokens)
            self._least = torch.minimum(self._least, found)
            self._maps, self._own = [], []
            self._sample_tokens += len(query)

    def see_residual(self, layer: int, residual: torch.Tensor, update: torch.Tensor) -> None:
        if layer not in self._place:
            return
        before, after = residual.float(), residual.float() + update.float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self._sample_change[self._place[layer]] += (1 - cosine).double().sum().cpu()

    def end_sample(self) -> None:
        if self._sample_tokens:
            self._similarity += self._least.double()
            self._change += self._sample_change
            self._seen += torch.tensor([1.0, self._sample_tokens], dtype=torch.float64)
        self._begin()

    def result(self) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        samples, tokens = self._seen.tolist()
        if not samples:
            raise SchemeConfigError("no sample was seen, so there is nothing to learn from")
        mean, importance = self._similarity / samples, self._change / tokens
        layers = mean.amax(-1).mean(-1)
        count = len(self._layers)
        chosen = min(self.options.anchors or max(2, round(count * 5 / 32)), count)
        index = torch.tensor(self._layers, dtype=torch.int32)
        tensors = {
            "global_layers": index,
            "layer_similarity": layers.float(),
            "importance": importance.float(),
        }
        for number in range(1, min(MOST_ANCHORS, count) + 1):
            anchors = choose_anchors(layers * importance, number)
            tensors[f"anchors.{number}"] = index[anchors]
            tensors[f"head_map.{number}"] = self._spread(head_map(mean, anchors))
        return {"chosen_anchors": chosen}, tensors

    def _spread(self, learnt: torch.Tensor) -> torch.Tensor:
        """A head map of the layers that were looked at, as one of all layers; identity for the others."""
        full = torch.arange(self.shape.num_kv_heads, dtype=torch.int32).repeat(self.shape.num_layers, 1)
        full[list(self._layers)] = learnt
        return full

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"similarity": self._similarity, "change": self._change, "seen": self._seen}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._similarity, self._change, self._seen = (state[name].clone() for name in ("similarity", "change", "seen"))


def similarity(maps: torch.Tensor, own: torch.Tensor, top_tokens: int) -> torch.Tensor:
    """Least similarity over the tiles of a chunk.

    Args:
        maps: ``[L, R, G, U]`` float32, pooled probability of the candidates of R tiles; 0 elsewhere.
        own: ``[L, R, G]``, that of the tile's own tokens.
        top_tokens: Keys per tile and head that are compared.

    Returns:
        ``[L, L, G, G]``, entry ``[a, b, y, x]`` for heads x of layer a and y of layer b; between 0
        and 1, and 0 where a > b.
    """
    layers, _, heads, units = maps.shape
    best = torch.topk(maps, min(top_tokens, units), dim=-1)
    most = best.values.sum(-1) + own  # [L, R, G]
    least = torch.zeros(layers, layers, heads, heads)
    for a in range(layers):
        chosen = best.indices[a, :, None]  # [R, 1, G (x), k]
        for b in range(a, layers):
            held = maps[b, :, :, None].expand(-1, -1, heads, -1).gather(3, chosen.expand(-1, heads, -1, -1)).sum(-1)
            # A tile without probability anywhere is held whole by any choice; rounding may exceed 1.
            share = ((held + own[b, :, :, None]) / most[b, :, :, None]).nan_to_num(1.0).clamp(0.0, 1.0)
            least[a, b] = share.amin(0)
    return least


def choose_anchors(gain: torch.Tensor, count: int) -> list[int]:
    """The ``count`` anchors with the largest total gain, by dynamic programming.

    Args:
        gain: ``[L, L]``, entry ``[a, b]`` is what layer b gains if a is the last anchor up to it.
        count: From 1 to L.

    Returns:
        Layers in order; the first is 0, since no layer stands without an anchor.
    """
    layers = gain.shape[0]
    # sums[l][i]: layers l to i - 1 read what l chose.
    sums = torch.zeros(layers, layers + 1, dtype=torch.float64)
    sums[:, 1:] = gain.double().triu().cumsum(1)
    table = sums.tolist()
    best = [0.0] + [float("-inf")] * layers
    back: list[list[int]] = []
    for _ in range(count):
        step, origin = [float("-inf")] * (layers + 1), [0] * (layers + 1)
        for end in range(1, layers + 1):
            for start in range(end):
                total = best[start] + table[start][end]
                if total > step[end]:
                    step[end], origin[end] = total, start
        best = step
        back.append(origin)
    anchors, end = [], layers
    for origin in reversed(back):
        end = origin[end]
        anchors.append(end)
    return anchors[::-1]


def head_map(mean: torch.Tensor, anchors: Sequence[int]) -> torch.Tensor:
    """Per layer and KV head, the head of the layer's anchor that holds most of what it attends to.

    Args:
        mean: ``[L, L, G, G]``, as ``similarity`` gives it.
        anchors: In order.

    Returns:
        ``[L, G]`` int32; identity for anchors.
    """
    layers, _, heads, _ = mean.shape
    rows = []
    for layer in range(layers):
        anchor = max(place for place in anchors if place <= layer)
        rows.append(torch.arange(heads) if layer == anchor else mean[anchor, layer].argmax(-1))
    return torch.stack(rows).int()
