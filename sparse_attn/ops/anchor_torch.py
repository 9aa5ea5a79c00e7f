"""``anchor_scores`` on a CPU, in torch.

The product of queries and keys is cheap (bfloat16 on AMX: 600 GFLOP/s); its logits are what costs, since each is
written once and touched by five more passes. So they are made in blocks that stay in the cache of two cores, of one
KV head and one tile. Measured in milliseconds for 96 x 8,192 logits, two cores: product 0.17, to float32 0.06, largest
0.03, subtract 0.10, exponential 0.10, sum 0.02, pooled sum (a product with the row weights) 0.02.
"""

from __future__ import annotations

import torch

from foveate.kv_cache.view import PagedView

from ..protocol import AttentionSpec
from ..selection import Tiles
from .cpu import has_bfloat16_products
from .reference import gather_pages

# Logits made at once: 2 MiB in float32, and half of that again in bfloat16.
BLOCK_LOGITS = 1 << 19


def scores(
    query: torch.Tensor, view: PagedView, tiles: Tiles, spec: AttentionSpec, rows: range, pool_all: bool
) -> torch.Tensor:
    """See ``ops.anchor_scores``."""
    heads, kv_heads = query.shape[1], view.num_kv_heads
    ends = tiles.ends
    longest = max(ends[rows.start : rows.stop])
    pooled = torch.zeros(len(rows), 1 if pool_all else kv_heads, longest)
    keys, held = torch.empty(0), -1
    if query.dtype != torch.float32 and not has_bfloat16_products():
        query = query.float()
    block = _Block(query.dtype, spec, longest)
    for place, row in enumerate(rows):
        sequence, start, count, position = tiles.host[row]
        if sequence != held:
            keys = gather_pages(view.pages.key_rows(), view, sequence).to(query.dtype)
            held = sequence
        end = ends[row]
        asked = slice(start, start + (count - 1) * tiles.step + 1, tiles.step)
        folded = query[asked].reshape(count, kv_heads, heads // kv_heads, -1)
        sinks = None if spec.sinks is None else spec.sinks.float().view(kv_heads, -1).repeat(1, count)
        at = position + torch.arange(count).repeat_interleave(heads // kv_heads) * tiles.step
        for head in range(kv_heads):
            target = pooled[place, 0 if pool_all else head, :end]
            own = folded[:, head].flatten(0, 1)  # rows are queries, then the heads of the group
            block.add(own, keys[head, :end], at, None if sinks is None else sinks[head], target)
    return pooled


class _Block:
    """Scratch for one block of logits, made once per call.

    Args:
        dtype: Of queries and keys.
        spec: The layer's facts.
        longest: Most keys.
    """

    def __init__(self, dtype: torch.dtype, spec: AttentionSpec, longest: int) -> None:
        self._spec = spec
        size = max(BLOCK_LOGITS, longest)
        self._logits = torch.empty(size)
        self._product = self._logits if dtype == torch.float32 else torch.empty(size, dtype=dtype)

    def add(
        self,
        rows: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
        sinks: torch.Tensor | None,
        target: torch.Tensor,
    ) -> None:
        """Adds the probabilities of ``rows`` ``[n * group, D]`` over ``keys`` ``[m, D]`` to ``target`` ``[m]``.

        ``positions`` ascend; the last key is that of the last query.
        """
        end, own = keys.shape[0], int(positions[0]) + 1
        step = max(1, BLOCK_LOGITS // end)
        for first in range(0, rows.shape[0], step):
            part = rows[first : first + step]
            size = (part.shape[0], end)
            product = self._product[: part.shape[0] * end].view(size)
            logits = self._logits[: part.shape[0] * end].view(size)
            torch.addmm(product, part, keys.T, beta=0, alpha=self._spec.scale, out=product)
            if product is not logits:
                logits.copy_(product)
            if self._spec.softcap:
                logits.div_(self._spec.softcap).tanh_().mul_(self._spec.softcap)
            hidden = torch.arange(own, end) > positions[first : first + step, None]
            logits[:, own:].masked_fill_(hidden, float("-inf"))
            peak = logits.amax(-1, keepdim=True)
            if sinks is not None:
                peak = torch.maximum(peak, sinks[first : first + part.shape[0], None])
            total = logits.sub_(peak).exp_().sum(-1)
            if sinks is not None:
                total += torch.exp(sinks[first : first + part.shape[0]] - peak[:, 0])
            target += torch.mm(total.reciprocal_()[None], logits)[0]
