"""Which layers to anchor, given what each layer gains from the choice of each earlier one; and the head map."""

from __future__ import annotations

from collections.abc import Sequence

import torch


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


def gained(gain: torch.Tensor, anchors: Sequence[int]) -> float:
    """The total gain of ``anchors``."""
    return sum(float(gain[_anchor_of(layer, anchors), layer]) for layer in range(gain.shape[0]))


def head_map(held: torch.Tensor, anchors: Sequence[int]) -> torch.Tensor:
    """Per layer and KV head, the head of the layer's anchor that holds most of what it attends to.

    Args:
        held: ``[L, L, G, G]``, entry ``[a, b, y, x]``: what head x of layer a holds for head y of layer b.
        anchors: In order.

    Returns:
        ``[L, G]`` int32; identity for anchors.
    """
    layers, _, heads, _ = held.shape
    rows = []
    for layer in range(layers):
        anchor = _anchor_of(layer, anchors)
        rows.append(torch.arange(heads) if layer == anchor else held[anchor, layer].argmax(-1))
    return torch.stack(rows).int()


def _anchor_of(layer: int, anchors: Sequence[int]) -> int:
    return max(place for place in anchors if place <= layer)
