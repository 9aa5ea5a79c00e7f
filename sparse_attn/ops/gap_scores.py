"""A score for every gap between two keys, segment by segment: what boundaries of chunks are chosen by.

All return ``[S, N, L]`` float32 for N segments of L positions from position 0; see also ``key_change``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from foveate.kv_cache.view import PagedView, Rows

from ..protocol import AttentionSpec
from .attention_ratio import attention_ratio
from .boundary_predictor import BoundaryPredictor
from .key_change_torch import token_keys

# Queries at the end of each sequence of a call whose attention is looked at.
RATIO_QUERIES = 64


def ratio_scores(
    query: torch.Tensor, view: PagedView, spec: AttentionSpec, window: int, segment: int, segments: int
) -> torch.Tensor:
    """How unevenly the attention of each sequence's last queries falls on both sides; see ``attention_ratio``."""
    return _in_segments(attention_ratio(query, view, spec, window, RATIO_QUERIES), segment, segments)


def delimiter_scores(rows: Rows, ids: Sequence[int], segment: int, segments: int) -> torch.Tensor:
    """1 behind a token of ``ids``, ``-inf`` elsewhere; ``rows.host_token_ids`` is there."""
    found = torch.full((rows.num_sequences, max(rows.host_context_lens)), float("-inf"))
    wanted = torch.tensor(ids)
    for row, tokens, context in zip(found, rows.host_token_ids or (), rows.host_context_lens, strict=True):
        row[:context].masked_fill_(torch.isin(torch.tensor(tokens[:context]), wanted), 1.0)
    return _in_segments(found, segment, segments).to(rows.block_tables.device, non_blocking=True)


def predicted_scores(view: PagedView, predictor: BoundaryPredictor, segment: int, segments: int) -> torch.Tensor:
    """Logits of the learned predictor, which sees zeros outside each segment."""
    scores = torch.full((view.rows.num_sequences, segments, segment), float("-inf"), device=view.pages.keys.device)
    for row, context, sequence in zip(scores, view.rows.host_context_lens, range(len(scores)), strict=True):
        for index, start in enumerate(range(0, min(context, segment * segments), segment)):
            keys = token_keys(view, sequence, start, min(start + segment, context))
            row[index, : len(keys)] = predictor.logits(keys[None])[0]
    return scores


def _in_segments(scores: torch.Tensor, segment: int, segments: int) -> torch.Tensor:
    """``[S, any length]`` cut, or filled up by ``-inf``, to segments."""
    length = segment * segments
    short = max(length - scores.shape[1], 0)
    cut = pad(scores, (0, short), value=float("-inf"))[:, :length]
    return torch.unflatten(cut, 1, (segments, segment))
