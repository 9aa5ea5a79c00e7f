"""The operations over a paged KV cache, each one function with a reference and faster twins.

Each op checks shapes once, then routes to flashinfer (CUDA, dense attention, where it is installed),
Triton (CUDA, ROCm), the torch CPU path, or the float32 reference. ``backend=`` exists for tests.
"""

from .anchor import anchor_scores, pooled_topk
from .antidiagonal import antidiagonal_scores
from .attention import decode, merge, prefill
from .block_gate import gate_blocks
from .page_bounds import page_bounds
from .threshold import thresholded
from .write import page_stats, rotate_write_kv, write_kv

__all__ = [
    "anchor_scores",
    "antidiagonal_scores",
    "decode",
    "gate_blocks",
    "merge",
    "page_bounds",
    "page_stats",
    "pooled_topk",
    "prefill",
    "rotate_write_kv",
    "thresholded",
    "write_kv",
]
