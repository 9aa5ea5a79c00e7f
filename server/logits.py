"""From the model's logits to the probabilities that a token is drawn from.

Each step touches only the rows that ask for it. Nothing here waits for a GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .request import SamplingParams
from .sampler_row import SamplerRow


def upload(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``. Pinned memory lets the copy run without waiting for the model."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def edit_logits(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """Penalties, ``logit_bias``, what grammars forbid, then end-of-text and stop ids masked until ``min_tokens``.

    Args:
        logits: ``[S, V]`` from the model; not changed.
        rows: S rows.

    Returns:
        A float32 copy, or ``logits`` itself where no row asks for a change.
    """
    penalised = [(index, row) for index, row in enumerate(rows) if row.penalised]
    biased = [(index, row) for index, row in enumerate(rows) if row.bias_ids]
    constrained = [(index, row) for index, row in enumerate(rows) if row.grammar is not None]
    unfinished = [(index, row) for index, row in enumerate(rows) if row.must_go_on]
    if not (penalised or biased or constrained or unfinished):
        return logits
    logits = logits.to(torch.float32, copy=True)
    if penalised:
        _penalise(logits, penalised)
    if biased:
        where, ids = _cells(((index, row.bias_ids) for index, row in biased), logits.device)
        values = array("f")
        for _, row in biased:
            values.extend(row.bias_values)
        logits[where, ids] += upload(torch.frombuffer(values, dtype=torch.float32), logits.device)
    if constrained:
        ending = _constrain(logits, constrained)
        unfinished = [(index, row) for index, row in unfinished if index not in ending]
    if any(row.ender_ids for _, row in unfinished):
        where, ids = _cells(((index, row.ender_ids) for index, row in unfinished), logits.device)
        logits.index_put_((where, ids), logits.new_tensor(-torch.inf))
    return logits


def _constrain(logits: Tensor, users: Sequence[tuple[int, SamplerRow]]) -> set[int]:
    """Masks what the rows' grammars forbid; returns the rows that can do nothing but end."""
    vocab_size = logits.shape[1]
    masks, ending = [], set()
    for index, row in users:
        mask, only_end = row.allowed(vocab_size)
        masks.append(mask.view(np.int32))
        if only_end:
            ending.add(index)
    words = upload(torch.from_numpy(np.stack(masks)), logits.device)
    bits = (words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    forbidden = bits.view(len(users), -1)[:, :vocab_size] == 0
    where = upload(torch.tensor([index for index, _ in users]), logits.device)
    logits[where] = logits[where].masked_fill_(forbidden, -torch.inf)
    return ending


def _penalise(logits: Tensor, users: Sequence[tuple[int, SamplerRow]]) -> None:
    """Repetition penalty as in CTRL (Keskar et al., 2019, arXiv:1909.05858), then OpenAI's two."""
    seen = [(index, row.counts()) for index, row in users]
    counts = array("q")
    for _, tokens in seen:
        counts.extend(tokens.counts)
    if not counts:
        return
    where, ids = _cells(((index, tokens.ids) for index, tokens in seen), logits.device)
    times = upload(torch.frombuffer(counts, dtype=torch.int64), logits.device)
    strengths = torch.tensor([(1.0, 0.0, 0.0)]).repeat(logits.shape[0], 1)
    for index, row in users:
        params = row.params
        strengths[index] = torch.tensor([params.repetition_penalty, params.presence_penalty, params.frequency_penalty])
    repetition, presence, frequency = upload(strengths, logits.device)[where].unbind(1)
    old = logits[where, ids]
    new = torch.where(old > 0, old / repetition, old * repetition)
    logits[where, ids] = new - frequency * times - presence * (times > 0)


def _cells(users: Iterable[tuple[int, array[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every (row, ids) pair, in order. At least one id is needed."""
    where, columns = array("q"), array("q")
    for index, ids in users:
        where.extend(array("q", (index,)) * len(ids))
        columns.extend(ids)
    rows, ids = upload(torch.frombuffer(where + columns, dtype=torch.int64).view(2, -1), device)
    return rows, ids


def probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, top-k, min-p, top-p, softmax. Tokens with equal logits share one fate.

    A token stays if fewer than ``top_k`` tokens are better, if its probability is at least ``min_p`` times the
    best one's, and if the better ones left by both hold less than ``top_p`` together.

    Args:
        logits: ``[R, V]`` of rows that draw.
        params: R of them, temperatures above 0.

    Returns:
        ``[R, V]`` float32, rows sum to 1. A row with NaN gives NaN and disturbs no other.
    """
    scores = tempered(logits, params)
    limits = {index: p.top_k for index, p in enumerate(params) if 0 < p.top_k < scores.shape[1]}
    if limits:
        _keep_top_k(scores, limits)
    masses = {index: p.top_p for index, p in enumerate(params) if p.top_p < 1}
    if masses:
        _keep_top_p(scores, masses)
    return scores.softmax(-1)


def tempered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits ``[R, V]`` after temperature and min-p, float32.

    Min-p looks at nothing but the best token, which top-k keeps: their order does not matter.
    """
    temperature, min_p = upload(
        torch.tensor([[p.temperature for p in params], [p.min_p for p in params]]), logits.device
    )
    # The best logit becomes 0, so no temperature can make it overflow.
    scores = logits.float() - logits.amax(-1, keepdim=True).float()
    scores /= temperature[:, None]
    if any(p.min_p > 0 for p in params):
        scores.masked_fill_(scores < min_p.log()[:, None], -torch.inf)
    return scores


def _keep_top_k(scores: Tensor, limits: dict[int, int]) -> None:
    where, counts = upload(torch.tensor([list(limits), list(limits.values())]), scores.device)
    best = scores.index_select(0, where).topk(max(limits.values())).values
    floor = scores.new_full((scores.shape[0], 1), -torch.inf)
    floor[where] = best.gather(1, counts[:, None] - 1)
    scores.masked_fill_(scores < floor, -torch.inf)


def _keep_top_p(scores: Tensor, masses: dict[int, float]) -> None:
    """Nucleus sampling (Holtzman et al., 2020, arXiv:1904.09751)."""
    where = upload(torch.tensor(list(masses)), scores.device)
    mass = upload(torch.tensor(list(masses.values())), scores.device)[:, None]
    chosen = scores.index_select(0, where)
    shares = chosen.softmax(-1)
    width = shares.shape[1]
    if scores.device.type == "cpu":
        # The tokens with at most (1 - p) / V each hold at most 1 - p together, so none of them is in the nucleus.
        # Leaving them out of the sort made it 8 times faster (V = 49,152, a peaked row). A GPU would have to wait.
        width = max(1, int((shares > (1 - mass) / width).sum(-1).max()))
    best = shares.topk(width).values
    better = best.cumsum(-1) - best
    # A row with NaN keeps nothing; its index must be valid all the same.
    last = (better < mass).sum(-1, keepdim=True).clamp_(min=1) - 1
    chosen.masked_fill_(shares < best.gather(1, last), -torch.inf)
    scores.index_copy_(0, where, chosen)
