"""Models with random weights, of any shape: for measuring speed where no checkpoint is."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def synthetic_model(
    model_type: str, dtype: torch.dtype, device: torch.device, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A causal LM whose weights come from a seed; the same seed gives the same model.

    Args:
        model_type: Family in ``transformers``, such as ``qwen2``.
        dtype: Of the weights.
        device: Where they are drawn.
        seed: Of the weights.
        config: Fields of the family's config.
    """
    made = AutoConfig.for_model(model_type, **config)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        make: Any = AutoModelForCausalLM.from_config  # typed as nothing
        model: PreTrainedModel = make(made, dtype=dtype, attn_implementation="eager")
    for parameter in model.parameters():  # values of bfloat16 in any type, as those of checkpoints are
        parameter.data = parameter.data.bfloat16().to(dtype)
    model.train(False)
    model.requires_grad_(False)
    return model
