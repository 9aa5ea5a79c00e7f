"""Weights of a linear layer in 8 or 4 bits, in the one layout that the compiled kernels read for one row and many.

Output channels lie in blocks of 16 and input channels in fours, side by side, padded by zeros; see
``sparse_attn/ops/native/linear.h``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

BLOCK = 16  # output channels side by side
DEPTH = 64  # input channels are padded to a multiple of it
GROUP = 32  # input channels that share a step and a zero in 4 bits


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
    """Asymmetric, in groups of 32 input channels: 16 even steps from the lowest weight of a group to the highest.

    Steps and zeros are bfloat16, so a weight takes 5 bits.

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
        lowest, highest = grouped.amin(2), grouped.amax(2)
        # As the kernels read them; values are rounded with what is left of both after bfloat16.
        zeros = lowest.bfloat16().float()
        steps = ((highest - zeros) / 15).clamp_min(0).bfloat16().float()
        divisors = torch.where(steps > 0, steps, 1.0)
        values = ((grouped - zeros[..., None]) / divisors[..., None]).round().clamp(0, 15).to(torch.uint8)
        shape = (channels // BLOCK, BLOCK, depth // GROUP)
        fours = values.view(*shape, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
        packed = (fours[:, :, :4] | fours[:, :, 4:] << 4).contiguous()
        groups = torch.stack([steps, zeros], dim=-1).view(*shape, 2).permute(0, 2, 3, 1)
        return cls(weight.shape[1], weight.shape[0], packed, groups.bfloat16().contiguous())

    def exact(self) -> torch.Tensor:
        """The weight that the values stand for, float32 ``[N, K]``."""
        blocks, groups = self.values.shape[:2]
        fours = torch.cat([self.values & 15, self.values >> 4], dim=2).float()  # [N/16, K/32, 8, 16, 4]
        steps, zeros = self.groups.float()[:, :, :, None, :, None].unbind(2)
        rows = (fours * steps + zeros).permute(0, 3, 1, 2, 4).reshape(blocks * BLOCK, groups * GROUP)
        return rows[: self.out_channels, : self.in_channels]


Weight = Int8Weight | Int4Weight


def _padded(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape
    return functional.pad(weight.detach().float(), (0, -columns % DEPTH, 0, -rows % BLOCK))
