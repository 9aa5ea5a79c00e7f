"""Log-probabilities of tokens, and of the best alternatives beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import upload
from .request import TokenLogprob


def log_probabilities(logits: Tensor, tokens: Tensor, reporting: dict[int, int]) -> list[Tensor]:
    """For rows that ask: log-probability of the token ``[R]``, the best ids ``[R, K]``, and theirs ``[R, K]``."""
    where = upload(torch.tensor(list(reporting)), logits.device)
    chosen = logits.index_select(0, where).float() + 0.0  # -0.0 becomes 0.0, which has the same bits when equal
    total = chosen.logsumexp(-1, keepdim=True)
    vocab_size = chosen.shape[1]
    # Logits in bfloat16 are often equal: ordered by (logit, id), alternatives do not depend on the batch. The bits
    # of a float, with all but the sign flipped below zero, order as it does.
    bits = chosen.view(torch.int32).long()
    keys = (bits ^ ((bits >> 63) & 0x7FFF_FFFF)) * vocab_size - torch.arange(vocab_size, device=chosen.device)
    top_ids = keys.topk(min(max(reporting.values()), vocab_size)).indices
    logprobs = chosen.gather(1, tokens.index_select(0, where)[:, None]) - total
    return [logprobs[:, 0], top_ids.int(), chosen.gather(1, top_ids) - total]


def as_logprobs(
    tokens: Tensor, reporting: dict[int, int], logprobs: Tensor, top_ids: Tensor, top_logprobs: Tensor
) -> dict[int, TokenLogprob]:
    """What ``log_probabilities`` found, by row. Tokens that the model rules out (-inf) are no alternatives."""
    return {
        index: TokenLogprob(
            int(tokens[index]),
            logprob,
            tuple((id_, value) for id_, value in zip(ids[:count], values[:count], strict=True) if value > -torch.inf),
        )
        for (index, count), logprob, ids, values in zip(
            reporting.items(), logprobs.tolist(), top_ids.tolist(), top_logprobs.tolist(), strict=True
        )
    }


def fetch(*tensors: Tensor) -> list[Tensor]:
    """Tensors on the host, in one transfer; from a device those that are not of 32 bits come as int32."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    tensors = tuple(tensor if tensor.element_size() == 4 else tensor.int() for tensor in tensors)
    flat = torch.cat([tensor.contiguous().view(torch.int32).flatten() for tensor in tensors]).cpu()
    parts = flat.split_with_sizes([tensor.numel() for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
