"""Float32 truth for ``key_change``: one gap at a time."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity

from foveate.kv_cache.view import PagedView

from .reference import gather_sequence

EPSILON = 1e-6


def key_change(view: PagedView, window: int, segment: int, segments: int) -> torch.Tensor:
    """See ``ops.key_change``."""
    scores = torch.full((view.rows.num_sequences, segments, segment), float("-inf"), device=view.pages.keys.device)
    for sequence, context in enumerate(view.rows.host_context_lens):
        keys = gather_sequence(view, sequence)[0].float().transpose(0, 1).flatten(1)
        for index in range(segments):
            first, stop = index * segment, min((index + 1) * segment, context)
            for gap in range(first + window - 1, stop - window):
                left, right = keys[gap - window + 1 : gap + 1].mean(0), keys[gap + 1 : gap + window + 1].mean(0)
                scores[sequence, index, gap - first] = 1 - cosine_similarity(left, right, dim=0, eps=EPSILON)
    return scores
