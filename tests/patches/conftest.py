"""Tiny random models of the real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.patches.families import facts

VOCAB = 101
WINDOW = 24

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# Class prefix, class suffix and what the family's config adds.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 32}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED, "head_dim": 32}),
    "gemma2": (
        "Gemma2",
        # A cap as low as this bends the logits of a tiny model; 50 would not be felt.
        {
            "sliding_window": WINDOW,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 0.4,
            "layer_types": _MIXED,
        },
    ),
    "gemma3_text": (
        "Gemma3",
        {"sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 24, "layer_types": _MIXED},
    ),
    "phi3": (
        "Phi3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "sliding_window": WINDOW,
            "head_dim": 32,
            "layer_types": _MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 15e4,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "smollm3": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED, "no_rope_layers": [1, 0, 1]},
    ),
    "granite": ("Granite", {"attention_multiplier": 0.3}),
    "cohere": ("Cohere", {}),
}


def config_of(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    prefix, extra = FAMILIES[family]
    cls = getattr(transformers, f"{prefix}TextConfig" if family == "gemma3_text" else f"{prefix}Config")
    return cls(**{**_COMMON, **extra, **changes})


def spread(model: torch.nn.Module) -> None:
    """Weights large enough for attention to be far from uniform, and no two heads or sinks alike."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[-1] ** -0.5)


@pytest.fixture(scope="session")
def config() -> Callable[..., transformers.PreTrainedConfig]:
    return config_of


@pytest.fixture(scope="session")
def tiny() -> Callable[..., transformers.PreTrainedModel]:
    """Makes (once per family and changes) a tiny float32 model on its stock eager attention."""
    made: dict[str, transformers.PreTrainedModel] = {}

    def make(family: str, **changes: Any) -> transformers.PreTrainedModel:
        key = f"{family} {changes}"
        if key not in made:
            prefix = FAMILIES[family][0]
            torch.manual_seed(0)
            model = getattr(transformers, f"{prefix}ForCausalLM")(config_of(family, **changes)).eval()
            spread(model)
            model.set_attn_implementation("eager")
            made[key] = model
        return made[key]

    return make


@pytest.fixture(scope="session")
def multimodal() -> transformers.PreTrainedModel:
    """A Gemma 3 that could see if it were given an image."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=config_of("gemma3_text").to_dict(),
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=99,
            boi_token_index=97,
            eoi_token_index=98,
        )
    ).eval()
    spread(model)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="session")
def seeing() -> transformers.PreTrainedModel:
    """A Qwen2.5-VL, whose positions have several planes."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={**_COMMON, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=99,
            video_token_id=98,
            vision_start_token_id=97,
            vision_end_token_id=96,
            eos_token_id=None,
        )
    ).eval()
    spread(model)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """Random ids ``[B, L]``, never the padding id."""

    def make(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def manager_for() -> Callable[..., KVCacheManager]:
    """Makes a manager whose free pages are in mixed order, so logical and physical pages differ."""

    def make(model: transformers.PreTrainedModel, num_pages: int = 40, page_size: int = 16) -> KVCacheManager:
        known = facts(model.config)
        geometry = CacheGeometry(
            known.num_layers, known.num_kv_heads, known.head_dim, page_size, num_pages, model.dtype, model.device
        )
        pool = PagePool(geometry)
        pool.keys.fill_(float("nan"))
        pool.values.fill_(float("nan"))
        manager = KVCacheManager(pool, prefix_reuse=False)
        single = []
        for _ in range(num_pages):
            table = manager.open([], b"")
            manager.reserve(table, 1)
            single.append(table)
        for place in torch.randperm(num_pages, generator=torch.Generator().manual_seed(3)).tolist():
            manager.free(single[place])
        return manager

    return make
