"""``line_scores``: how much attention a few queries give each key and each distance."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from .reference import gather_pages

# Bytes of logits held at a time; what is made of them takes four times as much.
SLAB_BYTES = 16 << 20


def line_scores(
    query: torch.Tensor, view: PagedView, sequence: int, spec: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last queries of a sequence, summed along columns and along diagonals.

    The vertical and slash lines of MInference (arXiv:2407.02490) and of the released DHSA.

    Args:
        query: ``[n, H, D]``, the queries at the sequence's last n positions.
        view: Keys of this step are written already.
        sequence: Which of its sequences.
        spec: Scale and soft cap.

    Returns:
        ``(columns [H, L], diagonals [H, L])`` float32 over the L keys of the sequence: the weight on
        key ``j``, and on the keys at distance ``j``, summed over the queries.
    """
    keys = gather_pages(view.pages.key_rows(), view, sequence)
    count, heads, _ = query.shape
    length = keys.shape[1]
    group = heads // len(keys)
    position = torch.arange(length - count, length, device=query.device)
    hidden = position[:, None] < torch.arange(length, device=query.device)
    columns = torch.empty(heads, length, device=query.device)
    diagonals = torch.empty_like(columns)
    step = max(1, SLAB_BYTES // (4 * count * length))
    for begin in range(0, heads, step):
        held = range(begin, min(begin + step, heads))
        logits = torch.stack([query[:, head].float() @ keys[head // group].float().T for head in held])
        logits *= spec.scale
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(-1)
        columns[begin : begin + len(held)] = weights.sum(1)
        # Key j of row r stands at distance d = (L - n + r) - j: with keys turned round, in column
        # d + (n - 1 - r). Rows that are read one element short of their length line these up.
        turned = pad(weights.flip(-1), (0, count)).contiguous()
        lined = turned.as_strided(
            (len(held), count, length), (count * (length + count), length + count - 1, 1), count - 1
        )
        diagonals[begin : begin + len(held)] = lined.sum(1)
    return columns, diagonals
