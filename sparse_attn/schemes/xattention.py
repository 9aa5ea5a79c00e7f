"""XAttention: key blocks of the prompt by the sums of strided antidiagonals of the attention map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from foveate.kv_cache.view import PagedView

from .. import budget, ops
from ..errors import SchemeConfigError
from ..ops.topk import top_units, units_of
from ..profile import Profile
from ..protocol import LayerCall, Phase, Scheme, SchemeOptions
from ..selection import Selection, Tiles
from .dense import DENSE

Group = Literal["none", "sum"]


@dataclass(frozen=True, slots=True)
class XAttentionOptions(SchemeOptions):
    """
    Args:
        sink_tokens: See ``SchemeOptions``, in whole blocks; 0 in the paper.
        window_tokens: See ``SchemeOptions``, in whole blocks; 0 in the paper.
        dense_tail_tokens: See ``SchemeOptions``; 0 in the paper.
        block_tokens: Keys per block and queries per tile.
        stride_tokens: Distance of the antidiagonals; the estimate costs one stride-th of all logits.
        tau: A tile reads blocks, the best first, while those before hold less than this share of
            its attention; acts where ``budget_tokens`` is 0.
        min_budget_tokens: Least number of tokens chosen so.
        budget_tokens: If above 0: the best blocks up to so many tokens, one at least, whatever
            their share. Not in the paper.
        group: ``none``: each query head chooses, as in the paper; ``sum``: the query heads on one KV
            head choose together, by the sum of their shares.
    """

    sink_tokens: int = 64
    window_tokens: int = 256
    dense_tail_tokens: int = 128
    block_tokens: int = 128
    stride_tokens: int = 8
    tau: float = 0.9
    min_budget_tokens: int = 0
    budget_tokens: int = 0
    group: Group = "none"

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        if self.block_tokens < 16 or self.block_tokens > 128 or self.block_tokens & (self.block_tokens - 1):
            raise SchemeConfigError(f"block_tokens must be 16, 32, 64 or 128, got {self.block_tokens}")
        if self.stride_tokens not in (2, 4, 8, 16):
            raise SchemeConfigError(f"stride_tokens must be 2, 4, 8 or 16, got {self.stride_tokens}")
        if not 0 <= self.tau <= 1:
            raise SchemeConfigError(f"tau must be a number from 0 to 1, got {self.tau}")
        if self.group not in get_args(Group):
            raise SchemeConfigError(f"group must be one of {', '.join(get_args(Group))}, got {self.group!r}")


class XAttention(Scheme):
    """Antidiagonal scores for the prompt (Xu et al., arXiv:2503.16428, section 2; the authors' ``Xattention.py``).

    A block's share of a tile's attention is estimated on every ``stride_tokens``-th antidiagonal, see
    ``ops.antidiagonal_scores``. The first block and the tile's own are always read, and their share counts first;
    then the best follow until ``tau`` of the tile's attention is reached. Decode is dense. The pure form is
    ``sink_tokens=0, window_tokens=0, dense_tail_tokens=0``; what these keep counts as the forced blocks do.

    Rows of scores are normalised over the keys that they see and over no chunk, so that a prompt cut between tiles
    chooses as a whole one does. The model's own scale stands for the paper's ``1 / sqrt(d)``; a soft cap is
    left out of the estimate.
    """

    name: ClassVar[str] = "xattention"
    source: ClassVar[str] = "Xu et al., XAttention: Block Sparse Attention with Antidiagonal Scoring, arXiv:2503.16428"
    Options: ClassVar[type[SchemeOptions]] = XAttentionOptions
    pools_queries: ClassVar[bool] = True
    same_in_decode: ClassVar[bool] = False
    options: XAttentionOptions

    def __init__(self, options: XAttentionOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        self.tile = self.granularity = options.block_tokens

    def for_phase(self, phase: Phase) -> Scheme:
        return self if phase is Phase.PREFILL else DENSE

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        size = self.options.block_tokens
        shares = ops.antidiagonal_scores(query, view, tiles, self.options.stride_tokens, layer.spec.scale)
        if self.options.group == "sum":
            shares = shares.view(len(tiles), view.num_kv_heads, -1, shares.shape[2]).sum(2)
        first, end = budget.free_units(tiles, self, size, Phase.PREFILL)
        first = first.clamp(min=1)  # the first block is forced
        unit = torch.arange(shares.shape[2], device=shares.device)
        candidates = (unit >= first[:, None]) & (unit < end[:, None])
        if self.options.budget_tokens:
            chosen, _ = top_units(shares, candidates, max(1, self.options.budget_tokens // size))
            first_block = torch.zeros_like(chosen[..., :1])
            indices = torch.cat([first_block, chosen], dim=2)
            return Selection(indices, (indices >= 0).sum(2, dtype=torch.int32), size, tiles)
        return Selection(*units_of(self._up_to_tau(shares, candidates) | (unit == 0)), size, tiles)

    def select_decode(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Selection:
        raise RuntimeError("XAttention selects nothing in decode")

    def _up_to_tau(self, shares: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Bool ``[R, K, U]``: candidates taken while the share before them, the forced ones' first, is too small."""
        candidates = candidates[:, None]
        # Stable, so that of equal shares the lower index goes first; the rest stands behind every candidate.
        ordered, order = torch.where(candidates, shares, -1.0).sort(dim=2, descending=True, stable=True)
        forced = shares.masked_fill(candidates, 0.0).sum(2, keepdim=True)
        before = forced + torch.nn.functional.pad(ordered.clamp(min=0).cumsum(2)[..., :-1], (1, 0))
        # The shares of a tile sum to the number of its runs but for rounding, which tau = 1 must not feel.
        wanted = before < self.options.tau * shares.sum(2, keepdim=True) if self.options.tau < 1 else True
        least = -(-self.options.min_budget_tokens // self.options.block_tokens)
        wanted = wanted | (torch.arange(shares.shape[2], device=shares.device) < least)
        return torch.zeros_like(shares, dtype=torch.bool).scatter_(2, order, (ordered >= 0) & wanted)
