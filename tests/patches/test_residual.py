"""What attention adds to the residual stream, in families that add it as it is and in those that normalise it first."""

from __future__ import annotations

import pytest
import torch

from foveate.patches.errors import UnsupportedModel
from foveate.patches.residual import watch_residual

# Per family, the module of a decoder layer that is given the residual stream right after attention.
AFTER_ATTENTION = {
    "llama": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "phi3": "post_attention_layernorm",
    "gpt_oss": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "olmo2": "mlp",
}


@pytest.mark.parametrize("family", AFTER_ATTENTION)
def test_input_and_update_make_what_follows_attention(family, tiny):
    model = tiny(family)
    seen, wanted, entered = [], [], []
    layers = model.get_decoder().layers
    handles = [
        handle
        for layer in layers
        for handle in (
            layer.register_forward_pre_hook(lambda _, args: entered.append(args[0][0].clone())),
            getattr(layer, AFTER_ATTENTION[family]).register_forward_pre_hook(
                lambda _, args: wanted.append(args[0][0].clone())
            ),
        )
    ]
    with watch_residual(model, lambda layer, residual, update: seen.append((layer, residual.clone(), update.clone()))):
        model(torch.arange(1, 30)[None])
    for handle in handles:
        handle.remove()
    assert [layer for layer, _, _ in seen] == list(range(len(layers)))
    for (_, residual, update), before, after in zip(seen, entered, wanted, strict=True):
        assert torch.equal(residual, before)
        torch.testing.assert_close(residual + update, after)
        assert update.abs().max() > 1e-3
    count = len(seen)
    model(torch.arange(1, 30)[None])
    assert len(seen) == count, "hooks are gone after the with block"


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedModel, match="layer_idx"), watch_residual(torch.nn.Linear(2, 2), lambda *_: None):
        pass
