"""Facts of a model that paged attention depends on, read from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from .errors import UnsupportedModel

# Model types whose logits the tests compare with the stock attention of the real classes.
VERIFIED: frozenset[str] = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "phi3",
        "gpt_oss",
        "olmo2",
        "smollm3",
    }
)

# Families with learned sink logits per head.
LEARNED_SINKS: frozenset[str] = frozenset({"flint", "gpt_oss", "granite_swa", "granitemoe_swa"})

# Families whose logits always get a position bias, which code alone says.
ALIBI: frozenset[str] = frozenset({"bloom", "mpt"})

# Families that rotate only in their sliding-window layers, and say so in code alone.
ROTATE_SLIDING_ONLY: frozenset[str] = frozenset(
    {"afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe", "flint", "kolibri1"}
)
# Those of them that rotate in every layer where the config names no window.
ROTATE_WITHOUT_WINDOW: frozenset[str] = frozenset({"exaone4", "exaone_moe", "kolibri1"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the cache, the engine and the schemes need to know of a model.

    Attributes:
        model_type: Name of the family in ``transformers``.
        num_layers: Attention layers; all of them keep keys.
        num_heads: H, query heads.
        num_kv_heads: G.
        head_dim: D.
        context_length: Longest sequence, in tokens, for which the model's positions hold.
        vocab_size: Width of the logits.
        windows: Per layer, the model's own sliding window in tokens, or ``None``.
        rotates: Per layer, whether queries and keys are rotated (false in NoPE layers).
        softcap: Soft cap of the attention logits; 0 is off.
        learned_sinks: Whether heads have a learned sink logit.
    """

    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    vocab_size: int
    windows: tuple[int | None, ...]
    rotates: tuple[bool, ...]
    softcap: float
    learned_sinks: bool


def facts(config: PreTrainedConfig) -> ModelFacts:
    """Reads the facts from a config (the text part, where there are several).

    Raises:
        UnsupportedModel: the config names an attention that pages cannot serve.
    """
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise UnsupportedModel(
            f"{config.model_type} cannot run on paged attention: it has several text parts, and pages are of one"
        ) from error
    try:
        return _facts(config, text)
    except AmbiguousGlobalPerLayerAttributeError as error:
        raise UnsupportedModel(
            f"{text.model_type} cannot run on paged attention: its layers differ in head dim or KV heads, or in "
            "something else that is one for all of them here"
        ) from error


def rope_parameters(text: PreTrainedConfig) -> tuple[Mapping[str, Any], ...]:
    """The rotary parameters of a text config: one set, or one per layer type."""
    given = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return tuple(nested) if nested else ((given,) if given else ())


def _facts(config: PreTrainedConfig, text: PreTrainedConfig) -> ModelFacts:
    _refuse(config, text)
    num_layers = _whole(text, "num_hidden_layers")
    num_heads = _whole(text, "num_attention_heads")
    num_kv_heads = _whole(text, "num_key_value_heads", num_heads)
    head_dim = _whole(text, "head_dim", _whole(text, "hidden_size") // num_heads)
    windows = _windows(text, num_layers)
    return ModelFacts(
        model_type=text.model_type,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        context_length=_context_length(text),
        vocab_size=_whole(text, "vocab_size"),
        windows=windows,
        rotates=_rotates(text, windows),
        softcap=float(getattr(text, "attn_logit_softcapping", None) or 0.0),
        learned_sinks=text.model_type in LEARNED_SINKS,
    )


def _refuse(config: PreTrainedConfig, text: PreTrainedConfig) -> None:
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    head_dim = getattr(text, "head_dim", None)
    value_dim = getattr(text, "v_head_dim", None)
    reasons = {
        "it is an encoder-decoder model": config.is_encoder_decoder,
        "its attention is chunked (attention_chunk_size)": getattr(text, "attention_chunk_size", None),
        "its attention is bidirectional": getattr(text, "use_bidirectional_attention", None)
        or getattr(text, "is_causal", True) is False,
        "its layers share keys and values": (getattr(text, "num_kv_shared_layers", None) or 0) > 0
        or any(mode is not None for mode in getattr(text, "kv_sharing_modes", None) or ()),
        "its keys and values are compressed (multi-head latent attention)": getattr(text, "kv_lora_rank", None),
        "its values have another head dim than its keys": value_dim is not None
        and value_dim != (head_dim or value_dim),
        "its logits get a position bias (ALiBi)": getattr(text, "alibi", None) or text.model_type in ALIBI,
        f"it has layers of type {', '.join(sorted(kinds))}": kinds,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModel(f"{text.model_type} cannot run on paged attention: {reason}")


def _whole(text: PreTrainedConfig, name: str, default: int | None = None) -> int:
    value = getattr(text, name, None)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"{text.model_type} has no usable {name} in its config: {value!r}")
    return value


def _windows(text: PreTrainedConfig, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return (None,) * num_layers
    kinds = getattr(text, "layer_types", None) or ("sliding_attention",) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers])


def _rotates(text: PreTrainedConfig, windows: tuple[int | None, ...]) -> tuple[bool, ...]:
    # 1, or the base of the frequencies, where a layer does rotate.
    told = getattr(text, "no_rope_layers", None) or getattr(text, "layer_rope_theta", None)
    if told:
        return tuple(bool(one) for one in told[: len(windows)])
    if text.model_type in ROTATE_SLIDING_ONLY:
        everywhere = text.model_type in ROTATE_WITHOUT_WINDOW and text.sliding_window is None
        # The dense layers that Cohere 2 MoE may begin with rotate, too, where their pattern gives them no window.
        prefix = getattr(text, "prefix_dense_sliding_window_pattern", None) == 1
        dense = [prefix and kind == "dense" for kind in getattr(text, "mlp_layer_types", None) or windows]
        return tuple(everywhere or window is not None or one for window, one in zip(windows, dense, strict=True))
    ropes = getattr(text, "rope_parameters", None) or {}
    kinds = getattr(text, "layer_types", None) or (None,) * len(windows)
    return tuple(ropes.get(kind, ropes) is not None for kind in kinds[: len(windows)])


def _context_length(text: PreTrainedConfig) -> int:
    """``max_position_embeddings``, but for the scalings that give it another meaning.

    YaRN names the original length and a factor; some configs leave ``max_position_embeddings`` at
    the original. LongRoPE and dynamic NTK change every frequency once any sequence of a step grows
    past the original length, and with it the meaning of keys in the cache and of its batch mates:
    the length up to which frequencies hold is the limit.
    """
    given = length = _whole(text, "max_position_embeddings")
    for rope in rope_parameters(text):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and original:
            length = min(length, int(original))
        if rope.get("rope_type") == "yarn" and original:
            length = max(length, int(original * (rope.get("factor") or given / original)))
    return length
