"""A kernel that tells what ``places`` gives, alone in a file: Triton finds names of modules only. Not collected."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import triton
import triton.language as tl

from foveate.sparse_attn.ops.common_triton import places


@triton.jit
def places_kernel(indices, counts, found, end, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Program: a row of ``[R, WIDTH]`` units."""
    row = tl.program_id(0)
    tl.store(found + row, places(indices + row * WIDTH, tl.load(counts + row), end, UNIT, BLOCK_KEYS))
