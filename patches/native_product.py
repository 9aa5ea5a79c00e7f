"""A product with a layer's weights, as the calls for whole decoder layers make it: float32 rows in and out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from foveate.sparse_attn.ops.native import ProductCall

from .linear_native import NativeLinear
from .narrow import NarrowProduct

NativeProduct = NarrowProduct | NativeLinear

# More than this, and what a call costs is nothing beside what it does; its scratch memory would be large besides.
MOST_ROWS = 32


def call_of(product: NativeProduct) -> ProductCall:
    """``foveate_product``; the product must outlive it."""
    held = ctypes.addressof(product.call)
    return ProductCall(narrow=held) if isinstance(product, NarrowProduct) else ProductCall(linear=held)


def most_rows_of(products: Iterable[NativeProduct]) -> int:
    """How many rows these are best multiplied by in one call with what is between them."""
    return min([MOST_ROWS, *(product.most_rows or MOST_ROWS for product in products)])
