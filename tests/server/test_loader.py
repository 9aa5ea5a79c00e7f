"""What loading looks at before a model is served."""

from __future__ import annotations

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from foveate.patches.errors import UnsupportedModel
from foveate.patches.families import VERIFIED
from foveate.patches.quantize import QuantizedLinear
from foveate.server import loader
from foveate.server.options import EngineOptions


@pytest.fixture
def granite():
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2)).eval()
    assert model.config.model_type not in VERIFIED
    return model.requires_grad_(False)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_is_tuned_once(granite, tokenizer, quantization, monkeypatch):
    tuned = []
    monkeypatch.setattr(loader, "tune", lambda model: tuned.append(is_quantized(model)))
    loader.ready(granite, tokenizer, EngineOptions("granite", quantization=quantization)).attached.detach()
    assert tuned == [quantization != "none"], "behind quantisation, if any"


def is_quantized(model):
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_what_tuning_makes_of_an_unverified_family_is_compared(granite, tokenizer, monkeypatch):
    def wrongly(model):
        model.model.layers[0].mlp.up_proj.weight *= 1.1

    monkeypatch.setattr(loader, "tune", wrongly)
    with pytest.raises(UnsupportedModel, match="does not give the same logits"):
        loader.ready(granite, tokenizer, EngineOptions("granite"))
