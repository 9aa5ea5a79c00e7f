"""Top-theta: keys whose score exceeds a threshold learnt beforehand, and no search among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import VALUE_SUM, PageStat
from foveate.kv_cache.view import PagedView, Rows

from ..calibration.threshold_table import ThresholdTable
from ..errors import ProfileError, SchemeConfigError
from ..profile import Profile
from ..protocol import LayerCall, LayerRole, Phase, Role, Scheme, SchemeOptions, options_from
from ..selection import ScoreThreshold, Tiles
from .dense import DENSE

if TYPE_CHECKING:
    from ..calibration.base import Calibrator, ModelShape

FIRST_LAYERS = 2
# Up to so many thresholds are looked up for all layers at once: in decode the calls cost more than the work.
_AT_ONCE = 1 << 20
_DROPPED_SUMS: dict[str, Literal["none", "exact", "bound", "given"]] = {
    "exact": "exact",
    "bound": "bound",
    "calibrated": "given",
    "none": "none",
}


@dataclass(frozen=True, slots=True)
class TopThetaOptions(SchemeOptions):
    """
    The paper's pure form has ``sink_tokens``, ``window_tokens`` and ``dense_tail_tokens`` 0: then
    the budget is for all visible keys, a query's own not excepted. Otherwise it is for those that
    sinks and window leave over.

    Args:
        sink_tokens: First tokens of the context, always read (ours).
        window_tokens: Last tokens before a query, always read (ours).
        dense_tail_tokens: Last tokens of the prompt, whose queries read every key (ours).
        budget_tokens: The paper's k: keys above the threshold, on average over queries. A query
            that has no more candidates reads all.
        first_layers_budget_tokens: The same for the first two layers, whose attention is flat, if
            it is more.
        dense_first_layers: First layers that read every key (ours).
        compensation: What stands in the softmax denominator for the keys left out. ``exact``: their
            true sum. ``bound``: their number times ``exp(threshold)``. ``calibrated``: the mean of
            the samples. ``none``.
        compensation_scale: Factor on it, the paper's gamma.
        value_mean: Give the probability left out to the mean of all visible values.
        gqa: ``independent``, as in the paper, or ``union``: every head reads what any head of its
            group chose, for the same traffic (ours).
        sparse_prefill: Off: the prompt reads every key. Thresholds make decode cheaper, a prompt not.
    """

    sink_tokens: int = 64
    window_tokens: int = 256
    dense_tail_tokens: int = 128
    budget_tokens: int = 512
    first_layers_budget_tokens: int = 512
    dense_first_layers: int = 0
    compensation: Literal["exact", "bound", "calibrated", "none"] = "exact"
    compensation_scale: float = 1.0
    value_mean: bool = True
    gqa: Literal["independent", "union"] = "independent"
    sparse_prefill: bool = True

    def __post_init__(self) -> None:
        SchemeOptions.__post_init__(self)
        if not self.budget_tokens:
            raise SchemeConfigError("budget_tokens must be at least 1")
        if self.compensation not in tuple(_DROPPED_SUMS):  # a list would not be hashable
            raise SchemeConfigError(
                f"compensation must be one of {', '.join(_DROPPED_SUMS)}, got {self.compensation!r}"
            )
        if self.compensation_scale < 0:
            raise SchemeConfigError(f"compensation_scale must be a number >= 0, got {self.compensation_scale}")
        if self.value_mean and self.compensation == "none":
            raise SchemeConfigError("without compensation no probability is left for value_mean: switch it off")
        if self.gqa not in ("independent", "union"):
            raise SchemeConfigError(f"gqa must be 'independent' or 'union', got {self.gqa!r}")


class TopTheta(Scheme):
    """Top-theta attention (arXiv:2502.08363), thresholds before the softmax.

    A query with n candidates keeps those whose logit exceeds ``theta(layer, head, n)``; there are
    k of them on average, and nobody sorts. All keys are scored, so the exact softmax denominator
    costs nothing, and only the values of kept keys are read: of the bytes of dense decode at best
    half are saved. Rows with ``n <= k`` are untouched.

    Measured with the native kernels on synthetic keys, a tenth read per head, whose heads agree on
    nothing. One core with AMX, groups of 3 and 4: decode takes 0.7 to 0.9 of the time of dense at
    8,192 keys and 0.6 to 0.7 at 32,768. One with AVX2, a group of 3: 0.9 and 0.8; of 7, which reads
    half of the values: 1.06 and 0.97. A chunk of a prompt takes 1.03 to 1.4 times as long as dense.
    """

    name: ClassVar[str] = "top_theta"
    source: ClassVar[str] = (
        "Top-Theta Attention: Sparsifying Transformers by Compensated Thresholding, arXiv:2502.08363"
    )
    Options: ClassVar[type[SchemeOptions]] = TopThetaOptions
    options: TopThetaOptions
    calibrated: ClassVar[bool] = True

    # A window holds the query's own key; without one it has to pass the threshold like any other.
    keeps_own_tile = False
    keeps_own_token = False

    def __init__(self, options: TopThetaOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        super().__init__(options, profiles)
        self._prompt: Scheme = self if options.sparse_prefill else DENSE
        self._forced = options.sink_tokens + (options.window_tokens + 1 if options.window_tokens else 0)
        table = ThresholdTable.of(self.needed_profile(), "free" if self._forced else "all")
        budgets = [self._budget(layer) for layer in table.layers]
        points = table.points()
        by_budget = {budget: table.at(points, budget) for budget in set(budgets)}
        self._row = {layer: row for row, layer in enumerate(table.layers)}
        self._tables = {
            torch.device("cpu"): {
                # Thresholds of all layers, and what they leave out, [N, H, M], at M numbers of candidates.
                "points": points.log(),
                "budgets": torch.tensor(budgets)[:, None, None],
                **{
                    name: torch.stack([by_budget[budget][name][row] for row, budget in enumerate(budgets)])
                    for name in ("theta", "expected")
                },
            }
        }

    @classmethod
    def calibrator(cls, shape: ModelShape, options: Mapping[str, Any]) -> Calibrator:
        from ..calibration.top_theta import TopThetaCalibration, TopThetaCalibrator

        return TopThetaCalibrator(options_from(TopThetaCalibration, options), shape)

    def for_phase(self, phase: Phase) -> Scheme:
        return self._prompt if phase is Phase.PREFILL else self

    def page_stats(self, geometry: CacheGeometry) -> tuple[PageStat, ...]:
        return (VALUE_SUM,) if self.options.value_mean else ()

    def roles(self, num_layers: int) -> tuple[LayerRole, ...]:
        dense = min(self.options.dense_first_layers, num_layers)
        return (LayerRole(Role.DENSE),) * dense + (LayerRole(Role.SELECT),) * (num_layers - dense)

    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> ScoreThreshold:
        if layer.index not in self._row:
            raise ProfileError(f"the profile for {self.name} knows no thresholds of layer {layer.index}")
        theta, expected = self._thresholds(view.rows, self._row[layer.index])
        return ScoreThreshold(
            theta,
            _DROPPED_SUMS[self.options.compensation],
            self.options.compensation_scale,
            expected,
            self.options.value_mean,
            self.options.gqa == "union",
        )

    select_decode = select_prefill

    def _budget(self, layer: int) -> int:
        budget = self.options.budget_tokens
        return max(budget, self.options.first_layers_budget_tokens) if layer < FIRST_LAYERS else budget

    def _thresholds(self, rows: Rows, row: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[T, H]`` thresholds of the queries in one layer, and what they leave out if that is wanted."""
        tables = self._on(rows.block_tables.device)
        heads = tables["theta"].shape[1]
        together = rows.num_queries * heads * len(self._row) <= _AT_ONCE
        key = (self.name, self, None if together else row)
        if key not in rows.plans:
            part = slice(None) if together else slice(row, row + 1)
            rows.plans[key] = self._look_up(rows, tables, part)
        theta, expected = rows.plans[key]
        place = row if together else 0
        return theta[place], None if expected is None else expected[place]

    def _look_up(
        self, rows: Rows, tables: Mapping[str, torch.Tensor], part: slice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[layers, T, H]`` for the layers ``part``; waits for no device."""
        key = (self.name, self, "places")
        if key not in rows.plans:
            rows.plans[key] = self._places(rows, tables["points"])
        candidates, low, weight = rows.plans[key]

        def between(table: torch.Tensor) -> torch.Tensor:
            table = table[part]
            found = torch.lerp(table.index_select(2, low), table.index_select(2, low + 1), weight)
            return found.transpose(1, 2).contiguous()

        untouched = candidates[:, None] <= tables["budgets"][part]
        theta = between(tables["theta"]).masked_fill_(untouched, float("-inf"))
        if self.options.compensation != "calibrated":
            return theta, None
        return theta, between(tables["expected"]).exp_()

    def _places(self, rows: Rows, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Per query ``[T]``: candidates, the interval of ``points`` they fall in, and how far into it."""
        spans = zip(rows.host_context_lens, rows.host_query_lens, strict=True)
        visible = torch.cat([torch.arange(context - count + 1, context + 1) for context, count in spans])
        candidates = (visible - self._forced).to(points.device, non_blocking=True)
        at = candidates.clamp(min=1).float().log().clamp(points[0], points[-1])
        low = (torch.searchsorted(points, at, right=True) - 1).clamp(max=len(points) - 2)
        return candidates, low, (at - points[low]) / (points[low + 1] - points[low])

    def _on(self, device: torch.device) -> Mapping[str, torch.Tensor]:
        if device not in self._tables:
            on_host = self._tables[torch.device("cpu")]
            self._tables[device] = {name: tensor.to(device, non_blocking=True) for name, tensor in on_host.items()}
        return self._tables[device]
