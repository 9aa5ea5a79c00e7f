"""Logits of further rows, whatever part of a model its head calls."""

from __future__ import annotations

import pytest
import torch
from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM, OPTConfig, OPTForCausalLM

from foveate.patches.logit_rows import LogitRows


@pytest.fixture
def opt():
    """Its head calls the decoder inside of ``base_model``."""
    sizes = {"vocab_size": 101, "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=64)).eval()


@pytest.fixture
def modernbert():
    """What it calls its decoder makes the logits."""
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4}
    torch.manual_seed(0)
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**sizes, **ids, num_attention_heads=2)).eval()


@torch.inference_mode()
@pytest.mark.parametrize("model", ["opt", "modernbert", "multimodal"])
def test_rows_are_those_of_the_pass(model, request, tokens):
    model, ids = request.getfixturevalue(model), tokens(1, 12).clamp(max=90)
    want = model(input_ids=ids, use_cache=False).logits[0]
    with LogitRows(model) as more:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        got = [more.of(torch.tensor(rows)) for rows in ([0, 5], [7])]
    torch.testing.assert_close(torch.cat(got), want[[0, 5, 7]])
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())
