"""One scheme for the prompt, another for the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import PageStat
from foveate.kv_cache.view import PagedView

from .. import registry
from ..errors import SchemeConfigError, UnknownScheme
from ..profile import Profile
from ..protocol import LayerCall, Phase, Scheme, SchemeOptions
from ..selection import Plan, Tiles

Part = str | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ComposedOptions(SchemeOptions):
    """
    Args:
        prefill: A scheme's name, or ``{"scheme": name, option: value, ...}``; sinks, window and
            dense tail are said there.
        decode: The same for the tokens that are generated.
    """

    prefill: Part = "xattention"
    decode: Part = "quest"

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        if self.sink_tokens or self.window_tokens or self.dense_tail_tokens:
            raise SchemeConfigError("composed keeps nothing itself: give sinks, window and dense tail to its parts")
        for phase in Phase:
            part = getattr(self, phase.value)
            name = part.get("scheme") if isinstance(part, Mapping) else part
            if not isinstance(name, str):
                raise SchemeConfigError(f'{phase.value} must be a scheme\'s name or {{"scheme": ...}}, got {part!r}')
            if name == "composed":
                raise SchemeConfigError(f"{phase.value}: composed takes schemes that are not composed themselves")


class Composed(Scheme):
    """Acts as one scheme in prefill and as another in decode, each with options of its own."""

    name: ClassVar[str] = "composed"
    source: ClassVar[str] = "made of two schemes"
    Options: ClassVar[type[SchemeOptions]] = ComposedOptions
    same_in_decode: ClassVar[bool] = False
    options: ComposedOptions

    def __init__(self, options: ComposedOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        """
        Raises:
            UnknownScheme: a part names no scheme; the message begins with the part's name.
            SchemeConfigError: an option of a part is unknown or out of range; likewise.
            CalibrationMissing: a part needs a profile.
        """
        super().__init__(options, profiles)
        self._parts = {phase: _build(phase, getattr(options, phase.value), profiles) for phase in Phase}
        self.moves_positions = any(part.moves_positions for part in self._parts.values())

    @property
    def identity(self) -> str:
        return "\0".join((self.name, *(part.identity for part in self._parts.values())))

    def for_phase(self, phase: Phase) -> Scheme:
        return self._parts[phase].for_phase(phase)

    def page_stats(self, geometry: CacheGeometry) -> tuple[PageStat, ...]:
        return tuple(dict.fromkeys(stat for part in self._parts.values() for stat in part.page_stats(geometry)))

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Plan:
        return self._parts[Phase.PREFILL].select_prefill(query, view, tiles, layer)

    def select_decode(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Plan:
        return self._parts[Phase.DECODE].select_decode(query, view, tiles, layer)


def _build(phase: Phase, part: Part, profiles: Mapping[str, Profile] | None) -> Scheme:
    options = {"scheme": part} if isinstance(part, str) else dict(part)
    try:
        return registry.build(options.pop("scheme"), profiles, **options)
    except (UnknownScheme, SchemeConfigError) as error:
        raise type(error)(f"{phase.value}: {error}") from error
