"""Quantised weights: replaces the linear layers of a model by ones with 8 or 4 bits per weight, on a CPU.

- ``int8``: weights of 8 bits with a scale per output channel, activations of 8 bits with a scale per token, sums in
  int32 (W8A8; LLM.int8(), arXiv:2208.07339, section 2.1, vector-wise). Faster in prefill and in decode.
- ``int8wo``: the same weights; activations of 16 bits, which is finer than bfloat16. For decode, which waits for
  the bytes of the weights.
- ``int4``: weights of 4 bits in groups of 32 input channels, activations of 8 bits in the same groups; keys and values
  as in ``int8wo``. The fastest where a CPU multiplies bytes but has no dot products of them.
- ``int4wo``: the same weights; activations of 16 bits, and prompts unrounded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import linear_native, linear_torch
from .errors import QuantizationError
from .fingerprint import fingerprint, keep_fingerprint
from .linear_native import NativeLinear
from .linear_weights import BLOCK, Int4Weight, Int8Weight, Weight, cut, join
from .linears import decoder_linears

log = logging.getLogger(__name__)

# Kind -> type of the weights, bits of the activations.
KINDS: dict[str, tuple[type[Int8Weight] | type[Int4Weight], int]] = {
    "int8": (Int8Weight, 8),
    "int8wo": (Int8Weight, 16),
    "int4": (Int4Weight, 8),
    "int4wo": (Int4Weight, 16),
}
# Kind of the output layer: its logits decide the next token, and it works on few rows.
HEAD_KIND = "int8wo"
# Layers that 4 bits spare: few weights, on which every head of a group depends. Gemma 3 270M lost a third less.
SPARED, SPARED_KIND = ("k_proj", "v_proj", "qkv_proj"), "int8wo"
# Sums of this many products of bytes fit 32 bits.
MOST_CHANNELS = 65536


class QuantizedLinear(nn.Module):
    """Stands in for an ``nn.Linear``, from whose weight it is made; for inference.

    Args:
        linear: Not kept.
        kind: A key of ``KINDS``.

    Attributes:
        product: ``x [T, K]``, and what to add, to ``[T, N]``.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        made, self.activation_bits = KINDS[kind]
        self.kind = kind
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else _padded(linear.bias)
        self.hold(made.of(linear.weight))

    def hold(self, weight: Weight) -> None:
        """Takes ``weight`` as its own."""
        self.quantized = weight
        self.product: Any
        if linear_native.supports(weight):
            self.product = NativeLinear(weight, self.bias, self.activation_bits)
        else:
            self.product = partial(
                linear_torch.linear, weight=weight, bias=self.bias, activation_bits=self.activation_bits
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., K]`` to ``[..., N]``, in its type."""
        out: torch.Tensor = self.product(x.reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, its scales and the bias."""
        names = ("values", "scales", "sums", "groups")
        held = [getattr(self.quantized, name, None) for name in names]
        return sum(tensor.nbytes for tensor in (*held, self.bias) if tensor is not None)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


def joinable(parts: Sequence[Any]) -> bool:
    """Can ``joined`` take them?"""
    first = parts[0]
    return all(
        isinstance(part, QuantizedLinear)
        and isinstance(part.product, NativeLinear)
        and part.kind == first.kind
        and part.in_features == first.in_features
        and part.out_features % BLOCK == 0
        and (part.bias is None) == (first.bias is None)
        for part in parts
    )


def joined(parts: Sequence[QuantizedLinear]) -> NativeLinear:
    """Layers of one input as one product; their weights become views of its weight."""
    whole = join([part.quantized for part in parts])
    first = 0
    for part in parts:
        part.hold(cut(whole, first, part.out_features))
        first += part.out_features
    biases = [part.bias for part in parts if part.bias is not None]
    return NativeLinear(whole, torch.cat(biases) if biases else None, parts[0].activation_bits)


def quantize(model: PreTrainedModel, kind: str) -> None:
    """Replaces, in place, the linear layers of every decoder layer, and the output layer by one of 8 bits.

    Embeddings and norms stay as they are, also where the output layer shared the embedding's weight. The model keeps
    the fingerprint that it had.

    Raises:
        QuantizationError: no such kind, the model is not on a CPU, or it has no linear layers that can be replaced.
    """
    if kind not in KINDS:
        raise QuantizationError(f"no such quantization: {kind!r}; there are {', '.join(KINDS)}")
    if model.device.type != "cpu":
        raise QuantizationError(f"quantization {kind} runs on a CPU only, and the model is on {model.device}")
    found = [item for item in decoder_linears(model) if item[2].in_features <= MOST_CHANNELS]
    if not found:
        raise QuantizationError(f"{type(model).__name__} has no linear layers in its decoder layers to quantize")
    before = _bytes(model)
    keep_fingerprint(model, fingerprint(model))
    fallback = False
    while found:  # each is let go before the next is made
        parent, name, linear = found.pop()
        replacement = QuantizedLinear(linear, SPARED_KIND if KINDS[kind][0] is Int4Weight and name in SPARED else kind)
        fallback = fallback or not isinstance(replacement.product, NativeLinear)
        setattr(parent, name, replacement)
        del linear
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is nn.Linear and head.in_features <= MOST_CHANNELS:
        model.set_output_embeddings(QuantizedLinear(head, HEAD_KIND))  # type: ignore[no-untyped-call]
    log.info("weights quantized to %s: %.0f MB of memory instead of %.0f", kind, _bytes(model) / 1e6, before / 1e6)
    if fallback:
        log.warning("no compiled kernels for quantized weights on this machine: they save memory, but cost time")


def _bytes(model: nn.Module) -> int:
    quantized = sum(module.nbytes for module in model.modules() if isinstance(module, QuantizedLinear))
    return quantized + sum(parameter.nbytes for parameter in model.parameters())


def _padded(bias: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(bias.detach().float(), (0, -len(bias) % BLOCK))
