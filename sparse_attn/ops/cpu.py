"""What torch's own kernels can do on this CPU; what ours can, ``native.library()`` says."""

from __future__ import annotations

import platform
from functools import cache

import torch


@cache
def has_bfloat16_products() -> bool:
    """Does this CPU multiply bfloat16? oneDNN alone would say so of any with AVX-512, where it widens them."""
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
