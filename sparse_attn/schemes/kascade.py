"""Kascade: exact scores at a few anchor layers, whose choice the layers between them reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..errors import CalibrationMissing, ProfileError, SchemeConfigError
from ..ops.anchor import Pool
from ..profile import Profile
from ..protocol import LayerCall, LayerRole, Role, SchemeOptions
from .exact_topk import ExactTopk, ExactTopkOptions

if TYPE_CHECKING:
    from ..calibration.base import Calibrator, ModelShape

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class KascadeOptions(ExactTopkOptions):
    """
    Beside those of ``exact_topk``; ``scored_queries`` 0 and ``dense_first_layers`` 1 are the paper's.

    Args:
        pool: ``group`` chooses per KV head, pooled over its query heads; ``all`` pools over all
            heads, so every head reads the same keys (the paper's variant without a head map).
        anchors: Number of anchor layers; 0 takes the profile's own.
        uncalibrated: Without a profile, so many evenly spaced layers are anchors, with
            ``pool="all"``: a stopgap of ours. 0 refuses instead.
    """

    tile_tokens: int = 32
    pool: Pool = "group"
    anchors: int = 0
    uncalibrated: int = 0

    def __post_init__(self) -> None:
        ExactTopkOptions.__post_init__(self)
        if self.pool not in ("group", "all"):
            raise SchemeConfigError(f"pool must be 'group' or 'all', got {self.pool!r}")


class Kascade(ExactTopk):
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

    def __init__(self, options: KascadeOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        if self.profile is None and not options.uncalibrated:
            raise CalibrationMissing(self.name)
        self.pool = options.pool if self.profile is not None else "all"
        self._anchors: tuple[int, ...] = ()
        # Per device one row per layer; ``None`` where every KV head reads its own row.
        self._head_maps: dict[torch.device, tuple[torch.Tensor | None, ...]] = {_CPU: ()}
        if self.profile is not None:
            self._anchors, head_map = _learnt(self.profile, options.anchors)
            if self.pool == "group":
                identity = torch.arange(head_map.shape[1])
                rows = (None if torch.equal(row, identity) else row for row in head_map.long())
                self._head_maps[_CPU] = tuple(rows)

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

    def head_map(self, layer: LayerCall, device: torch.device) -> torch.Tensor | None:
        maps = self._maps_on(device)
        return maps[layer.index] if layer.index < len(maps) else None

    def _maps_on(self, device: torch.device) -> tuple[torch.Tensor | None, ...]:
        if device not in self._head_maps:
            on_host = self._head_maps[_CPU]
            self._head_maps[device] = tuple(None if row is None else row.to(device) for row in on_host)
        return self._head_maps[device]


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
