"""Kascade's calibration: how alike layers and heads choose, which layers to anchor, and the head map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from foveate.kv_cache.view import PagedView

from .. import ops
from ..errors import SchemeConfigError
from ..protocol import LayerCall, Phase, StepGroup
from ..selection import CAUSAL, Segment
from .anchors import choose_anchors, gained, head_map
from .base import CalibrationOptions, Calibrator, ModelShape
from .holdings import Holdings, Maps, Mass, Similarity


@dataclass(frozen=True, slots=True)
class KascadeCalibration(CalibrationOptions):
    """
    The paper's calibration is ``objective=similarity``, ``top_tokens=64``, and 5 anchors of 32 layers.

    Args:
        objective: ``mass`` keeps the most attention, of what is not read anyway, in all layers
            together (ours); ``similarity`` is the paper's share of the worst tile, times importance.
            For SmolLM2-135M the latter puts three of five anchors into the first four layers, and
            no planted fact is found.
        anchors: Anchor layers that the profile proposes; 0: as ``kept`` says.
        kept: The fewest anchors whose choices hold this share of what holds if every layer chooses
            for itself (ours). Layers of small models are less alike than those of large ones.
        top_tokens: Keys per tile and head that are a choice (kappa in the paper).
        tile_tokens: Queries per tile.
        decode_tokens: Last tokens of each sample, each a tile of its own, as in decode.
        sink_tokens: With ``mass``: first tokens of the context, read anyway.
        window_tokens: With ``mass``: last tokens before a tile, read anyway.
    """

    objective: Literal["mass", "similarity"] = "mass"
    anchors: int = 0
    kept: float = 0.95
    top_tokens: int = 256
    tile_tokens: int = 32
    decode_tokens: int = 64
    sink_tokens: int = 64
    window_tokens: int = 256

    def __post_init__(self) -> None:
        CalibrationOptions.__post_init__(self)
        if self.objective not in ("mass", "similarity"):
            raise SchemeConfigError(f"objective must be 'mass' or 'similarity', got {self.objective!r}")
        if not 0 < self.kept <= 1:
            raise SchemeConfigError(f"kept must be above 0 and at most 1, got {self.kept}")
        if not self.top_tokens or not self.tile_tokens:
            raise SchemeConfigError("top_tokens and tile_tokens must be at least 1")


class KascadeCalibrator(Calibrator):
    """Collects what layers hold of each other, and their importance (arXiv:2512.16391, section 3).

    The paper's code collects while the model runs sparse already; here it runs dense, so statistics
    of late layers do not depend on what was kept in early ones. Layers with a window of their own
    are left out: they are read whole anyway. Holds the pooled maps of one chunk,
    layers * KV heads * (chunk / tile) * context float32 numbers, and
    ``layers^2 * KV heads^2`` float64 sums.
    """

    Options: ClassVar[type[CalibrationOptions]] = KascadeCalibration
    options: KascadeCalibration
    needs_residual: ClassVar[bool] = True
    samples: ClassVar[int] = 8
    sample_tokens: ClassVar[int] = 4096

    def __init__(self, options: KascadeCalibration, shape: ModelShape) -> None:
        super().__init__(options, shape)
        self.tile_tokens = options.tile_tokens
        self.decode_tokens = options.decode_tokens
        self._layers = shape.global_layers
        count, heads = len(self._layers), shape.num_kv_heads
        if options.anchors > count:
            raise SchemeConfigError(f"anchors must be at most {count}, the layers of this model without a window")
        self._place = {layer: place for place, layer in enumerate(self._layers)}
        self._holdings: Holdings = (
            Similarity(count, heads, options.top_tokens)
            if options.objective == "similarity"
            else Mass(count, heads, options.top_tokens, options.sink_tokens, options.window_tokens)
        )
        self._change = torch.zeros(count, dtype=torch.float64)
        self._tokens = torch.zeros(1, dtype=torch.float64)
        self._maps: list[torch.Tensor] = []
        self._most_keys = 0  # before a tile of the sample under way

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
        self._maps.append(ops.anchor_scores(query, view, tiles, replace(layer.spec, band=CAUSAL)).cpu())
        if layer.index == self._layers[-1]:
            position = tiles.position.cpu()
            starts = position // self.tile_tokens * self.tile_tokens if prefill else position + 1
            self._holdings.add(Maps(torch.stack(self._maps), starts, group.phase, len(query)))
            self._maps = []
            self._most_keys = max(self._most_keys, int(starts.max()))
            self._tokens += len(query)

    def see_residual(self, layer: int, residual: torch.Tensor, update: torch.Tensor) -> None:
        if layer not in self._place:
            return
        before, after = residual.float(), residual.float() + update.float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        self._change[self._place[layer]] += (1 - cosine).double().sum().cpu()

    def end_sample(self) -> None:
        """
        Raises:
            SchemeConfigError: no tile had more keys to choose from than ``top_tokens``, and so any layer's choice
                would do for all others.
        """
        needed, tile = self._holdings.kept_tokens + self.options.top_tokens + 1, self.tile_tokens
        if self._most_keys < needed:
            # A generated token counts itself; of a prompt's tile only what lies before it counts.
            length = needed if self.decode_tokens else -(-needed // tile) * tile + 1
            raise SchemeConfigError(
                f"kascade needs samples of at least {length} tokens to learn from: in shorter ones a tile may choose "
                "every key that it does not read anyway"
            )
        self._most_keys = 0
        self._holdings.end_sample()

    def result(self) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        if not self._tokens:
            raise SchemeConfigError("no sample was seen, so there is nothing to learn from")
        held, importance = self._holdings.mean(), self._change / self._tokens
        layers = held.amax(-1).mean(-1)
        gain = layers * importance if self._holdings.weighs_layers else layers.clone()
        if not self._holdings.weighs_layers and self._layers[0] == 0 and len(self._layers) > 1:
            gain[:, 0] = 0.0  # layer 0 is read whole
        index = torch.tensor(self._layers, dtype=torch.int32)
        tensors = {"global_layers": index, "layer_holdings": layers.float(), "importance": importance.float()}
        chosen, most = self.options.anchors, gained(gain, range(len(self._layers)))
        for number in range(1, len(self._layers) + 1):
            anchors = choose_anchors(gain, number)
            tensors[f"anchors.{number}"] = index[anchors]
            tensors[f"head_map.{number}"] = self._spread(head_map(held, anchors))
            if not chosen and gained(gain, anchors) >= self.options.kept * most:
                chosen = number
        return {"chosen_anchors": chosen}, tensors

    def _spread(self, learnt: torch.Tensor) -> torch.Tensor:
        """A head map of the layers that were looked at, as one of all layers; identity for the others."""
        full = torch.arange(self.shape.num_kv_heads, dtype=torch.int32).repeat(self.shape.num_layers, 1)
        full[list(self._layers)] = learnt
        return full

    def state(self) -> Mapping[str, torch.Tensor]:
        return {**self._holdings.state(), "change": self._change, "tokens": self._tokens}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._holdings.restore(state)
        self._change, self._tokens = state["change"].clone(), state["tokens"].clone()
