"""How K and V rows lie in pages: as floats, or as int8 with a float32 scale per token and KV head.

int8 halves what bfloat16 takes, and nearly so what decode reads: 1 + 4 / D bytes per channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LARGEST = 127  # -128 is not used, so that a row and its negative are stored alike


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row to 255 steps of its own: ``row = scale * integers`` with ``scale = max |row| / 127``.

    Every channel is off by at most half a step, ``scale / 2``, and by 2e-5 of a step more from float32 arithmetic. A
    row whose scale would be denormal (all below 1.5e-36) becomes zeros; one that holds NaN or infinity reads as NaN.

    Args:
        rows: ``[..., D]``, any floating type.

    Returns:
        ``(integers [..., D] int8, scales [...] float32)``.
    """
    rows = rows.float()
    scales = rows.abs().amax(-1) / LARGEST
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    steps = scales[..., None]
    integers = torch.where(steps > 0, rows / steps, 0.0).round_()
    return integers.to(torch.int8), scales


def dequantize(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows ``[..., D]`` from ``integers [..., D]`` and ``scales [...]``, multiplied in float32, then rounded."""
    return (integers.float() * scales[..., None]).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """The keys or the values of one layer, read as floats whatever the pages hold.

    Attributes:
        data: ``[P, G, page_size, D]``.
        scales: ``[P, G, page_size]`` float32 where ``data`` is int8, else ``None``.
        dtype: What int8 is read as; floats are read as they are.
    """

    data: torch.Tensor
    scales: torch.Tensor | None
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """``data[index]`` as floats; ``index`` is of pages, KV heads and offsets, never of channels."""
        found = self.data[index]
        return found if self.scales is None else dequantize(found, self.scales[index], self.dtype)

    def pages(self, index: torch.Tensor) -> torch.Tensor:
        """``[n, G, page_size, D]`` of the pages ``index [n]``, copied."""
        found = self.data.index_select(0, index)
        return found if self.scales is None else dequantize(found, self.scales.index_select(0, index), self.dtype)

    def flat(self, index: torch.Tensor, length: int = 1) -> torch.Tensor:
        """``[n * length, D]``: runs of ``length`` rows side by side, copied.

        Args:
            index: ``[n]`` places, in units of ``length`` rows, among the rows of all pages and heads as they lie.
            length: Divides the page size.
        """
        dim = self.data.shape[-1]
        found = self.data.view(-1, length * dim).index_select(0, index).view(-1, dim)
        if self.scales is None:
            return found
        return dequantize(found, self.scales.view(-1, length).index_select(0, index).flatten(), self.dtype)
