"""Decoder layers in a dozen calls, for inference on a CPU, where ``transformers`` makes a hundred of small operations.

A layer keeps its modules and its weights, and goes their way wherever a forward pass brings no packed step, so that
what looks into its modules sees what it did before. Which layers can be computed so is found by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from foveate.kv_cache.view import PagedView
from foveate.sparse_attn import attend, ops
from foveate.sparse_attn.ops.whole_native import Choice, PreparedLayer, PreparedStep, in_one_piece
from foveate.sparse_attn.ops.write import rotate_halves
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, StepState
from foveate.sparse_attn.selection import Band, Segment

from .finish import NativeFinish
from .interface import PackedStep, check_window
from .native_decoder import Known, NativeDecoder, run
from .native_product import NativeProduct
from .norm_native import NativeNorm
from .products import JoinedMLP, ProjectedHeads, Sum, heads_of, mlp_plus, plus
from .quantize import QuantizedLinear

# Norms by name: before attention, after it, before the MLP, after it.
ORDERS: tuple[tuple[str | None, str | None, str | None, str | None], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
# Name under which a trial's attention function is registered; see NAME in interface.py.
TRIAL = "foveate_trial"
# Random rows on which a layer is compared with the original, and how far it may be off.
_ROWS_COMPARED = 4
_RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
# The same by the bits that activations are rounded to: one that lies between two steps may go either way.
_RELATIVE_ERROR_OF_BITS = {
    8: {torch.float32: 2**-6, torch.bfloat16: 2**-4},
    16: {torch.float32: 2**-12, torch.bfloat16: 2**-6},
}
# Small rows, beside which what the layer adds is large: its norms make that independent of them.
_SCALE = 0.01
# Rows behind the norms, on which whatever clips values must show.
_LARGE = 2.0**16

_EVERYTHING = Choice(None)

Norm = Callable[[torch.Tensor], torch.Tensor]
# query [T, H, D], key and value [T, G, D], cos and sin [B, L, R], step -> [T, H * D]
Read = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, StepState], torch.Tensor]


class FusedLayer:
    """Stands in for the ``forward`` of a decoder layer.

    Attributes:
        project: ``[T, E]`` to queries, keys and values.
        keys_values: ``[T, E]`` to keys and values alone.
        read: Rotates, writes and attends.
        write: Keys and values of ``x [T, E]``, and nothing else, to ``slots [T]``; cos and sin are ``[T, R]``.
        feed: The MLP and a norm behind it, if there is one.
        finish: What follows: the attention's output layer and the MLP, both added to the residual stream.
        rotates: Whether queries and keys are rotated (not in NoPE layers).
        whole: All of it in a decode step, where the layer is made of such parts as that knows.
    """

    def __init__(self, layer: nn.Module, order: tuple[str | None, ...]) -> None:
        attention: Any = layer.self_attn
        self._layer, self._attention = layer, attention
        norms: list[Norm | None] = [None if name is None else getattr(layer, name).forward for name in order]
        self._stock = type(layer).forward.__get__(layer)
        self._before, after, self._between, last = norms
        self.project: ProjectedHeads = heads_of(attention)
        self.keys_values = self.project.keys_values
        self.read: Read = self._read
        self.write = self._write
        self._output: Sum = _normed(attention.o_proj, after)
        mlp: Any = layer.mlp
        self.feed: Sum = mlp_plus(mlp) if last is None else _normed(mlp, last)
        self._finish_few = self._native_finish()
        self.finish: Sum = self._finish
        self.rotates = True
        self.whole: NativeDecoder | None = None
        self._prepared: PreparedLayer | None = None
        self._call = LayerCall(attention.layer_idx, AttentionSpec(1.0))
        self._hooks = hooks_of(self.modules())

    def modules(self) -> Iterator[nn.Module]:
        """Those inside of the layer."""
        yield from list(self._layer.modules())[1:]

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[B, L, E]`` to the same, as the layer's own ``forward``."""
        packed, rotation = kwargs.get("foveate_step"), kwargs.get("position_embeddings")
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        if (
            args
            or rotation is None
            or not isinstance(packed, PackedStep)
            or packed.token_index is not None
            or packed.step.slots.shape[0] != tokens
            or kwargs.get("attention_mask") is not None
            or self._layer.training
            or any(self._hooks)
        ):
            out: torch.Tensor = self._stock(hidden_states, *args, **kwargs)
            return out
        rows = self.compute(hidden_states.flatten(0, 1), rotation[0], rotation[1], packed.step)
        return rows.view(hidden_states.shape)

    def compute(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: StepState, read: Read | None = None
    ) -> torch.Tensor:
        """``x [T, E]`` to the same; ``cos`` and ``sin`` are ``[B, L, R]``, and ``read`` attends in its place."""
        if read is None and self.whole is not None and len(x) <= self.whole.most_rows and x.is_contiguous():
            prepared = PreparedStep.of(step, self.whole.num_heads, cos.dtype, cos, sin)
            if prepared is not None:
                return self._whole(self.whole, prepared, x.float(), step).to(x.dtype)
        query, key, value = self.project(x if self._before is None else self._before(x))
        return self.finish((read or self.read)(query, key, value, cos, sin, step), x)

    def _whole(self, whole: NativeDecoder, prepared: PreparedStep, x: torch.Tensor, step: StepState) -> torch.Tensor:
        """``x [T, E]`` float32 to the same."""
        known = self.known(step, prepared)
        return self.choose(whole, prepared, x, step) if known is None else run([known], prepared, x)

    def choose(self, whole: NativeDecoder, prepared: PreparedStep, x: torch.Tensor, step: StepState) -> torch.Tensor:
        """``x [T, E]`` float32 to the same, where ``known`` knows nothing that could be read in one piece."""
        layer = self._layer_for(step, whole.strides)
        query = whole.begin(layer, prepared, x)
        segments = self._segments(query, step)
        choice = Choice.of(segments, self._call.spec.band)
        if choice is not None:
            return whole.end(layer, prepared, query, choice, x)
        assert self._finish_few is not None  # it is a part of the whole
        return self._finish_few(self._read_segments(query, segments, step).float(), x)

    def _finish(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        few = self._finish_few
        if few is not None and len(x) <= few.most_rows and attended.is_contiguous() and x.is_contiguous():
            return few(attended.float(), x.float()).to(x.dtype)
        x = self._output(attended, x)
        return self.feed(x if self._between is None else self._between(x), x)

    def _native_finish(self) -> NativeFinish | None:
        """The same in one call, where it is made of such parts as that knows."""
        norm, feed = getattr(self._between, "__self__", None), self.feed
        if not (isinstance(self._output, NativeProduct) and isinstance(norm, NativeNorm)):
            return None
        if not (
            isinstance(feed, JoinedMLP)
            and isinstance(feed.gates, NativeProduct)
            and isinstance(feed.down, NativeProduct)
        ):
            return None
        return NativeFinish(self._output, norm, feed.gates, feed.glu, feed.down)

    def native_whole(self) -> NativeDecoder | None:
        """All of the layer in a decode step, where it is made of such parts as that knows."""
        norm = getattr(self._before, "__self__", None)
        return NativeDecoder.of(norm, self.project, self._finish_few)

    def attends(self, facts: Mapping[str, Any], head_dim: int) -> None:
        """Takes over what the layer says to its attention function.

        Raises:
            ValueError: there is something that pages cannot do.
            UnsupportedModel: the window is another than the config's.
        """
        known = {"scaling", "sliding_window", "softcap", "s_aux", "dropout", "use_cache"}
        others = {name for name, value in facts.items() if name not in known and value is not None}
        if others or facts.get("dropout"):
            raise ValueError(f"the attention function is told {', '.join(sorted(others)) or 'a dropout'}")
        check_window(self._attention, facts.get("sliding_window"))
        scaling = facts.get("scaling")
        spec = AttentionSpec(
            head_dim**-0.5 if scaling is None else scaling,
            facts.get("softcap") or 0.0,
            Band(0, facts.get("sliding_window")),
            facts.get("s_aux"),
        )
        self._call = LayerCall(self._call.index, spec)

    def rotated(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as the layer rotates them, if it does."""
        if not self.rotates:
            return query, key
        cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
        return rotate_halves(query, cos, sin), rotate_halves(key, cos, sin)

    def _read(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        step: StepState,
    ) -> torch.Tensor:
        prepared = PreparedStep.of(step, query.shape[1], query.dtype, cos, sin)
        if prepared is not None:
            layer = self._layer_for(step, (query.stride(0), key.stride(0), value.stride(0)))
            if attend.reads_everything(self._call, step, step.groups[0]):
                return layer.run(prepared, query, key, value)
            layer.write(prepared, query, key, value)
            segments = self._segments(query, step)
            choice = Choice.of(segments, self._call.spec.band)
            return self._read_segments(query, segments, step) if choice is None else layer.read(prepared, query, choice)
        pages = step.pool.layer(self._call.index)
        if self.rotates:
            cos, sin = cos.flatten(0, 1), sin.flatten(0, 1)
            query = ops.rotate_write_kv(query, key, value, cos, sin, pages, step.slots)
        else:
            ops.write_kv(key, value, pages, step.slots)
        return attend.attend(query, self._call, step).flatten(1)

    def _write(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: StepState, slots: torch.Tensor
    ) -> None:
        key, value = self.keys_values(x if self._before is None else self._before(x))
        pages = step.pool.layer(self._call.index)
        if self.rotates:
            ops.rotate_write_kv(key.new_empty((len(key), 0, key.shape[2])), key, value, cos, sin, pages, slots)
        else:
            ops.write_kv(key, value, pages, slots)

    def known(self, step: StepState, prepared: PreparedStep) -> Known | None:
        """What ``run`` takes, if the kernels know, or can find out by themselves, what the layer reads."""
        if self.whole is None:
            return None
        choice = self._choice(step, prepared)
        return None if choice is None else (self.whole, self._layer_for(step, self.whole.strides), choice)

    def _choice(self, step: StepState, prepared: PreparedStep) -> Choice | None:
        call, (group,) = self._call, step.groups
        if attend.reads_everything(call, step, group):
            return _EVERYTHING
        earlier = attend.carried(call, step, group)
        if earlier is not None:
            segments, heads = earlier
            return Choice.of(segments, call.spec.band, heads)
        ranking = attend.ranking(call, step, group)
        if ranking is None:
            return None
        choice, plan = Choice.ranked(*ranking, prepared)
        # A scheme that reads what it ranked in another way chooses by itself.
        return choice if in_one_piece(attend.promise(plan, call, step, group), call.spec.band) else None

    def _layer_for(self, step: StepState, strides: tuple[int, int, int]) -> PreparedLayer:
        pages, prepared = step.pool.layer(self._call.index), self._prepared
        if prepared is None or not prepared.is_for(pages, strides):
            prepared = self._prepared = PreparedLayer(pages, self._call.spec, self.rotates, strides)
        return prepared

    def _segments(self, query: torch.Tensor, step: StepState) -> tuple[Segment, ...]:
        """What the only group of a step reads, its queries rotated and its keys written."""
        (group,) = step.groups
        view = PagedView(step.pool.layer(self._call.index), group.rows)
        return attend.segments_of(query, view, self._call, step, group)

    def _read_segments(self, query: torch.Tensor, segments: tuple[Segment, ...], step: StepState) -> torch.Tensor:
        (group,) = step.groups
        view = PagedView(step.pool.layer(self._call.index), group.rows)
        return attend.read(query, view, segments, self._call, step, group).flatten(1)


def hooks_of(modules: Iterable[nn.Module]) -> list[Any]:
    """What those who look on are entered in; all empty if nobody does."""
    return [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]


def _normed(module: Any, norm: Norm | None) -> Sum:
    if norm is None:
        return plus(module)
    return lambda x, residual: norm(module(x)) + residual


def fused_layers(model: nn.Module) -> Iterator[FusedLayer]:
    """Those that ``fuse`` made."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedLayer):
            yield module.__dict__["forward"]


@torch.inference_mode()
def fuse(model: PreTrainedModel) -> None:
    """Replaces, in place, the ``forward`` of every decoder layer that is known by its parts and by what it computes."""
    widths = {2 * len(buffer) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    if model.dtype not in _RELATIVE_ERROR or len(widths) != 1:
        return
    (width,) = widths
    for layer in list(model.modules()):
        order = _order_of(layer)
        if order is not None:
            fused = _tried(layer, order, width)
            if fused is not None:
                layer.forward = fused


def _order_of(layer: nn.Module) -> tuple[str | None, ...] | None:
    children = {name for name, _ in layer.named_children()}
    found = [order for order in ORDERS if children == {"self_attn", "mlp", *filter(None, order)}]
    if not found or not isinstance(getattr(layer.self_attn, "layer_idx", None), int):
        return None
    return found[0] if getattr(layer.self_attn, "is_causal", True) else None


@dataclass(slots=True)
class _Seen:
    """What a layer gives its attention function: ``[1, heads, L, D]`` each, and all else that it says."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    facts: dict[str, Any]


def _tried(layer: nn.Module, order: tuple[str | None, ...], width: int) -> FusedLayer | None:
    """The layer made faster, if it computes the same on random rows; ``None`` if it does not."""
    weight = next(layer.parameters(), None)
    config: Any = getattr(layer.self_attn, "config", None)
    if weight is None or config is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = (_SCALE * torch.randn(1, _ROWS_COMPARED, config.hidden_size, generator=generator)).to(weight.dtype)
    half = torch.randn(2, 1, _ROWS_COMPARED, width // 2, generator=generator).to(weight.dtype)
    cos, sin = half.repeat(1, 1, 1, 2)
    seen, expected = _stock_pass(layer, config, x, cos, sin)
    if seen is None or not isinstance(expected, torch.Tensor):
        return None
    bits = [module.activation_bits for module in layer.modules() if isinstance(module, QuantizedLinear)]
    allowed = (_RELATIVE_ERROR_OF_BITS[min(bits)] if bits else _RELATIVE_ERROR)[x.dtype]
    wanted = [part[0].transpose(0, 1) for part in (seen.query, seen.key, seen.value)]
    got: list[torch.Tensor] = []
    try:
        fused = FusedLayer(layer, order)
        fused.attends(seen.facts, seen.query.shape[-1])

        def see(query: Any, key: Any, value: Any, cos: Any, sin: Any, _: Any) -> Any:
            got[:] = (*fused.rotated(query, key, cos, sin), value)
            return got[0].flatten(1)

        for fused.rotates in (True, False):
            out = fused.compute(x[0], cos, sin, None, see)  # type: ignore[arg-type]
            if all(_error(*pair) <= allowed for pair in zip((*got, out), (*wanted, expected[0]), strict=True)):
                if _clips(layer, fused, _LARGE / _SCALE * x, cos, sin, allowed):
                    return None
                fused.whole = fused.native_whole()
                return fused
    except (ValueError, TypeError, RuntimeError, AttributeError):  # its modules are of another kind
        pass
    return None


def _clips(
    layer: nn.Module, fused: FusedLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, allowed: float
) -> bool:
    """Does the layer, its attention or its MLP compute something else on large rows ``[1, L, E]``?

    Attention and MLP are asked by themselves, since in a layer norms keep such rows from them.
    """

    def see(query: Any, key: Any, value: Any, cos: Any, sin: Any, _: Any) -> torch.Tensor:
        return fused.rotated(query, key, cos, sin)[0].flatten(1)

    attention: Any = layer.self_attn
    config = attention.config
    _, whole = _stock_pass(layer, config, x, cos, sin)
    with _louder([norm for norm in fused.project.norms if norm is not None]):
        seen, output = _stock_pass(attention, config, x, cos, sin)
        query, key, value = fused.project(x[0])
    if seen is None or not isinstance(output, tuple):
        return True
    query, key = fused.rotated(query, key, cos, sin)
    out = fused.compute(x[0], cos, sin, None, see)  # type: ignore[arg-type]
    got = [out, query, key, value, attention.o_proj(query.flatten(1))]
    expected = [whole[0], *(part[0].transpose(0, 1) for part in (seen.query, seen.key, seen.value)), output[0][0]]
    if isinstance(fused.feed, JoinedMLP):
        mlp: Any = layer.mlp
        got.append(fused.feed(x[0], torch.zeros_like(x[0])))
        expected.append(mlp(x[0]))
    return not all(_error(*pair) <= allowed for pair in zip(got, expected, strict=True))


@contextmanager
def _louder(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile these give ``_LARGE`` times what they gave."""
    handles = [module.register_forward_hook(lambda _, given, output: _LARGE * output) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stock_pass(
    layer: nn.Module, config: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[_Seen | None, Any]:
    """What a layer gives an attention function, and what it makes of that function's answer, the queries."""
    seen: list[_Seen] = []

    def look(
        _: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **facts: Any
    ) -> tuple[torch.Tensor, None]:
        seen.append(_Seen(query, key, value, facts))
        return query.transpose(1, 2).contiguous(), None

    before = config._attn_implementation_internal
    AttentionInterface.register(TRIAL, look)
    config._attn_implementation_internal = TRIAL
    try:
        out = layer(x, position_embeddings=(cos, sin), attention_mask=None)
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return None, None
    finally:
        config._attn_implementation_internal = before
    return (seen[0] if len(seen) == 1 else None), out


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to what was expected."""
    if got.shape != expected.shape:
        return float("inf")
    expected = expected.float()
    return float((got.float() - expected).norm() / expected.norm().clamp(min=1e-30))
