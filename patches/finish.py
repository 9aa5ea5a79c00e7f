"""What follows attention in a decoder layer, for a few rows in one call of the compiled kernels.

The output product, the residual stream, a norm and a gated MLP are five kernels, which take less time on one token of a
small model than five calls from Python do.
"""

from __future__ import annotations

import torch

from foveate.sparse_attn.ops.native import FinishCall, library

from .glu import NativeGlu
from .narrow import NarrowProduct
from .norm_native import NativeNorm

# More than this, and what a call costs is nothing beside what it does; its scratch memory would be large besides.
MOST_ROWS = 32


class NativeFinish:
    """``x, attended`` to ``s + down(glu(gates(norm(s))))`` where ``s = x + output(attended)``, in float32.

    Args:
        output: The attention's output layer.
        norm: Of the MLP's input.
        gates: Both halves, side by side.
        glu: Of the two.
        down: Back to the width of the residual stream.

    Attributes:
        call: What is the same in all calls.

    Raises:
        ValueError: their widths do not fit each other.
    """

    def __init__(
        self, output: NarrowProduct, norm: NativeNorm, gates: NarrowProduct, glu: NativeGlu, down: NarrowProduct
    ) -> None:
        kernels = library()
        assert kernels is not None  # they are all made of it
        self._kernels = kernels
        self._alive = output, norm, gates, glu, down
        width, inner = output.call.out_channels, down.call.in_channels
        widths = (norm.call.width, gates.call.in_channels, gates.call.out_channels, down.call.out_channels)
        if widths != (width, width, 2 * inner, width) or norm.weight.dtype is not torch.float32:
            raise ValueError(f"widths {widths} do not follow on {width} and {inner}")
        self.call = FinishCall(output.call, norm.call, gates.call, glu.call, down.call)
        self.call.glu.width = inner

    def __call__(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``attended [M, H * D]`` and ``x [M, E]``, dense float32, to ``[M, E]``.

        Raises:
            MemoryError: no memory was left.
        """
        out = torch.empty_like(x)
        if not len(x):
            return out
        code = self._kernels.finish(
            self.call, attended.data_ptr(), x.data_ptr(), out.data_ptr(), len(x), torch.get_num_threads()
        )
        if code:
            raise MemoryError("no memory for the scratch space of a decoder layer")
        return out
