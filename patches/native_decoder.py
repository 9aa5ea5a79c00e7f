"""Decoder layers in a decode step: one call of the compiled kernels for several, or two with a choice of keys between.

Four calls a layer took 130 us of Python beside 510 us of kernels (SmolLM2-135M, one token behind 1,024).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, cast

import torch

from foveate.sparse_attn.ops.native import DecoderCall, NormCall, ProductCall, library
from foveate.sparse_attn.ops.whole_native import Choice, PreparedLayer, PreparedStep, check

from .finish import NativeFinish
from .native_product import NativeProduct, call_of, most_rows_of
from .norm_native import NativeNorm
from .products import ProjectedHeads


class NativeDecoder:
    """Norm, projections, rotation, writing, attention and what follows, on float32 rows.

    Keys, values and rotated queries are of the pages' type.

    Args:
        norm: Of the attention's input.
        heads: The projections, made of products that ``call_of`` takes.
        finish: What follows attention.

    Attributes:
        num_heads: H.
        strides: Elements from one token's queries to the next one's, and of keys and values.
        most_rows: With more, its parts are better called by themselves.
        call: ``foveate_decoder``.

    Raises:
        ValueError: their widths do not fit each other.
    """

    def __init__(self, norm: NativeNorm, heads: ProjectedHeads, finish: NativeFinish) -> None:
        kernels = library()
        assert kernels is not None  # they are all made of it
        norm, products = norm.widened(), cast(list[NativeProduct], heads.products)
        norms: Any = [None if one is None else one.widened() for one in heads.norms]  # type: ignore[operator]
        self._kernels, self._alive = kernels, (norm, products, norms, finish)
        counts, self._dim = heads.counts, heads.dim
        self.num_heads, self._num_all = counts[0], sum(counts)
        whole = self._num_all * heads.dim
        apart = (counts[0] * heads.dim, counts[1] * heads.dim, counts[2] * heads.dim)
        self.strides = (whole, whole, whole) if len(products) == 1 else apart
        made: tuple[int, ...] = (whole,) if len(products) == 1 else apart
        self.most_rows = min(finish.most_rows, most_rows_of(products))
        width = finish.call.norm.width
        inputs = {norm.call.width, *(product.call.in_channels for product in products)}
        outputs = tuple(product.call.out_channels for product in products)
        if inputs != {width} or outputs != made or finish.attended != self.num_heads * heads.dim:
            raise ValueError(f"{inputs} to {outputs}, then {finish.attended}, do not follow on {width}")
        of_heads = [NormCall() if one is None else one.call for one in norms]
        projections = (ProductCall * 3)(*map(call_of, products))
        self.call = DecoderCall(norm.call, projections, *of_heads, finish.call)

    @classmethod
    def of(cls, norm: Any, heads: ProjectedHeads, finish: NativeFinish | None) -> NativeDecoder | None:
        """Made of such parts as it knows; ``None`` if others are given."""
        if finish is None or not all(isinstance(product, NativeProduct) for product in heads.products):
            return None
        for one, count in ((norm, 0), *zip(heads.norms, heads.counts[:2], strict=True)):
            if one is None and count:
                continue
            if not isinstance(one, NativeNorm):
                return None
            if count and one.call.width not in (heads.dim, count * heads.dim):
                return None
        return cls(norm, heads, finish)

    def begin(self, layer: PreparedLayer, step: PreparedStep, x: torch.Tensor) -> torch.Tensor:
        """``x [T, E]``, dense float32, to the rotated queries ``[T, H, D]``; keys and values are written.

        Raises:
            MemoryError: no memory was left.
            IndexError: a slot lies behind the last page.
        """
        heads = torch.empty((len(x), self._num_all, self._dim), dtype=step.dtype)
        check(self._kernels.decoder_begin(self.call, step.call, layer.call, x.data_ptr(), heads.data_ptr()), step)
        return heads.as_strided((len(x), self.num_heads, self._dim), (self.strides[0], self._dim, 1))

    def end(
        self, layer: PreparedLayer, step: PreparedStep, query: torch.Tensor, choice: Choice, x: torch.Tensor
    ) -> torch.Tensor:
        """What ``begin`` made, and its ``x``, to ``[T, E]``; what was chosen is read. Books the reads."""
        out = torch.empty_like(x)
        code = self._kernels.decoder_end(
            self.call, step.call, layer.call, choice.call, query.data_ptr(), x.data_ptr(), out.data_ptr()
        )
        check(code, step)
        return out


# A layer, and what it reads.
Known = tuple[NativeDecoder, PreparedLayer, Choice]


def run(parts: Sequence[Known], step: PreparedStep, x: torch.Tensor) -> torch.Tensor:
    """``x [T, E]``, dense float32, through layers that know, or choose in the call, what they read. Books the reads.

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
