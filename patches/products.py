"""Products with the weights of a decoder layer, joined where several have one input and where a sum follows one.

Where linear layers are plain their weights become views of one joint weight, so nothing is held twice and each layer
may still be called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from . import narrow, quantize
from .glu import NativeGlu, name_of, supports
from .narrow import NarrowLinear
from .native_product import NativeProduct
from .packed import GatedMLP, PackedLinear
from .quantize import QuantizedLinear

# x [T, K] -> [T, N]
Product = Callable[[torch.Tensor], torch.Tensor]
# x [T, K], residual [T, N] -> [T, N]; the residual is left as it is
Sum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class ProjectedHeads:
    """Queries, keys and values, and the norms of heads.

    Args:
        parts: One product for each of the three beside ``products``, where that is one; or none.

    Attributes:
        products: One, ``[T, E]`` to ``[T, (H + 2 G) * D]``, or one for each of the three.
        counts: H, G and G.
        dim: D.
        norms: Of queries and of keys, over a head or over all of a token's; ``None`` where there is none.
    """

    def __init__(
        self,
        products: Sequence[Product],
        counts: Sequence[int],
        dim: int,
        norms: Sequence[nn.Module | None],
        parts: Sequence[Product] = (),
    ) -> None:
        self.products, self.counts, self.dim, self.norms = list(products), list(counts), dim, norms
        self._parts = list(parts or products)
        self._by_head = [_by_head(norm, dim) for norm in norms]

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """``x [T, E]`` to queries ``[T, H, D]``, keys and values ``[T, G, D]``."""
        rows = [product(x).view(x.shape[0], -1, self.dim) for product in self.products]
        query, key, value = rows if len(rows) == 3 else rows[0].split_with_sizes(self.counts, 1)
        of_query, of_key = self._by_head
        return query if of_query is None else of_query(query), key if of_key is None else of_key(key), value

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``x [T, E]`` to keys and values ``[T, G, D]``; queries are projected only where one weight is for all."""
        if len(self._parts) != 3:
            _, key, value = self(x)
            return key, value
        key, value = (product(x).view(x.shape[0], -1, self.dim) for product in self._parts[1:])
        of_key = self._by_head[1]
        return key if of_key is None else of_key(key), value


def heads_of(attention: nn.Module) -> ProjectedHeads:
    """The projections of an attention module with the norms it has for queries and keys.

    Raises:
        AttributeError: it has other parts.
    """
    given: Any = attention
    dim: int = given.head_dim
    norms = [getattr(given, name, None) for name in ("q_norm", "k_norm")]
    if hasattr(given, "qkv_proj"):
        kv_heads = given.config.num_key_value_heads
        counts = [given.config.num_attention_heads, kv_heads, kv_heads]
        return ProjectedHeads([product_of(given.qkv_proj)], counts, dim, norms)
    parts = [getattr(given, name) for name in _QKV]
    whole = [joined(parts)] if _joinable(parts) else []
    alone = [product_of(part) for part in parts]  # of what joining has made of them
    return ProjectedHeads(whole or alone, [part.out_features // dim for part in parts], dim, norms, alone)


def product_of(linear: Any) -> Product:
    """What a linear layer calls on rows ``[T, K]``; itself, if that is nothing of ours."""
    product: Product = linear
    if isinstance(linear, NarrowLinear | QuantizedLinear):
        product = linear.product
    return product


def _by_head(norm: Any, dim: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A norm of ``[T, heads, D]``: over each head, or over all of a token's."""
    if norm is None:
        return None
    if len(norm.weight) == dim:
        return lambda rows: norm(rows)
    return lambda rows: norm(rows.flatten(1)).view(rows.shape)


def joined(parts: Sequence[Any]) -> Product:
    """Layers of one input as one product ``[T, K]`` to ``[T, N1 + N2 + ...]``.

    Args:
        parts: See ``_joinable``; their weights become views.
    """
    if narrow.joinable(parts):
        return narrow.joined(parts)
    if quantize.joinable(parts):
        return quantize.joined(parts)
    weight = _joint(parts, "weight")
    bias = None if parts[0].bias is None else _joint(parts, "bias")
    return lambda x: functional.linear(x, weight, bias)


def _joinable(parts: Sequence[Any]) -> bool:
    plain = all(type(part) is nn.Linear for part in parts) and len({part.bias is None for part in parts}) == 1
    return plain or narrow.joinable(parts) or quantize.joinable(parts)


def _joint(parts: Sequence[nn.Linear], name: str) -> torch.Tensor:
    """The parameters of that name one below the other."""
    held: list[torch.Tensor] = [getattr(part, name).detach() for part in parts]
    whole = torch.cat(held)
    for part, rows in zip(parts, whole.split_with_sizes([len(one) for one in held]), strict=True):
        setattr(part, name, nn.Parameter(rows, requires_grad=False))
    return whole


def plus(linear: Any) -> Sum:
    """A layer's product and the residual stream, summed."""
    if type(linear) is nn.Linear and linear.bias is None:
        weight = linear.weight.detach().t()
        return lambda x, residual: torch.addmm(residual, x, weight)
    if isinstance(linear, PackedLinear):
        return linear.plus
    product: Any = product_of(linear)
    if isinstance(product, NativeProduct):
        return product
    return lambda x, residual: linear(x).add_(residual)


class JoinedMLP:
    """``down(glu(gates(x))) + residual``: a gated MLP in three calls.

    Attributes:
        gates: Both halves, side by side.
        glu: Of the two.
        down: Added to the residual stream.
    """

    def __init__(self, gates: Product, glu: NativeGlu, down: Sum) -> None:
        self.gates, self.glu, self.down = gates, glu, down

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``x [T, E]``, ``residual [T, E]`` to the same."""
        return self.down(self.glu(self.gates(x)), residual)


def mlp_plus(mlp: Any) -> Sum:
    """An MLP and the residual stream, summed."""
    if isinstance(mlp, GatedMLP):
        return mlp.plus
    parts: list[Any] = [getattr(mlp, name, None) for name in _MLP]
    activation = getattr(mlp, "act_fn", None)
    name = None if activation is None else name_of(activation)
    gates = parts[:2]
    plain = type(gates[0]) is nn.Linear
    if name is None or not _joinable(gates) or (plain and not supports(gates[0].weight)):
        return lambda x, residual: mlp(x).add_(residual)
    return JoinedMLP(joined(gates), NativeGlu(name), plus(parts[2]))
