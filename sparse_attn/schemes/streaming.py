"""StreamingLLM: the first tokens (attention sinks) and a window of the last ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from foveate.kv_cache.view import PagedView

from ..errors import SchemeConfigError
from ..profile import Profile
from ..protocol import LayerCall, LayerRole, Role, Scheme, SchemeOptions
from ..selection import Band, Plan, Segment, Selection, Tiles


@dataclass(frozen=True, slots=True)
class StreamingOptions(SchemeOptions):
    """
    Args:
        budget_tokens: Keys that each query reads: the sinks and the window, the query's own key included.
        sink_tokens: First tokens of the context (4 in the paper).
        window_tokens: 0: the window is what the sinks leave of the budget.
        positions: ``cache`` gives keys the positions they would have in a cache of
            ``budget_tokens`` (the paper's form: distances never exceed what the model was trained
            on); ``text`` keeps the positions of the text.
    """

    budget_tokens: int = 1024
    sink_tokens: int = 4
    positions: Literal["cache", "text"] = "cache"

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        if self.window_tokens:
            raise SchemeConfigError("streaming's window is budget_tokens - sink_tokens; leave window_tokens at 0")
        if self.budget_tokens <= self.sink_tokens:
            raise SchemeConfigError(
                f"budget_tokens must exceed sink_tokens, got {self.budget_tokens} and {self.sink_tokens}"
            )
        if self.positions not in ("cache", "text"):
            raise SchemeConfigError(f"positions must be 'cache' or 'text', got {self.positions!r}")


class Streaming(Scheme):
    """Attention sinks and a sliding window (Xiao et al., arXiv:2309.17453, section 3.2).

    The cache of ``n`` entries holds the sinks and the last ``n - sinks`` tokens, and positions
    are those *in the cache*. Relative to the query, window keys then stand at their true
    distance, and sink ``t`` at ``n - 1 - t``. The second part needs no other keys, only the query
    rotated as if it stood at ``n - 1``: two segments over one cache of rotated keys.
    """

    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv:2309.17453"
    Options: ClassVar[type[SchemeOptions]] = StreamingOptions
    options: StreamingOptions

    # The window segment reads a tile's own tokens; among the sinks they would stand twice.
    keeps_own_tile = False
    keeps_own_token = False

    def __init__(self, options: StreamingOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        self.moves_positions = options.positions == "cache"

    def roles(self, num_layers: int) -> tuple[LayerRole, ...]:
        """The same keys in every layer, so the first chooses for all."""
        return (LayerRole(Role.SELECT),) + (LayerRole(Role.REUSE, 0),) * (num_layers - 1)

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        rows = (len(tiles), view.num_kv_heads)
        indices = torch.full((*rows, 1), -1, dtype=torch.int32, device=query.device)
        return Selection(indices, torch.zeros(rows, dtype=torch.int32, device=query.device), 1, tiles)

    select_decode = select_prefill

    def segments(self, plan: Plan, band: Band) -> tuple[Segment, ...]:
        window = self.options.budget_tokens - self.options.sink_tokens
        cap = self.options.budget_tokens - 1 if self.moves_positions else None
        return (
            Segment(None, Band(0, window).within(band)),
            Segment(plan, Band(window, None).within(band), cap),
        )
