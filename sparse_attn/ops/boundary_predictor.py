"""The learned boundary predictor of DHSA: inference of its released form, ``BoundarySimilarityAttn``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, layer_norm, linear, pad

from ..errors import ProfileError

# The authors' names; ``pool.gate.weight`` is there in the variant with gated pooling only.
TENSORS = (
    "enc.mha.in_proj_weight",
    "enc.mha.in_proj_bias",
    "enc.mha.out_proj.weight",
    "enc.mha.out_proj.bias",
    "enc.norm.weight",
    "enc.norm.bias",
    "mlp.0.weight",
    "mlp.0.bias",
    "mlp.2.weight",
    "mlp.2.bias",
)
GATE = "pool.gate.weight"
# Float32 elements of the largest intermediate that is made at a time.
SLAB_ELEMENTS = 16 << 20


class BoundaryPredictor:
    """Says for each gap between two tokens how likely a chunk ends there (DHSA, arXiv:2510.24606).

    The ``2w`` tokens around a gap attend to each other, without positions and without a residual;
    layer norm; both halves are pooled and compared by a small network. Weights are float32.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> None:
        """
        Args:
            tensors: Weights under the names of the authors' checkpoint (``TENSORS``, perhaps ``GATE``),
                for C channels: all KV heads of a layer, concatenated.
            options: ``heads`` of the attention (4 in the authors' training) and ``window`` w (4).

        Raises:
            ProfileError: a tensor is missing, or the heads do not divide the channels.
        """
        missing = [name for name in TENSORS if name not in tensors]
        if missing:
            raise ProfileError(f"the profile for dhsa has no boundary predictor: {', '.join(missing)} missing")
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self.heads, self.window = int(options.get("heads", 4)), int(options.get("window", 4))
        self.channels = self.tensors["enc.norm.weight"].shape[0]
        if self.heads < 1 or self.channels % self.heads or self.window < 1:
            raise ProfileError(f"a boundary predictor of {self.channels} channels cannot have {self.heads} heads")

    def logits(self, keys: torch.Tensor) -> torch.Tensor:
        """One logit per gap.

        Args:
            keys: ``[B, L, C]`` keys as the model rotated them, heads concatenated; zeros stand outside.

        Returns:
            ``[B, L]`` float32: that of a boundary behind each token.

        Raises:
            ProfileError: the predictor was made for another number of channels.
        """
        if keys.shape[2] != self.channels:
            raise ProfileError(
                f"the boundary predictor was made for {self.channels} channels of keys, here are {keys.shape[2]}"
            )
        weights = {name: tensor.to(keys.device) for name, tensor in self.tensors.items()}
        padded = pad(keys.float(), (0, 0, self.window - 1, self.window))
        # A token is projected once, though it stands in 2w windows.
        projected = linear(padded, weights["enc.mha.in_proj_weight"], weights["enc.mha.in_proj_bias"])
        windows = projected.unfold(1, 2 * self.window, 1)  # [B, L, 3C, 2w]
        step = max(1, SLAB_ELEMENTS // (keys.shape[0] * 6 * self.window * self.channels))
        parts = [self._gaps(windows[:, first : first + step], weights) for first in range(0, keys.shape[1], step)]
        return torch.cat(parts, dim=1)

    def _gaps(self, windows: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        batch, gaps, _, tokens = windows.shape
        query, key, value = windows.reshape(batch, gaps, 3, self.heads, -1, tokens).transpose(4, 5).unbind(2)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)  # [B, L, heads, 2w, C / heads]
        mixed = mixed.transpose(2, 3).reshape(batch, gaps, tokens, self.channels)
        mixed = linear(mixed, weights["enc.mha.out_proj.weight"], weights["enc.mha.out_proj.bias"])
        encoded = layer_norm(mixed, (self.channels,), weights["enc.norm.weight"], weights["enc.norm.bias"])
        left, right = (self._pooled(half, weights) for half in torch.split(encoded, self.window, dim=2))
        likeness = cosine_similarity(left, right, dim=-1, eps=1e-6)[..., None]
        features = torch.cat([left, right, (left - right).abs(), left * right, likeness], dim=-1)
        hidden = linear(features, weights["mlp.0.weight"], weights["mlp.0.bias"]).relu()
        return linear(hidden, weights["mlp.2.weight"], weights["mlp.2.bias"])[..., 0]

    def _pooled(self, half: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if GATE not in weights:
            return half.mean(2)
        return (linear(half, weights[GATE]).softmax(2) * half).sum(2)
