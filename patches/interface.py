"""The attention function that ``transformers`` calls, and its registration under one name."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from foveate.sparse_attn import ops
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, StepState
from foveate.sparse_attn.selection import Band

from .errors import UnsupportedCall, UnsupportedModel
from .families import facts

# Must not contain "flash", "sdpa", "flex_attention" or "/": transformers reads meaning into those.
NAME = "foveate"

# Layers, and the sliding window that each gave last, which was that of its config.
_WINDOWS: WeakKeyDictionary[torch.nn.Module, int | None] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class PackedStep:
    """What a forward pass hands to every layer, as the keyword ``foveate_step``.

    Attributes:
        step: Slots, positions and groups of the T tokens.
        token_index: ``[T]`` int64, where the tokens are among the B * L entries of the model's
            input, row by row; all other entries are padding. ``None``: every entry is a token.
        attended: Layers that have attended in this pass.
    """

    step: StepState
    token_index: torch.Tensor | None = None
    attended: set[int] = field(default_factory=set, init=False)


def register() -> None:
    """Makes ``attn_implementation="foveate"`` known to ``transformers``. May be called again."""
    AttentionInterface.register(NAME, paged_attention)
    # Without a mask function of the same name, transformers would skip mask creation silently.
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*args: Any, use_vmap: bool = False, **kwargs: Any) -> None:
    """Builds no mask: causality, windows and padding are in the step.

    Raises:
        UnsupportedCall: the model widens or narrows its causal mask by a function of its own.
    """
    if use_vmap:
        raise UnsupportedCall("this model changes the causal mask by a function of its own; paged attention cannot")


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    foveate_step: PackedStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Writes K and V into their pages, then attends. No gradient passes through: ``backward`` raises.

    Args:
        module: The attention layer; its ``layer_idx`` is the layer of the pool.
        query: ``[B, H, L, D]``, rotated.
        key: ``[B, G, L, D]``, rotated, the new tokens only.
        value: ``[B, G, L, D]``.
        attention_mask: ``None``, or without elements.
        scaling: Factor on the logits; ``1 / sqrt(D)`` if left out.
        dropout: Must be 0.
        sliding_window: The layer's own window in tokens.
        softcap: Soft cap of the logits.
        s_aux: ``[H]`` learned sink logits.
        foveate_step: Slots, positions and groups of this forward pass.

    Returns:
        ``([B, L, H, D], None)``, zeros where the input is padding.

    Raises:
        UnsupportedCall: there is no step, or the call needs what pages cannot do.
        UnsupportedModel: the layer is not causal self-attention with equal head dims, or not as its config says.
    """
    packed = _checked(module, query, key, value, attention_mask, dropout, foveate_step, kwargs)
    check_window(module, sliding_window)
    index_of_layer: Any = module.layer_idx
    layer = LayerCall(
        index_of_layer,
        AttentionSpec(
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap or 0.0,
            band=Band(0, sliding_window),
            sinks=s_aux,
        ),
    )
    batch, heads, length, dim = query.shape
    step, index = packed.step, packed.token_index
    with torch.no_grad():
        queries, keys, values = (_pack(tensor, index) for tensor in (query, key, value))
        ops.write_kv(keys, values, step.pool.layer(layer.index), step.slots)
        out = attend(queries, layer, step)
        if index is not None:
            out = out.new_zeros(batch * length, heads, dim).index_copy_(0, index, out)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out = _NoGradient.apply(out, query, key, value)  # type: ignore[no-untyped-call]
    return out.view(batch, length, heads, dim), None


def check_window(module: torch.nn.Module, given: int | None) -> None:
    """Compares the sliding window that a layer gives its attention function with that of its config.

    Some models put it into their mask alone, which is not made here, and comparing logits behind a long window
    would take too long.

    Args:
        module: The attention layer.
        given: Its window in tokens.

    Raises:
        UnsupportedModel: they differ within the model's context.
    """
    if _WINDOWS.get(module, 0) == given:  # a config is read too slowly for every call
        return
    config: Any = module.config
    layer: Any = module.layer_idx
    known = facts(config)
    named = known.windows[layer]
    if given != named and min(given or inf, named or inf) < known.context_length:
        raise UnsupportedModel(
            f"{type(module).__name__} gives its attention function a sliding window of {given} in layer {layer} where "
            f"its config names {named}: it cannot be told which keys the model's own mask lets through"
        )
    _WINDOWS[module] = given


class _NoGradient(torch.autograd.Function):
    """Hands its first argument on. Without it, gradients would end here silently."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise UnsupportedCall("no gradient passes through paged attention: detach the model from foveate first")


def _pack(tensor: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """``[B, heads, L, D]`` -> ``[T, heads, D]``, of strides that no number of tokens changes.

    A GPU kernel is compiled for the strides of its rows, and some models (phi3, gpt-oss) have a head's tokens together.
    """
    rows = tensor.transpose(1, 2).flatten(0, 1)
    return rows.contiguous() if index is None else rows[index]


def _checked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    packed: PackedStep | None,
    kwargs: dict[str, Any],
) -> PackedStep:
    if not isinstance(packed, PackedStep):
        raise UnsupportedCall(
            "paged attention needs a step: use foveate.attach(model), which makes one for each forward pass, "
            f"or pass foveate_step=PackedStep(...) to the model; got {type(packed).__name__}. If one was passed, "
            "this model does not hand its keyword arguments to its attention layers"
        )
    if not isinstance(getattr(module, "layer_idx", None), int):
        raise UnsupportedModel(f"{type(module).__name__} has no layer_idx, so its pages are unknown")
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{type(module).__name__} is bidirectional; paged attention is causal")
    if key.shape[2] != query.shape[2]:
        raise UnsupportedModel(
            f"{type(module).__name__} gives {key.shape[2]} keys for {query.shape[2]} queries: it is cross-attention, "
            "or a cache beside the pages holds keys"
        )
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        raise UnsupportedModel(
            f"head dims differ: queries {query.shape[-1]}, keys {key.shape[-1]}, values {value.shape[-1]}"
        )
    layer: Any = module.layer_idx
    _, kv_heads, _, head_dim = packed.step.pool.layer(layer).keys.shape
    if key.shape[1] != kv_heads or key.shape[-1] != head_dim:
        raise UnsupportedModel(
            f"{type(module).__name__} gives keys of {key.shape[1]} heads and head dim {key.shape[-1]}, and the pages, "
            f"like its config, have {kv_heads} and {head_dim}"
        )
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModel(f"{type(module).__name__} adds a position bias to its logits")
    if attention_mask is not None and attention_mask.numel():
        raise UnsupportedCall("paged attention takes no attention mask; padding is dropped before, by the step")
    if dropout:
        raise UnsupportedCall("attention dropout is for training; call model.eval() first")
    if module.training and query.requires_grad:
        raise UnsupportedCall("no gradient passes through paged attention; call model.eval() or use torch.no_grad()")
    tokens = query.shape[0] * query.shape[2] if packed.token_index is None else packed.token_index.shape[0]
    if tokens != packed.step.slots.shape[0]:
        raise UnsupportedCall(f"the step is for {packed.step.slots.shape[0]} tokens, the model was given {tokens}")
    if layer in packed.attended:
        raise UnsupportedModel(
            f"{type(module).__name__} attends twice with layer_idx {layer} in one pass: its second keys would replace "
            "the first in their pages"
        )
    packed.attended.add(layer)
    return packed
