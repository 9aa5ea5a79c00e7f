"""``key_change``: how much the keys change at each gap, for boundaries of chunks without training."""

from __future__ import annotations

from typing import Literal

import torch

from foveate.kv_cache.view import PagedView

from . import key_change_torch, reference_key_change

Backend = Literal["reference", "torch", "triton"]


def key_change(
    view: PagedView, window: int, segment: int, segments: int, *, backend: Backend | None = None
) -> torch.Tensor:
    """One minus the cosine of the mean keys of the ``window`` tokens before and behind each gap.

    Keys of all heads are concatenated, as in the boundary predictor of DHSA (arXiv:2510.24606),
    whose training-free stand-in this is (ours), and as the model rotated them.

    Args:
        view: Keys of this step are written already.
        window: w, tokens on each side.
        segment: Positions per segment; no window crosses its edges.
        segments: Segments of each sequence, from position 0.
        backend: For tests.

    Returns:
        ``[S, segments, segment]`` float32, from 0 to 2; ``-inf`` where a window crosses an edge or
        the end of the context. On a CPU at most 64 MiB of keys are gathered at a time.

    Raises:
        ValueError: a size is not positive.
    """
    if window < 1 or segment < 1 or segments < 0:
        raise ValueError(f"window {window} and segment {segment} must be positive, segments {segments} not negative")
    chosen = backend or ("triton" if view.pages.keys.is_cuda else "torch")
    if chosen == "triton":
        from . import key_change_triton

        return key_change_triton.key_change(view, window, segment, segments)
    if chosen == "torch":
        return key_change_torch.key_change(view, window, segment, segments)
    return reference_key_change.key_change(view, window, segment, segments)
