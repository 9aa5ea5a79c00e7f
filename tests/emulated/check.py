"""Does the library that is imported have the kernels of every instruction set?"""

from __future__ import annotations

import sys

from foveate.sparse_attn.ops import native

library = native.library()
if library is None or (library.isas, library.linear_isas) != (native.ISAS, native.LINEAR_ISAS):
    sys.exit("Not every kernel was compiled.")
