"""Shapes of known models, for weights that are drawn and not learnt. Data only: help needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        model_type: Family in ``transformers``.
        like: Whose shape it is.
        layers: L.
        heads: H, query heads.
        kv_heads: G.
        head_dim: D.
        hidden: Width of the residual stream.
        intermediate: Width inside the feed-forward part.
        vocab: Tokens.
        context: Longest sequence in tokens. May exceed the model's own: random weights have nothing to lose.
        tied: Whether the output layer shares the embedding's weight.
    """

    model_type: str
    like: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    context: int = 131_072
    tied: bool = True

    def config(self, vocab: int | None = None) -> dict[str, Any]:
        """Fields of the family's config in ``transformers``; ``vocab`` tokens instead of the shape's own."""
        return {
            "vocab_size": vocab or self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }


SHAPES = {
    "tiny": Shape("llama", "nothing, for trying the command", 2, 4, 2, 16, 64, 96, 512),
    "135m": Shape("llama", "SmolLM2-135M", 30, 9, 3, 64, 576, 1536, 49_152),
    "0.5b": Shape("qwen2", "Qwen2.5-0.5B", 24, 14, 2, 64, 896, 4864, 151_936),
    "1b": Shape("llama", "Llama-3.2-1B", 16, 32, 8, 64, 2048, 8192, 128_256),
    "1.5b": Shape("qwen2", "Qwen2.5-1.5B", 28, 12, 2, 128, 1536, 8960, 151_936),
    "8b": Shape("llama", "Llama-3.1-8B", 32, 32, 8, 128, 4096, 14_336, 128_256, tied=False),
}
