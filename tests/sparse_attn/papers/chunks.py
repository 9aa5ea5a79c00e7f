"""Where DHSA cuts keys into chunks, gap by gap (arXiv:2510.24606, first version); gap ``i`` lies behind token ``i``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

WINDOW, APART, SHORTEST, LONGEST = 4, 8, 8, 128


def fixed(tokens: int, size: int, start: int = 0) -> list[int]:
    """``[start, ..., tokens]``: every multiple of ``size`` between them."""
    return [start, *range(start // size * size + size, tokens, size), tokens]


def chosen(
    scores: Sequence[float], most: int, least: float = float("-inf"), apart: int = APART, size: int = 16
) -> list[int]:
    """``[0, ..., n]`` for ``n`` scores of gaps: the best first, further apart than ``apart``, chunks not too short.

    Where no gap will do, chunks are of ``size``.
    """
    end, cuts = len(scores), list[int]()
    for gap in sorted(range(end), key=lambda i: (-scores[i], i)):
        cut = gap + 1
        close = any(abs(cut - other) <= apart or abs(cut - other) < SHORTEST for other in cuts)
        possible = scores[gap] > least and SHORTEST <= cut <= end - SHORTEST
        if possible and not close and len(cuts) < most:
            cuts.append(cut)
    edges = [0, *sorted(cuts), end] if cuts else fixed(end, size)
    return [*(part for pair in itertools.pairwise(edges) for part in _parts(*pair)), end]


def behind(tokens: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Cuts behind each of the delimiters ``ids`` that leaves no chunk too short."""
    scores = [1.0 if token in ids else float("-inf") for token in tokens]
    return chosen(scores, len(scores), apart=0)


def _parts(first: int, last: int) -> list[int]:
    """Starts of the fewest equal parts of a chunk that are not too long."""
    parts = -(-(last - first) // LONGEST)
    return [first - (first - last) * part // parts for part in range(parts)]


def key_cos(keys: torch.Tensor) -> list[float]:
    """One minus the cosine of the mean keys on both sides of each gap, heads side by side; ``keys [n, G, D]``."""
    rows, scores = keys.double().flatten(1), [float("-inf")] * len(keys)
    for gap in range(WINDOW - 1, len(rows) - WINDOW):
        left, right = rows[gap - WINDOW + 1 : gap + 1].mean(0), rows[gap + 1 : gap + 1 + WINDOW].mean(0)
        scores[gap] = 1 - float(left @ right / (left.norm() * right.norm()))
    return scores


def attention_ratio(q: torch.Tensor, k: torch.Tensor, scale: float, last: int = 64) -> list[float]:
    """How much more the last queries, of ``q [N, H, D]``, attend to one side of a gap than to the other."""
    tokens, keys = len(q), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("thd,nhd->htn", q.double(), keys) * scale
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    seen = logits.masked_fill(future, float("-inf")).softmax(-1).mean(0)
    scores = [float("-inf")] * tokens
    for gap in range(WINDOW - 1, tokens - WINDOW):
        rows = seen[max(gap + WINDOW, tokens - last) :]
        past = float(rows[:, gap - WINDOW + 1 : gap + 1].sum()) + 1e-6
        coming = float(rows[:, gap + 1 : gap + 1 + WINDOW].sum()) + 1e-6
        scores[gap] = max(past / coming, coming / past)
    return scores


class Predictor(torch.nn.Module):
    """The authors' network, made of stock parts; attention among the tokens around a gap, its halves compared."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.enc = torch.nn.ModuleDict(
            {
                "mha": torch.nn.MultiheadAttention(channels, heads, batch_first=True),
                "norm": torch.nn.LayerNorm(channels),
            }
        )
        self.mlp = torch.nn.Sequential(torch.nn.Linear(4 * channels + 1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    @torch.no_grad()
    def scores(self, keys: torch.Tensor) -> list[float]:
        """Logits of the gaps of ``keys [n, G, D]``."""
        rows, scores = keys.flatten(1), [float("-inf")] * len(keys)
        for gap in range(WINDOW - 1, len(rows) - WINDOW):
            around = rows[None, gap - WINDOW + 1 : gap + 1 + WINDOW]
            seen = self.enc["norm"](self.enc["mha"](around, around, around, need_weights=False)[0])[0]
            left, right = seen[:WINDOW].mean(0), seen[WINDOW:].mean(0)
            alike = torch.cosine_similarity(left, right, dim=0, eps=1e-6)[None]
            scores[gap] = float(self.mlp(torch.cat([left, right, (left - right).abs(), left * right, alike])))
        return scores


def in_segments(tokens: int, segment: int, size: int, scores_of: Callable[[int, int], list[int]]) -> list[int]:
    """Cuts of ``tokens`` keys: those of each finished segment by itself, then fixed ones."""
    cuts = [0]
    for first in range(0, tokens // segment * segment, segment):
        cuts += [first + cut for cut in scores_of(first, first + segment)[1:]]
    return cuts + (fixed(tokens, size, cuts[-1])[1:] if cuts[-1] < tokens else [])
