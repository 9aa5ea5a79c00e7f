"""Linear layers with quantised weights in plain torch: the reference, and the path where no kernels were compiled.

There every call unpacks the weight, so it saves memory but no time.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .linear_weights import GROUP, Int8Weight, Weight

# Levels on each side of zero. The 16-bit ones are a high byte of at most 127 and a low one, both signed.
LEVELS = {8: 127.0, 16: 32512.0}


def quantize_rows(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each row of ``x [T, K]`` to ``bits`` symmetric bits, the largest value to the last level.

    Returns:
        The levels, whole numbers in float32 ``[T, K]``, and what a level is worth, float32 ``[T, 1]``. A row with
        infinities or NaN is worth NaN.
    """
    x, levels = x.float(), torch.tensor(LEVELS[bits])
    largest = x.abs().amax(1, keepdim=True)
    steps = levels / largest
    steps = torch.where(steps.isfinite() & largest.isfinite(), steps, 0.0)
    worth = torch.where(largest.isfinite(), largest / levels, torch.nan)
    return (x * steps).round(), worth


def linear(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, activation_bits: int, *, as_bytes: bool = False
) -> torch.Tensor:
    """``x [T, K] @ weight.T + bias``, in float32 but for the rounding of ``x`` and the weight; ``[T, N]`` as ``x``.

    Args:
        x: Any floating type.
        weight: Quantised.
        bias: float32 ``[N]`` padded to 16.
        activation_bits: 8 or 16, see ``quantize_rows``; 8 bits behind 4-bit weights are rounded by groups as these are.
        as_bytes: A 4-bit weight is taken as ``Int4Weight.as_bytes`` has it.
    """
    if activation_bits == 8 and not isinstance(weight, Int8Weight):
        padded = functional.pad(x, (0, -weight.in_channels % GROUP))
        rounded, worth = quantize_rows(padded.reshape(-1, GROUP), 8)
        rounded = (rounded * worth).view(padded.shape)[:, : weight.in_channels]
        worth = rounded.new_ones(1)
    else:
        rounded, worth = quantize_rows(x, activation_bits)
    if isinstance(weight, Int8Weight):  # whole numbers first: their sums are exact where they are small
        scales = weight.scales[: weight.out_channels]
        whole = (weight.exact() / torch.where(scales > 0, scales, 1.0)[:, None]).round()
        out = functional.linear(rounded, whole) * (worth * scales)
    else:
        out = functional.linear(rounded, weight.as_bytes() if as_bytes else weight.exact()) * worth
    if bias is not None:
        out = out + bias[: weight.out_channels]
    return out.to(x.dtype)
