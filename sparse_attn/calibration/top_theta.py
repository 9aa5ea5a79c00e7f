"""Calibrates ``top_theta``: which score the k-th best key of a query has, by layer, head and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from foveate.kv_cache.view import PagedView

from ..errors import SchemeConfigError
from ..ops.reference import gather_pages
from ..protocol import LayerCall, StepGroup
from ..selection import Segment
from .base import CalibrationOptions, Calibrator, ModelShape
from .threshold_table import VARIANTS, ThresholdTable

BUDGETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Visible keys at which queries are sampled: two per octave.
LENGTHS = tuple(base << octave for octave in range(11) for base in (128, 192))
# The logarithm of a sum that is zero, or as good as.
_NOTHING = -100.0


@dataclass(frozen=True, slots=True)
class TopThetaCalibration(CalibrationOptions):
    """
    Args:
        sigma: Standard deviations added to a threshold's mean over the samples (0.1 in the paper's
            runs; higher keeps fewer keys).
        queries_per_length: Queries sampled at each length of each sample, spread over the last
            sixteenth before it.
        sink_tokens: With ``window_tokens`` what the second table leaves out of its candidates: the
            keys that the scheme keeps anyway, so that its budget is for the others.
        window_tokens: Likewise, beside the query's own key.
    """

    sigma: float = 0.0
    queries_per_length: int = 4
    sink_tokens: int = 64
    window_tokens: int = 256

    def __post_init__(self) -> None:
        CalibrationOptions.__post_init__(self)
        if not self.queries_per_length:
            raise SchemeConfigError("queries_per_length must be at least 1")


class TopThetaCalibrator(Calibrator):
    """Records the (k+1)-th largest score of sampled queries (Top-theta, arXiv:2502.08363, section 3.1).

    A query with n candidates contributes, per head and for every k of ``BUDGETS``, its (k+1)-th
    largest logit, so that exactly k lie strictly above, and the sum of the weights of the others.
    Where there are not more than k candidates the smallest stands in. Several budgets and lengths
    come of one sort. Unlike the paper's runs the samples see dense attention in all layers.

    Holds the scores of one query in one layer at a time, beside a float32 copy of that layer's keys.
    """

    Options: ClassVar[type[CalibrationOptions]] = TopThetaCalibration
    samples: ClassVar[int] = 8
    sample_tokens: ClassVar[int] = 8192

    options: TopThetaCalibration

    def __init__(self, options: TopThetaCalibration, shape: ModelShape) -> None:
        super().__init__(options, shape)
        self._row = {layer: row for row, layer in enumerate(shape.global_layers)}
        self._point = {
            length - offset * length // (16 * options.queries_per_length): point
            for point, length in enumerate(LENGTHS)
            for offset in range(options.queries_per_length)
        }
        cells = (len(VARIANTS), len(self._row), shape.num_heads, len(LENGTHS), len(BUDGETS))
        self._sums = {name: torch.zeros(cells, dtype=torch.float64) for name in ("theta", "square", "dropped")}
        self._counts = torch.zeros(len(VARIANTS), len(self._row), len(LENGTHS), dtype=torch.int64)

    def see(
        self,
        query: torch.Tensor,
        view: PagedView,
        layer: LayerCall,
        group: StepGroup,
        segments: Sequence[Segment],
        lse: torch.Tensor,
    ) -> None:
        if layer.index not in self._row:
            return
        start = 0
        for sequence, (context, count) in enumerate(
            zip(view.rows.host_context_lens, view.rows.host_query_lens, strict=True)
        ):
            wanted = [n for n in range(context - count + 1, context + 1) if n in self._point]
            if wanted:
                keys = gather_pages(view.pages.key_rows(), view, sequence).float()
                for visible in wanted:
                    one = query[start + visible - 1 - (context - count)]
                    self._record(_logits(one, keys[:, :visible], layer), layer.index, visible)
            start += count

    def _record(self, logits: torch.Tensor, layer: int, visible: int) -> None:
        """One query's logits ``[H, visible]``."""
        row, point = self._row[layer], self._point[visible]
        peak = logits.amax(-1, keepdim=True)
        candidates = (logits, logits[:, self.options.sink_tokens : -self.options.window_tokens - 1])
        for variant, scores in enumerate(candidates):
            size = scores.shape[1]
            if not size:
                continue
            ordered = scores.sort(-1, descending=True).values
            rank = torch.tensor([min(budget, size - 1) for budget in BUDGETS], device=ordered.device)
            theta = ordered[:, rank].double()
            weights = torch.exp(ordered - peak).double()
            # The sum from each rank to the end.
            rest = weights.flip(-1).cumsum(-1).flip(-1)[:, rank]
            rest = rest.masked_fill(torch.tensor(BUDGETS, device=rest.device) >= size, 0.0)
            cell = (variant, row, slice(None), point)
            for name, value in (("theta", theta), ("square", theta.square()), ("dropped", rest)):
                self._sums[name][cell] += value.cpu()
            self._counts[variant, row, point] += 1

    def tables(self) -> dict[str, ThresholdTable]:
        """The tables by variant, in float32.

        Raises:
            SchemeConfigError: no sample was long enough.
        """
        found = {}
        forced = (0, self.options.sink_tokens + self.options.window_tokens + 1)
        for variant, name in enumerate(VARIANTS):
            counts = self._counts[variant].amin(0)
            seen = counts.nonzero()[:, 0]
            if not len(seen):
                least = next(length for length in LENGTHS if length > forced[variant])
                raise SchemeConfigError(f"top_theta needs samples of at least {least} tokens to learn from")
            over = counts[seen, None].double()
            mean, square, dropped = (
                self._sums[name][variant][:, :, seen] / over for name in ("theta", "square", "dropped")
            )
            deviation = (square - mean.square()).clamp(min=0.0).sqrt()
            found[name] = ThresholdTable(
                tuple(self._row),
                torch.tensor([LENGTHS[point] - forced[variant] for point in seen.tolist()]),
                torch.tensor(BUDGETS),
                (mean + self.options.sigma * deviation).float(),
                dropped.log().clamp(min=_NOTHING).float(),
            )
        return found

    def result(self) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        tensors: dict[str, torch.Tensor] = {}
        for variant, table in self.tables().items():
            # Sixteen bits move a threshold by a two-thousandth of itself, far below its spread over samples.
            tensors |= table.tensors(variant, torch.float16)
        return {"queries": int(self._counts[0].amin(0).sum())}, tensors

    def state(self) -> Mapping[str, torch.Tensor]:
        return {**self._sums, "counts": self._counts}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sums = {name: state[name].clone() for name in self._sums}
        self._counts = state["counts"].clone()


def _logits(query: torch.Tensor, keys: torch.Tensor, layer: LayerCall) -> torch.Tensor:
    """``[H, n]`` float32 logits of one query ``[H, D]`` over keys ``[G, n, D]``, scaled and capped."""
    kv_heads, _, dim = keys.shape
    logits = torch.matmul(query.float().view(kv_heads, -1, dim), keys.transpose(1, 2)).flatten(0, 1) * layer.spec.scale
    cap = layer.spec.softcap
    return cap * torch.tanh(logits / cap) if cap else logits
