"""An observer that keeps what each layer read."""

from __future__ import annotations

from foveate.sparse_attn.selection import Plan


class Seen:
    """``plans[layer]`` is what the first segment of a layer read."""

    def __init__(self) -> None:
        self.plans: dict[int, Plan | None] = {}

    def see(self, query, view, layer, group, segments, lse):
        self.plans[layer.index] = segments[0].keys
