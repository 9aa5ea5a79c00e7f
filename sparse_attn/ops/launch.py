"""How tensors are handed to the Triton kernels, and one launch as a value. Imports no Triton itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Selection
from .tiling import Tiling, power_of_two

# Whole numbers of `key_arguments` and `selection_arguments` that move from step to step. A kernel made for what divides
# them would be compiled again in the middle of an answer, for up to a second.
PER_STEP = ["nearest", "farthest", "table_stride", "indices_stride", "indices_head_stride", "counts_stride"]


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One kernel launch, kept apart from running it so that it can also be compiled ahead of time."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    tiling: Tiling

    @property
    def options(self) -> dict[str, Any]:
        """Compile options; fused multiply-add is asked for by name, as Triton's default is to change."""
        options = {
            "num_warps": self.tiling.num_warps,
            "num_stages": self.tiling.num_stages,
            "enable_fp_fusion": True,
        }
        if self.tiling.most_registers and not torch.version.hip:
            options["maxnreg"] = self.tiling.most_registers
        return options

    def run(self) -> None:
        """On the GPU that holds the arguments: left alone, Triton takes the calling thread's, by default the first."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with on_device(device):
            self.kernel[self.grid](**self.arguments, **self.options)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes ``device`` the calling thread's GPU, of kernels, streams and events; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def last_dim_dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last axis has stride 1, which the kernels take for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def key_arguments(view: PagedView, spec: AttentionSpec) -> dict[str, Any]:
    """Arguments that prefill and decode share.

    Raises:
        ValueError: K and V are laid out differently, channels are not next to each other, or they are int8.
    """
    keys, values = view.pages.keys, view.pages.values
    if view.pages.quantized:
        raise ValueError("the Triton kernels do not read int8 pages")
    if keys.stride() != values.stride() or keys.stride(3) != 1 or view.rows.block_tables.stride(1) != 1:
        raise ValueError("K and V pages need equal strides, and 1 between channels and between table entries")
    return {
        "keys": keys,
        "values": values,
        "block_tables": view.rows.block_tables,
        "context_lens": view.rows.context_lens,
        "sinks": spec.sinks,
        "scale": float(spec.scale),
        "nearest": spec.band.nearest,
        "farthest": spec.band.farthest,
        "table_stride": view.rows.block_tables.stride(0),
        # A pool keeps its strides for life, so they may be compiled in: fewer registers, wider loads.
        "PAGE_STRIDE": keys.stride(0),
        "HEAD_STRIDE": keys.stride(1),
        "ROW_STRIDE": keys.stride(2),
        "SOFTCAP": float(spec.softcap),
        "PAGE_SIZE": view.page_size,
        "HEAD_DIM": view.head_dim,
        "BLOCK_DIM": max(16, power_of_two(view.head_dim)),
    }


def selection_arguments(selection: Selection | None) -> dict[str, Any]:
    """Arguments of a selection; a dense call has none, and its kernel is compiled without them."""
    if selection is None:
        return dict.fromkeys(("indices", "counts", "indices_stride", "indices_head_stride", "counts_stride")) | {
            "UNIT": 1
        }
    indices, counts = last_dim_dense(selection.indices), last_dim_dense(selection.counts)
    return {
        "indices": indices,
        "counts": counts,
        "indices_stride": indices.stride(0),
        "indices_head_stride": indices.stride(1),
        "counts_stride": counts.stride(0),
        "UNIT": selection.granularity,
    }
