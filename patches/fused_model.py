"""All decoder layers of a model in one loop, for inference on a CPU.

What ``transformers`` does between two layers took 75 us, and around them 1 ms, of the 18 ms that one token takes
(SmolLM2-135M). In a decode step, layers that know what they read, or choose it by exact scores, are one call of the
compiled kernels. Which models can be computed so is found by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import ModelOutput

from foveate.sparse_attn.ops.whole_native import PreparedStep
from foveate.sparse_attn.protocol import StepState

from .decoder_layer import TRIAL, FusedLayer, Read, hooks_of
from .errors import UnsupportedCall
from .interface import PackedStep, no_mask
from .last_layer import last
from .native_decoder import Known, run
from .quantize import QuantizedLinear
from .rotary import plain_angles

_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
_PARTS = ("embed_tokens", "rotary_emb", "norm")
# Tokens on which a model is compared with the original, and how far it may be off behind all of its layers.
_TOKENS_COMPARED = 4
_RELATIVE_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2**-5}
# Where activations are rounded to bytes; 0.1 was measured in bfloat16 (SmolLM2-135M, 30 layers).
_RELATIVE_ERROR_OF_BYTES = {torch.float32: 2**-5, torch.bfloat16: 2**-2}


class FusedModel:
    """Stands in for the ``forward`` of what embeds tokens, has layers, and norms what they leave.

    Args:
        inner: Has ``embed_tokens``, ``rotary_emb``, ``layers`` and ``norm``.
        layers: Its layers.

    Attributes:
        kind: Class of what its own ``forward`` gives, which has every field that the head may ask for.
    """

    def __init__(self, inner: Any, layers: list[FusedLayer]) -> None:
        self._inner, self._layers = inner, layers
        self._stock: Callable[..., Any] = type(inner).forward.__get__(inner)
        self.kind: type[ModelOutput] = BaseModelOutputWithPast
        self._hooks = hooks_of(list(inner.modules())[1:])
        self._modules = tuple(inner.layers)
        self._rotary = inner.rotary_emb
        self._angles = plain_angles(inner.rotary_emb)
        wholes = [layer.whole for layer in layers if layer.whole is not None]
        alike = len({whole.num_heads for whole in wholes}) == 1  # a step is prepared for all of them
        self._most_rows = min(whole.most_rows for whole in wholes) if alike else 0

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's own ``forward``."""
        packed = kwargs.pop("foveate_step", None)
        others = {name for name, value in kwargs.items() if value is not None and (name not in _OUTPUTS or value)}
        known = self.known(input_ids, position_ids, packed)
        unknown = others or any(given is not None for given in (attention_mask, inputs_embeds, past_key_values))
        if known is None or unknown or use_cache:
            return self._stock(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **({} if packed is None else {"foveate_step": packed}),
                **kwargs,
            )
        return self.output(self.compute(*known))

    def output(self, hidden: torch.Tensor) -> ModelOutput:
        """``hidden [B, L, E]`` as the model's own ``forward`` gives it; what else there is in it is ``None``."""
        return self.kind(last_hidden_state=hidden)

    def known(
        self, ids: torch.Tensor | None, positions: torch.Tensor | None, packed: Any
    ) -> tuple[torch.Tensor, torch.Tensor, StepState] | None:
        """What ``compute`` takes, if these are a packed step, in a model that is as it was."""
        if ids is None or positions is None or not isinstance(packed, PackedStep) or packed.token_index is not None:
            return None
        if packed.step.slots.shape[0] != ids.numel() or self._inner.training:
            return None
        return None if any(self._hooks) or self._is_changed() else (ids, positions, packed.step)

    def _is_changed(self) -> bool:
        """Has somebody replaced or cut off layers, or asked for outputs by the config?"""
        config, modules = self._inner.config, tuple(self._inner.layers._modules.values())
        return (
            modules != self._modules
            or [module.__dict__.get("forward") for module in modules] != self._layers
            or getattr(config, "num_hidden_layers", len(modules)) != len(modules)
            or any(getattr(config, name, False) for name in _OUTPUTS)
            or not getattr(config, "return_dict", True)
        )

    def compute(
        self, ids: torch.Tensor, positions: torch.Tensor, step: StepState, read: Read | None = None
    ) -> torch.Tensor:
        """``ids`` and ``positions [B, L]`` to ``[B, L, E]``; ``read`` attends in the layers' place."""
        embedded = self._inner.embed_tokens(ids)
        rotary = self._inner.rotary_emb
        as_it_was = rotary is self._rotary and "forward" not in rotary.__dict__
        cos, sin = (self._angles if as_it_was else rotary)(embedded, position_ids=positions)
        x = embedded.flatten(0, 1)
        prepared = None
        first = self._layers[0].whole
        if read is None and first is not None and len(x) <= self._most_rows and x.is_contiguous():
            prepared = PreparedStep.of(step, first.num_heads, cos.dtype, cos, sin)
            x = x if prepared is None else x.float()  # so it stays, from layer to layer
        waiting: list[Known] = []  # layers to be run in one call
        for layer in self._layers:
            if prepared is None:
                is_last = read is None and layer is self._layers[-1]
                x = last(layer, x, cos, sin, step) if is_last else layer.compute(x, cos, sin, step, read)
                continue
            known = layer.known(step, prepared)
            if known is not None:
                waiting.append(known)
                continue
            if waiting:
                x, waiting = run(waiting, prepared, x), []
            if layer.whole is None:
                x = layer.compute(x.to(cos.dtype), cos, sin, step).float()
            else:
                x = layer.choose(layer.whole, prepared, x, step)
        if waiting and prepared is not None:
            x = run(waiting, prepared, x)
        out: torch.Tensor = self._inner.norm(x.view(embedded.shape).to(embedded.dtype))
        return out


@torch.inference_mode()
def fuse_model(model: nn.Module) -> None:
    """Replaces, in place, the ``forward`` of the part that has the fused layers, if it computes what it seems to."""
    for inner in list(model.modules()):
        layers = getattr(inner, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or not hasattr(inner, "config"):
            continue
        if not all(isinstance(getattr(inner, name, None), nn.Module) for name in _PARTS):
            continue
        fused = [layer.__dict__.get("forward") for layer in layers]
        if all(isinstance(layer, FusedLayer) for layer in fused):
            whole = FusedModel(inner, [layer for layer in fused if isinstance(layer, FusedLayer)])
            if _computes_the_same(whole, inner):
                inner.forward = whole


def _computes_the_same(fused: FusedModel, inner: Any) -> bool:
    ids = torch.arange(1, _TOKENS_COMPARED + 1)[None] % inner.embed_tokens.num_embeddings
    positions = torch.arange(_TOKENS_COMPARED)[None]
    config, before = inner.config, inner.config._attn_implementation_internal
    AttentionInterface.register(TRIAL, lambda _, query, *rest, **facts: (query.transpose(1, 2).contiguous(), None))
    AttentionMaskInterface.register(TRIAL, no_mask)
    config._attn_implementation_internal = TRIAL
    layers = iter(fused._layers)

    def see(query: Any, key: Any, value: Any, cos: Any, sin: Any, _: Any) -> torch.Tensor:
        return next(layers).rotated(query, key, cos, sin)[0].flatten(1)

    try:
        output = fused._stock(input_ids=ids, position_ids=positions, use_cache=False)
        fused.kind, expected = type(output), output.last_hidden_state.float()
        got = fused.compute(ids, positions, None, see).float()  # type: ignore[arg-type]
    except (UnsupportedCall, ValueError, TypeError, RuntimeError, AttributeError, KeyError):  # another kind of model
        return False
    finally:
        config._attn_implementation_internal = before
    rounds = any(isinstance(module, QuantizedLinear) for module in inner.modules())
    allowed = (_RELATIVE_ERROR_OF_BYTES if rounds else _RELATIVE_ERROR)[inner.embed_tokens.weight.dtype]
    return bool((got - expected).norm() <= allowed * expected.norm())
