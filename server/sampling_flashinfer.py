"""Top-k, top-p and the draw in one kernel of flashinfer, by rejection: the vocabulary is never sorted.

https://flashinfer.ai/2025/03/10/sampling.html. For rows without a seed only: the place in the batch feeds the random
stream, so a seed would not repeat in another batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.sparse_attn.ops.attention_flashinfer import available, library

from .logits import tempered, upload
from .request import SamplingParams

__all__ = ["available", "draw"]


def draw(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """One token per row, from the distribution of ``logits.probabilities``.

    Args:
        logits: ``[R, V]`` of rows that draw, on a CUDA device.
        params: R of them, temperatures above 0.

    Returns:
        ``[R]`` int64. A row with NaN gets some token and disturbs no other.
    """
    sampling = library().sampling
    vocab_size = logits.shape[1]
    probs = tempered(logits, params).softmax(-1).nan_to_num_(nan=1 / vocab_size)
    top_p = upload(torch.tensor([p.top_p for p in params]), logits.device)
    if any(0 < p.top_k < vocab_size for p in params):
        limits = torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], dtype=torch.int32)
        # Top-k first, then top-p over what is left, renormalised: the order of `logits.probabilities`.
        top_k = upload(limits, logits.device)
        tokens = sampling.top_k_top_p_sampling_from_probs(probs, top_k, top_p, filter_apply_order="top_k_first")
    elif any(p.top_p < 1 for p in params):
        tokens = sampling.top_p_sampling_from_probs(probs, top_p)
    else:
        tokens = sampling.sampling_from_probs(probs)
    return torch.as_tensor(tokens).long()
