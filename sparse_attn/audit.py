"""The audit: how much of the attention that dense attention would pay did a selection keep?

Asked of a share of the decode steps, in a few layers of each, while they are computed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from foveate.kv_cache.view import PagedView

from . import ops
from .protocol import LayerCall, Phase, Role, Scheme, StepGroup
from .selection import ScoreThreshold, Segment

# Layers that read everything once more in an audited step.
LAYERS_PER_STEP = 2


def mass_kept(
    query: torch.Tensor, view: PagedView, layer: LayerCall, segments: Sequence[Segment], lse: torch.Tensor
) -> torch.Tensor:
    """Share of the dense attention's probability that lies on the keys which were read.

    The dense distribution is that over all keys in the layer's band, learned sinks left out, under
    the query as the model rotated it. A scheme that reads keys at other positions is measured by
    the same distribution: its keys are scored once more where the model has them.

    Args:
        query: ``[S, H, D]``, one per sequence.
        view: Keys of this step are written.
        layer: Which layer, and its facts.
        segments: What was read.
        lse: ``[S, H]`` float32, log-sum-exp of the logits as they were read.

    Returns:
        ``[S, H]`` float32 from 0 to 1.

    Raises:
        ValueError: a segment chooses by the scores of moved queries, so which keys it read is unknown.
    """
    spec = replace(layer.spec, sinks=None)
    _, dense = ops.decode(query, view, None, spec)
    if any(segment.position_cap is not None for segment in segments):
        parts = []
        for segment in segments:
            if isinstance(segment.keys, ScoreThreshold):
                raise ValueError("thresholds on scores of moved queries cannot be audited")
            parts.append(ops.decode(query, view, segment.keys, replace(spec, band=segment.band))[1])
        lse = torch.logsumexp(torch.stack(parts), dim=0)
    # Two sums of the same numbers in another order differ in the last bits; a share is at most 1.
    return torch.exp(lse - dense).clamp(max=1.0)


class StepAudit:
    """Observes one step.

    Args:
        layers: By scheme (its id), the layers that are measured.
        owners: Rows of the step's ``keys_read``.
        device: Where the step is computed.

    Attributes:
        kept: ``[owners, 2]`` float64: mass kept, a mean over heads, summed over the layers measured;
            and the number of these layers, 0 for an owner that decoded nothing.
    """

    def __init__(self, layers: dict[int, frozenset[int]], owners: int, device: torch.device) -> None:
        self._layers = layers
        self.kept = torch.zeros(owners, 2, dtype=torch.float64, device=device)

    def see(
        self,
        query: torch.Tensor,
        view: PagedView,
        layer: LayerCall,
        group: StepGroup,
        segments: Sequence[Segment],
        lse: torch.Tensor,
    ) -> None:
        if group.phase is Phase.DECODE and layer.index in self._layers.get(id(group.scheme), ()):
            self.book(group, mass_kept(query, view, layer, segments, lse).double().mean(1))

    def book(self, group: StepGroup, mass: torch.Tensor) -> None:
        """Adds one layer's ``mass`` ``[S]`` to the owners of a group's sequences."""
        self.kept.index_add_(0, group.owner_index(self.kept.device), torch.stack([mass, torch.ones_like(mass)], dim=1))


class Audit:
    """Chooses the steps and layers that are measured; the same ones in every run.

    An audited step costs, for ``LAYERS_PER_STEP`` of the model's layers, one dense decode attention
    each, and for a scheme that moves positions one more attention over its selection; it waits for
    no device. A scheme that reads everything everywhere has mass 1 by definition, and is not computed.

    Args:
        rate: Share of the decode steps, 0 to 1.
        windows: Per layer, the model's own sliding window or ``None``. Layers that have one are
            read whole, so there is nothing to measure.
        seed: Of the choice.

    Raises:
        ValueError: ``rate`` is not a share.
    """

    def __init__(self, rate: float, windows: Sequence[int | None], seed: int = 0) -> None:
        if not 0 <= rate <= 1:
            raise ValueError(f"audit_rate must be from 0 to 1, got {rate}")
        self._rate = rate
        self._windows = tuple(windows)
        self._random = random.Random(seed)

    def begin(self, groups: Sequence[StepGroup], owners: int, device: torch.device) -> StepAudit | None:
        """The observer of a step, or ``None`` if the step is not audited."""
        if not self._rate:
            return None
        decoding = [group for group in groups if group.phase is Phase.DECODE]
        if not decoding or self._random.random() >= self._rate:
            return None
        layers: dict[int, frozenset[int]] = {}
        audit = StepAudit(layers, owners, device)
        for group in decoding:
            selecting = self._selecting(group.scheme)
            chosen = self._random.sample(selecting, min(LAYERS_PER_STEP, len(selecting)))
            layers[id(group.scheme)] = frozenset(chosen)
            if not chosen:
                audit.book(group, torch.ones(len(group.owners), dtype=torch.float64, device=device))
        return audit

    def _selecting(self, scheme: Scheme | None) -> list[int]:
        if scheme is None:
            return []
        roles = scheme.roles(len(self._windows))
        return [
            index
            for index, (role, window) in enumerate(zip(roles, self._windows, strict=True))
            if window is None and role.role in (Role.SELECT, Role.REUSE)
        ]
