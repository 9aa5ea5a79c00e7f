"""Dense attention: every key is read."""

from __future__ import annotations

from typing import ClassVar

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import LayerCall, LayerRole, Role, Scheme, SchemeOptions
from ..selection import Selection, Tiles


class Dense(Scheme):
    """Reads every key in the model's own band: the measure for all other schemes."""

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = "Vaswani et al., Attention Is All You Need, arXiv:1706.03762"

    def roles(self, num_layers: int) -> tuple[LayerRole, ...]:
        return (LayerRole(Role.DENSE),) * num_layers

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        raise RuntimeError("a dense layer selects nothing")

    select_decode = select_prefill


# What schemes hand a phase to that they leave dense: one object, so that all of it is one call of the kernels.
DENSE = Dense(SchemeOptions())
