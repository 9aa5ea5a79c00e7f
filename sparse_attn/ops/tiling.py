"""Block sizes of the Triton attention kernels: the only place that knows one GPU from another.

Plain numbers, no Triton. Two things bound them. Registers: a program keeps its float32 accumulator (rows x head
dim) and one block of logits (rows x keys), and on units without wgmma the query tile as well. Shared memory: K and
V of the blocks in flight, and for wgmma and tcgen05 the query tile. What each choice costs is measured by
``tests/sparse_attn/test_triton_aot.py``, which refuses spills.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

import torch


class Unit(Enum):
    """How a GPU multiplies matrices, which decides where operands live."""

    MMA = "mma"  # NVIDIA sm_80..89 and sm_120: all operands in registers, 99 KiB shared but for sm_80's 163
    WGMMA = "wgmma"  # NVIDIA sm_90 (wgmma) and sm_100 (tcgen05): operands in shared memory, 227 KiB
    MFMA = "mfma"  # AMD CDNA: 64 KiB of LDS, loads pass through registers


@dataclass(frozen=True, slots=True)
class Tiling:
    """Sizes of one program.

    Attributes:
        rows: Query rows (queries x folded heads), a power of two from 16.
        keys: Keys per step of its loop.
        num_warps: Warps (wavefronts on AMD).
        num_stages: Depth of the load pipeline.
        most_registers: Per thread on NVIDIA; 0 leaves it to the compiler, which may stop early and spill.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    most_registers: int = 0


# By unit and head dim. Three stages: one for the load from the block table, one for K and V, one for the products.
# On AMD no load runs in the background, so there a pipeline would only cost registers.
_WIDE = {
    Unit.MMA: {64: Tiling(128, 64, 8, 3), 128: Tiling(128, 32, 8, 3), 256: Tiling(64, 32, 8, 3)},
    Unit.WGMMA: {64: Tiling(128, 64, 8, 3), 128: Tiling(128, 64, 8, 3), 256: Tiling(128, 32, 8, 3)},
    Unit.MFMA: {64: Tiling(128, 32, 8, 1), 128: Tiling(128, 32, 8, 1), 256: Tiling(64, 16, 4, 1)},
}
# On an H200, against the wide tiles, 2,048 queries behind 32,768 keys: 2.86 ms for 3.30 with 32 heads on 8 of 128, a
# tenth of the pages 0.49 for 0.54; 14 heads on 2 of 64: 0.84 for 0.81, and 0.12 for 0.24.
_PREFILL = _WIDE | {Unit.WGMMA: _WIDE[Unit.WGMMA] | {64: Tiling(64, 128, 4, 3), 128: Tiling(64, 64, 4, 2)}}
# Decode is bound by memory; 32 KiB of K and V per block and several programs per processor keep it busy.
_DECODE = {
    Unit.MMA: {64: Tiling(16, 64, 4, 3), 128: Tiling(16, 64, 4, 3), 256: Tiling(16, 32, 4, 3)},
    Unit.WGMMA: {64: Tiling(16, 64, 4, 3), 128: Tiling(16, 64, 4, 3), 256: Tiling(16, 32, 4, 3)},
    Unit.MFMA: {64: Tiling(16, 64, 4, 1), 128: Tiling(16, 32, 4, 1), 256: Tiling(16, 32, 4, 1)},
}
# A short list leaves few programs, each with long blocks: 12 microseconds for 16 there, of a tenth of 32,768 keys.
_DECODE_SELECTED = _DECODE | {
    Unit.WGMMA: {64: Tiling(16, 128, 4, 2), 128: Tiling(16, 128, 4, 2), 256: Tiling(16, 32, 4, 3)},
}
# Full float32 products have no tensor core on NVIDIA: small blocks keep them in registers.
_FLOAT32 = {64: Tiling(16, 32, 4, 1), 128: Tiling(16, 32, 4, 1), 256: Tiling(16, 16, 4, 1)}


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below ``count`` (1 for 0)."""
    return 1 << max(count - 1, 0).bit_length()


@lru_cache
def unit_of(device: torch.device) -> Unit:
    """The unit of a device; for a CPU, where kernels are only interpreted, any will do."""
    if device.type != "cuda":
        return Unit.MMA
    if torch.version.hip:
        return Unit.MFMA
    return Unit.WGMMA if torch.cuda.get_device_capability(device)[0] in (9, 10) else Unit.MMA


def prefill_tiling(unit: Unit, rows: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Sizes for prefill where up to ``rows`` query rows share their keys.

    Raises:
        ValueError: the head dim is above 256.
    """
    return _fitting(_pick(_PREFILL[unit], head_dim, dtype), rows)


def scores_tiling(unit: Unit, rows: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """The same in few wide programs: for scores alone, where a tile's queries should meet each key at once.

    Raises:
        ValueError: the head dim is above 256.
    """
    return _fitting(_pick(_WIDE[unit], head_dim, dtype), rows)


def thresholded_prefill_tiling(unit: Unit, rows: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """The same where keys are kept by their score, which takes more numbers per row and a mask per block.

    Raises:
        ValueError: the head dim is above 256.
    """
    full = scores_tiling(unit, rows, head_dim, dtype)
    narrow = replace(full, keys=min(full.keys, 16 if unit is Unit.MFMA else 32))
    if unit is Unit.WGMMA and head_dim > 128:
        return replace(narrow, rows=min(full.rows, 64), num_warps=8)
    return narrow


def decode_tiling(unit: Unit, rows: int, head_dim: int, dtype: torch.dtype, selected: bool = False) -> Tiling:
    """Sizes for decode with ``rows`` query heads per program, over all keys or those of a selection.

    Raises:
        ValueError: the head dim is above 256.
    """
    least = _pick((_DECODE_SELECTED if selected else _DECODE)[unit], head_dim, dtype)
    return replace(least, rows=max(least.rows, power_of_two(rows)))


def antidiagonal_tiling(unit: Unit, rows: int, runs: int, head_dim: int, dtype: torch.dtype) -> Tiling:
    """Sizes for antidiagonal scores: ``rows`` runs of queries share their keys, ``runs`` runs of keys make a block."""
    short = dtype.itemsize <= 2 and head_dim <= 128
    full = Tiling(64 if short else 32, 64 if short and unit is Unit.WGMMA else 32, 4, 1 if unit is Unit.MFMA else 2)
    return replace(full, rows=min(full.rows, max(16, power_of_two(rows))), keys=max(full.keys, runs))


def _fitting(full: Tiling, rows: int) -> Tiling:
    """As many rows as there are, and warps for these."""
    fitting = min(full.rows, max(16, power_of_two(rows)))
    return replace(full, rows=fitting, num_warps=max(4, full.num_warps * fitting // full.rows))


def _pick(table: dict[int, Tiling], head_dim: int, dtype: torch.dtype) -> Tiling:
    dim = max(64, power_of_two(head_dim))
    if dim not in table:
        raise ValueError(f"the Triton kernels take head dims up to 256, got {head_dim}")
    return (_FLOAT32 if dtype.itemsize > 2 else table)[dim]
