"""Weights of a linear layer in 8 or 4 bits, in the one layout that the compiled kernels read for one row and many.

Output channels lie in blocks of 16 and input channels in fours, side by side, padded by zeros; see
``sparse_attn/ops/native/linear.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

BLOCK = 16  # output channels side by side
DEPTH = 64  # input channels are padded to a multiple of it
GROUP = 32  # input channels that share a step and a zero in 4 bits
REFITS = 2  # of step and zero to the rounded weights; a third gains nothing
PIECE = 16  # groups that share a unit where weights of 4 bits are multiplied as bytes
# What bytes may add to the squared error of 4 bits. By their steps it is 0.9 to 1.5 % for layers of SmolLM2, 1 to 10 %
# for those of Qwen2.5-Coder 1.5B, and 14 % where one input channel of 1,024 has weights 30 times those of the others.
MOST_ADDED = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight:
    """Symmetric, a scale per output channel: the largest weight of a channel becomes 127.

    Attributes:
        in_channels: K.
        out_channels: N.
        values: int8 ``[N/16, K/4, 16, 4]``, K padded to 64.
        scales: float32 ``[N]``, N padded to 16.
        sums: int32 ``[N]``, padded too: of the values of each channel.
    """

    in_channels: int
    out_channels: int
    values: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Weight:
        """Rounds a weight ``[N, K]`` of any floating type."""
        exact = _padded(weight)
        scales = exact.abs().amax(1) / 127
        values = (exact / torch.where(scales > 0, scales, 1.0)[:, None]).round().to(torch.int8)
        channels, depth = values.shape
        packed = values.view(channels // BLOCK, BLOCK, depth // 4, 4).transpose(1, 2).contiguous()
        sums = values.sum(1, dtype=torch.int32)
        return cls(weight.shape[1], weight.shape[0], packed, scales, sums)

    def exact(self) -> torch.Tensor:
        """The weight that the values stand for, float32 ``[N, K]``."""
        blocks, fours = self.values.shape[:2]
        rows = self.values.transpose(1, 2).reshape(blocks * BLOCK, fours * 4)
        return (rows.float() * self.scales[:, None])[: self.out_channels, : self.in_channels]


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight:
    """Asymmetric, in groups of 32 input channels: 16 even steps from about the lowest weight of a group to the highest.

    Weights are rounded to the nearest step, then step and zero are fitted to them by least squares, twice: a fifth
    less squared error than from the ends of the range alone. Both are bfloat16, so a weight takes 5 bits.

    Attributes:
        in_channels: K.
        out_channels: N.
        values: uint8 ``[N/16, K/32, 4, 16, 4]``: low nibbles hold the first half of a group, high ones the second.
        groups: bfloat16 ``[N/16, K/32, 2, 16]``: the step, and what 0 stands for.
    """

    in_channels: int
    out_channels: int
    values: torch.Tensor
    groups: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int4Weight:
        """Rounds a weight ``[N, K]`` of any floating type."""
        exact = _padded(weight)
        channels, depth = exact.shape
        grouped = exact.view(channels, depth // GROUP, GROUP)
        zeros = _as_stored(grouped.amin(2))
        steps = _as_stored((grouped.amax(2) - zeros).clamp_min(0) / 15)
        values = _to_nearest(grouped, steps, zeros)
        for _ in range(REFITS):
            steps, zeros = _refit(grouped, values, steps, zeros)
            values = _to_nearest(grouped, steps, zeros)
        shape = (channels // BLOCK, BLOCK, depth // GROUP)
        fours = values.to(torch.uint8).view(*shape, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
        packed = (fours[:, :, :4] | fours[:, :, 4:] << 4).contiguous()
        groups = torch.stack([steps, zeros], dim=-1).view(*shape, 2).permute(0, 2, 3, 1)
        return cls(weight.shape[1], weight.shape[0], packed, groups.bfloat16().contiguous())

    def exact(self) -> torch.Tensor:
        """The weight that the values stand for, float32 ``[N, K]``."""
        fours, steps, zeros = self._parts()
        return self._in_rows(fours * steps + zeros)

    def as_bytes(self) -> torch.Tensor:
        """The same as kernels with dot products of bytes take it for many rows, float32 ``[N, K]``.

        An output channel has a unit in ``PIECE`` groups, a 127th of its largest weight there. Step and zero are rounded
        to 256ths of it, and what they make to whole units.
        """
        fours, steps, zeros = self._parts()
        largest = _largest(steps, zeros)
        parts = torch.tensor(127.0 * 256.0) / largest.clamp_min(2.0**-100)  # smaller ones count as nothing
        levels = ((fours * (steps * parts).round() + (zeros * parts).round() + 128) / 256).floor()
        return self._in_rows(levels * (largest / 127))

    @property
    def fits_bytes(self) -> bool:
        """Whether units are so small beside the steps that ``as_bytes`` adds at most ``MOST_ADDED``."""
        steps, zeros = self.groups.float().unbind(2)
        units = _largest(steps, zeros) / 127
        return bool((units * units).sum() <= MOST_ADDED * (steps * steps).sum())  # both as rounding errors of 1/12

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values ``[N/16, K/32, 8, 16, 4]``, steps and zeros ``[N/16, K/32, 1, 16, 1]``, all float32."""
        fours = torch.cat([self.values & 15, self.values >> 4], dim=2).float()
        steps, zeros = self.groups.float()[:, :, :, None, :, None].unbind(2)
        return fours, steps, zeros

    def _in_rows(self, fours: torch.Tensor) -> torch.Tensor:
        blocks, groups = fours.shape[:2]
        rows = fours.permute(0, 3, 1, 2, 4).reshape(blocks * BLOCK, groups * GROUP)
        return rows[: self.out_channels, : self.in_channels]


def _largest(steps: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The largest weight of each group's piece, as ``zeros [N/16, K/32, ...]``."""
    ends = torch.maximum(zeros.abs(), (15 * steps + zeros).abs())
    pieces = [ends[:, first : first + PIECE] for first in range(0, ends.shape[1], PIECE)]
    return torch.cat([piece.amax(1, keepdim=True).expand_as(piece) for piece in pieces], dim=1)


Weight = Int8Weight | Int4Weight

# Output channels per entry of a weight's tensors, which lie in the order of the channels.
_CHANNELS = {Int8Weight: {"values": BLOCK, "scales": 1, "sums": 1}, Int4Weight: {"values": BLOCK, "groups": BLOCK}}


def join(weights: Sequence[Weight]) -> Weight:
    """The output channels of weights of one kind one below the other; each has whole blocks of them."""
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(weight, name) for weight in weights]) for name in _CHANNELS[type(weights[0])]
    }
    return replace(weights[0], out_channels=sum(weight.out_channels for weight in weights), **tensors)


def cut(weight: Weight, first: int, channels: int) -> Weight:
    """Some of its output channels, whole blocks, as views."""
    tensors: dict[str, Any] = {
        name: getattr(weight, name)[first // per : (first + channels) // per]
        for name, per in _CHANNELS[type(weight)].items()
    }
    return replace(weight, out_channels=channels, **tensors)


def _as_stored(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def _to_nearest(grouped: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    divisors = torch.where(steps > 0, steps, 1.0)
    return ((grouped - zeros[..., None]) / divisors[..., None]).round_().clamp_(0, 15)


def _refit(
    grouped: torch.Tensor, values: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step and zero with the least squared error for these values; as they were where all values are equal."""
    mean, mean_value = grouped.mean(2), values.mean(2)
    spread = (values * values).mean(2) - mean_value * mean_value
    fitted = ((values * grouped).mean(2) - mean_value * mean) / torch.where(spread > 0, spread, 1.0)
    fits = (spread > 0) & (fitted > 0)
    steps = torch.where(fits, _as_stored(fitted), steps)
    return steps, torch.where(fits, _as_stored(mean - steps * mean_value), zeros)


def _padded(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return functional.pad(weight.detach().float(), (0, -columns % DEPTH, 0, -rows % BLOCK))
