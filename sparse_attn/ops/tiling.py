"""Block sizes of the Triton kernels by target: the only place that knows one GPU from another.

Plain numbers, no Triton: what bounds them is shared memory (K and V of ``num_stages`` blocks, and
the query tile where the tensor core reads it from there) and registers (a float32 accumulator of
rows x head dim, and one block of logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

KIB = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of GPU.

    Attributes:
        name: ``sm_80`` or ``gfx942``, say.
        shared_bytes: Shared memory (LDS) that one program may use.
        async_copies: Whether loads go to shared memory in the background, so that stages pay.
    """

    name: str
    shared_bytes: int
    async_copies: bool = True


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of one program.

    Attributes:
        rows: Query rows (queries x folded heads), a power of two from 16.
        keys: Keys per step of its loop.
        num_warps: Warps (wavefronts on AMD).
        num_stages: Depth of the load pipeline.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below ``count`` (1 for 0)."""
    return 1 << max(count - 1, 0).bit_length()


def nvidia(major: int, minor: int) -> Target:
    """Shared memory per program by compute capability (CUDA C++ Programming Guide, Technical Specifications)."""
    capability = 10 * major + minor
    kib = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}.get(capability, 99)
    return Target(f"sm_{capability}", kib * KIB)


def amd(architecture: str) -> Target:
    """64 KiB of LDS everywhere but CDNA 4; CDNA 3 has no asynchronous copy to it."""
    newest = architecture.startswith("gfx950")
    return Target(architecture, (160 if newest else 64) * KIB, async_copies=newest)


@lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a device; for a CPU, where kernels are only interpreted, the smallest NVIDIA one."""
    if device.type != "cuda":
        return nvidia(8, 6)
    if torch.version.hip:
        return amd(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    return nvidia(*torch.cuda.get_device_capability(device))


def prefill_tiling(target: Target, rows: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Sizes for prefill where up to ``rows`` query rows share their keys."""
    dim = power_of_two(head_dim)
    if dtype.itemsize > 2:
        # Full float32 products have no tensor core: small blocks keep them in registers.
        return Tiling(rows=16, keys=32, num_warps=4, num_stages=1)
    # 128 rows feed a whole wgmma/tcgen05 instruction pair and read each key half as often as 64.
    block = min(128, max(16, power_of_two(rows)))
    keys = 64 if dim <= 128 else 32
    warps = 8 if block * dim >= 128 * 128 else 4
    return Tiling(block, keys, warps, _stages(target, keys, dim, block, dtype.itemsize))


def decode_tiling(target: Target, rows: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Sizes for decode, which is bound by memory: few rows, and as many bytes in flight as fit."""
    dim = power_of_two(head_dim)
    block = max(16, power_of_two(rows))
    if dtype.itemsize > 2:
        return Tiling(block, keys=32, num_warps=4, num_stages=1)
    keys = 64 if dim <= 128 else 32
    return Tiling(block, keys, 4, _stages(target, keys, dim, block, dtype.itemsize))


def _stages(target: Target, keys: int, dim: int, rows: int, itemsize: int) -> int:
    """The deepest pipeline, up to 4, that leaves shared memory for the query tile and for layout changes."""
    if not target.async_copies:
        return 1
    spare = target.shared_bytes - rows * dim * itemsize
    return max(1, min(4, spare // (2 * keys * dim * itemsize)))
