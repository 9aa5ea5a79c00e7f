"""Decoder layers in a decode step: one call of the compiled kernels for several, or two with a choice of keys between.

Four calls a layer took 130 us of Python beside 510 us of kernels (SmolLM2-135M, one token behind 1,024).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from foveate.sparse_attn.ops.native import DecoderCall, NormCall, library
from foveate.sparse_attn.ops.whole_native import Choice, PreparedLayer, PreparedStep, check

from .finish import NativeFinish
from .narrow import NarrowProduct
from .norm_native import NativeNorm
from .products import JoinedHeads


class NativeDecoder:
    """Norm, projections, rotation, writing, attention and what follows, in float32.

    Args:
        norm: Of the attention's input.
        heads: Joined.
        finish: What follows attention.

    Attributes:
        num_heads: H.
        token_stride: Elements from one token's queries to the next one's, and of keys and values.
        call: ``foveate_decoder``.

    Raises:
        ValueError: their widths do not fit each other.
    """

    def __init__(self, norm: NativeNorm, heads: JoinedHeads, finish: NativeFinish) -> None:
        kernels = library()
        assert kernels is not None  # they are all made of it
        self._kernels, self._alive = kernels, (norm, heads, finish)
        product: Any = heads.product
        self.num_heads, self._dim = heads.counts[0], heads.dim
        self.token_stride = sum(heads.counts) * heads.dim
        widths = (norm.call.width, product.call.in_channels, product.call.out_channels, finish.call.output.in_channels)
        width = finish.call.output.out_channels
        if widths != (width, width, self.token_stride, self.num_heads * self._dim):
            raise ValueError(f"widths {widths} do not follow on {width}")
        no_norm = NormCall()
        of_heads = [no_norm if norm is None else norm.call for norm in heads.norms]
        self.call = DecoderCall(norm.call, product.call, *of_heads, finish.call)

    @classmethod
    def of(cls, norm: Any, heads: Any, finish: NativeFinish | None) -> NativeDecoder | None:
        """Made of such parts as it knows; ``None`` if others are given."""
        if finish is None or not isinstance(heads, JoinedHeads) or not isinstance(heads.product, NarrowProduct):
            return None
        for one, count in ((norm, 0), *zip(heads.norms, heads.counts[:2], strict=True)):
            if one is None and count:
                continue
            if not isinstance(one, NativeNorm) or one.weight.dtype is not torch.float32:
                return None
            if count and one.call.width not in (heads.dim, count * heads.dim):
                return None
        return cls(norm, heads, finish)

    def begin(self, layer: PreparedLayer, step: PreparedStep, x: torch.Tensor) -> torch.Tensor:
        """``x [T, E]``, dense, to ``[T, H + 2 G, D]``, in which the H queries are rotated; keys and values are written.

        Raises:
            MemoryError: no memory was left.
            IndexError: a slot lies behind the last page.
        """
        heads = x.new_empty((len(x), self.token_stride // self._dim, self._dim))
        check(self._kernels.decoder_begin(self.call, step.call, layer.call, x.data_ptr(), heads.data_ptr()), step)
        return heads

    def end(
        self, layer: PreparedLayer, step: PreparedStep, heads: torch.Tensor, choice: Choice, x: torch.Tensor
    ) -> torch.Tensor:
        """What ``begin`` made, and its ``x``, to ``[T, E]``; what was chosen is read. Books the reads."""
        out = torch.empty_like(x)
        code = self._kernels.decoder_end(
            self.call, step.call, layer.call, choice.call, heads.data_ptr(), x.data_ptr(), out.data_ptr()
        )
        check(code, step)
        return out


# A layer, and what it reads.
Known = tuple[NativeDecoder, PreparedLayer, Choice]


def run(parts: Sequence[Known], step: PreparedStep, x: torch.Tensor) -> torch.Tensor:
    """``x [T, E]``, dense, through layers of which it is known what they read, to the same. Books the reads.

    Raises:
        MemoryError: no memory was left.
        IndexError: a slot lies behind the last page.
    """
    kernels, out, many = library(), torch.empty_like(x), ctypes.c_void_p * len(parts)
    assert kernels is not None
    code = kernels.decoder_run(
        many(*(ctypes.addressof(decoder.call) for decoder, _, _ in parts)),
        step.call,
        many(*(ctypes.addressof(layer.call) for _, layer, _ in parts)),
        many(*(None if choice.call is None else ctypes.addressof(choice.call) for _, _, choice in parts)),
        len(parts),
        x.data_ptr(),
        out.data_ptr(),
    )
    check(code, step)
    return out
