"""What follows attention in a decoder layer, for a few rows in one call of the compiled kernels.

The output product, the residual stream, a norm and a gated MLP are five kernels, which take less time on one token of a
small model than five calls from Python do.
"""

from __future__ import annotations

import torch

from foveate.sparse_attn.ops.native import FinishCall, library

from .glu import NativeGlu
from .native_product import NativeProduct, call_of, most_rows_of
from .norm_native import NativeNorm


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
        attended: ``H * D``.
        most_rows: With more, its parts are better called by themselves.

    Raises:
        ValueError: their widths do not fit each other.
    """

    def __init__(
        self, output: NativeProduct, norm: NativeNorm, gates: NativeProduct, glu: NativeGlu, down: NativeProduct
    ) -> None:
        kernels = library()
        assert kernels is not None  # they are all made of it
        self._kernels = kernels
        norm = norm.widened()
        self._alive = output, norm, gates, glu, down
        self.attended: int = output.call.in_channels
        self.most_rows = most_rows_of((output, gates, down))
        width, inner = output.call.out_channels, down.call.in_channels
        widths = (norm.call.width, gates.call.in_channels, gates.call.out_channels, down.call.out_channels)
        if widths != (width, width, 2 * inner, width):
            raise ValueError(f"widths {widths} do not follow on {width} and {inner}")
        self.call = FinishCall(call_of(output), norm.call, call_of(gates), glu.call, call_of(down))
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
