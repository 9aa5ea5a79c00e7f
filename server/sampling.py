"""The next token of every sequence in the batch, in one vectorised pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from .exceptions import BadLogits, EngineError, NoTokenLeft
from .logits import edit_logits, probabilities, upload
from .logprobs import as_logprobs, fetch, log_probabilities
from .request import TokenLogprob
from .sampler_row import SamplerRow
from .sampling_limits import check_sampling

__all__ = ["Sampled", "SamplerRow", "check_sampling", "draw", "sample"]


class Sampled(NamedTuple):
    """The outcome for one row.

    Attributes:
        token_id: The token; -1 where there is an error.
        logprob: Where the row asked for it, from the model's own logits, before any penalty or temperature.
        error: Why there is no token. Other rows are not touched by it.
    """

    token_id: int
    logprob: TokenLogprob | None = None
    error: EngineError | None = None


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
    """Chooses one token per row.

    Greedy rows take the best token, the lowest id where several are best. A batch of plain greedy rows costs
    one maximum. A device is waited for once, at the end.

    Args:
        logits: ``[S, V]``, any floating dtype; not changed.
        rows: S rows. Only the random streams and token counts they own are changed.
    """
    edited = edit_logits(logits, rows)
    plain = all(row.greedy and row.params.logprobs is None for row in rows)
    if edited is logits and plain and logits.device.type == "cpu":
        return _greedy(logits)
    best, tokens = edited.max(dim=-1)
    # NaN and +inf carry through a maximum, and only a row of nothing but -inf has -inf as its maximum.
    left = best.isfinite()
    sound = left if edited is logits else logits.amax(-1).isfinite()
    drawing = [index for index, row in enumerate(rows) if not row.greedy]
    # flashinfer's random numbers depend on the place in the batch, so rows with a seed draw their own.
    fused = [index for index in drawing if rows[index].params.seed is None] if _has_flashinfer(logits.device) else []
    own = [index for index in drawing if rows[index].params.seed is not None] if fused else drawing
    for chosen, draw_rows in ((fused, _draw_fused), (own, _draw_own)):
        if chosen:
            where = upload(torch.tensor(chosen), logits.device)
            drawn = draw_rows(edited.index_select(0, where), [rows[index] for index in chosen])
            tokens.index_copy_(0, where, drawn)
    reporting = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
    report = log_probabilities(logits, tokens, reporting) if reporting else []
    ids, is_sound, is_left, *reported = fetch(tokens, sound, left, *report)
    logprobs = as_logprobs(ids, reporting, *reported) if reporting else {}
    result = []
    for index, (token, ok, any_left) in enumerate(zip(ids.tolist(), is_sound.tolist(), is_left.tolist(), strict=True)):
        if not ok:
            result.append(Sampled(-1, error=_bad()))
        elif not any_left:
            result.append(Sampled(-1, error=_none_left(rows[index])))
        else:
            result.append(Sampled(token, logprobs.get(index)))
    return result


def _greedy(logits: Tensor) -> list[Sampled]:
    """The best tokens of logits ``[S, V]`` on a CPU.

    numpy, since a torch call behind the forward pass takes 15 to 60 us: its maximum of 49,152 took 156 us, numpy's 25.
    """
    values = logits.float().numpy()
    return [
        Sampled(token) if isfinite(row[token]) else Sampled(-1, error=_bad())
        for row, token in zip(values, values.argmax(-1).tolist(), strict=True)
    ]


def _bad() -> BadLogits:
    return BadLogits("the model gave logits that are not finite")


def _none_left(row: SamplerRow) -> NoTokenLeft:
    if row.grammar is None:
        return NoTokenLeft("penalties, logit_bias and min_tokens leave no token to choose from")
    reason = row.grammar.failure or "no token of this model can follow"
    return NoTokenLeft(f"the answer cannot go on as its grammar demands: {reason}")


def _has_flashinfer(device: torch.device) -> bool:
    from . import sampling_flashinfer

    return sampling_flashinfer.available(device)


def _draw_fused(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    from . import sampling_flashinfer

    return sampling_flashinfer.draw(logits, [row.params for row in rows])


def _draw_own(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    probs = probabilities(logits, [row.params for row in rows])
    return draw(probs, [row.generator(logits.device) for row in rows])


def draw(probs: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """One token per row: ``argmax(probs / Exp(1))`` takes a token with its probability.

    A row with a generator takes V numbers from it and none from elsewhere, so its tokens do not depend on the
    rest of the batch.

    Args:
        probs: ``[R, V]`` float32.
        generators: R of them; rows with ``None`` share the default generator.

    Returns:
        ``[R]`` int64.
    """
    noise = torch.empty_like(probs)
    if None in generators:
        noise.exponential_()
    for row, generator in zip(noise, generators, strict=True):
        if generator is not None:
            row.exponential_(generator=generator)
    # 0 / 0 would be NaN, and NaN would win: a token with no probability could be drawn.
    noise.clamp_(min=torch.finfo(noise.dtype).tiny)
    return (probs / noise).max(-1).indices
