"""What ``foveate calibrate`` asks of a scheme's calibration.

A scheme that reads a profile overrides ``Scheme.calibrator``. The command runs samples of text
through the model with dense attention and lets the calibrator look on, as ``StepState.observer``;
so what is learnt is learnt of the dense model, whatever the paper did.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from foveate.kv_cache.view import PagedView

from ..errors import SchemeConfigError
from ..protocol import check_kinds
from ..selection import Segment

if TYPE_CHECKING:  # the protocol's Scheme hands out calibrators
    from ..protocol import LayerCall, StepGroup


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a calibrator must know of the model.

    Attributes:
        num_layers: L, attention layers.
        num_heads: H, query heads.
        num_kv_heads: G.
        head_dim: D.
        windows: Per layer, the model's own sliding window in tokens, or ``None``. Such layers are
            read whole, so there is nothing to learn of them.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @property
    def global_layers(self) -> tuple[int, ...]:
        """Layers without a window of their own, in order."""
        return tuple(layer for layer, window in enumerate(self.windows) if window is None)


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """Options of a calibration; a calibrator subclasses it. They become the profile's ``options``.

    Raises:
        SchemeConfigError: an option is out of range; the message names it.
    """

    def __post_init__(self) -> None:
        check_kinds(self)


class Calibrator(ABC):
    """Learns one scheme's profile from dense forward passes; a ``protocol.Observer``.

    The life of one: ``restore`` perhaps, then per sample its chunks (``see``, and ``see_residual``
    if ``needs_residual``, for each layer) and ``end_sample``, at last ``result``. ``state`` is asked
    for between samples only, so what belongs to a sample under way need not be in it.

    Class attributes:
        Options: Its options.
        needs_residual: ``see_residual`` is wanted.
        samples: Samples that the command runs if it is told no number.
        sample_tokens: Tokens of each, likewise.

    Attributes:
        options: As given.
        shape: The model.
        tile_tokens: Chunks of a sample are cut at multiples of it.
        decode_tokens: Last tokens of each sample that are run one by one, in ``Phase.DECODE``.
    """

    Options: ClassVar[type[CalibrationOptions]] = CalibrationOptions
    needs_residual: ClassVar[bool] = False
    samples: ClassVar[int] = 16
    sample_tokens: ClassVar[int] = 2048

    tile_tokens: int = 1
    decode_tokens: int = 0

    def __init__(self, options: CalibrationOptions, shape: ModelShape) -> None:
        """
        Raises:
            SchemeConfigError: the model has no layer to learn of.
        """
        if not shape.global_layers:
            raise SchemeConfigError("every layer of this model has a window of its own: nothing is left to select")
        self.options = options
        self.shape = shape

    @abstractmethod
    def see(
        self,
        query: torch.Tensor,
        view: PagedView,
        layer: LayerCall,
        group: StepGroup,
        segments: Sequence[Segment],
        lse: torch.Tensor,
    ) -> None:
        """One layer's attention over one chunk of one sample, as ``protocol.Observer.see``."""

    def see_residual(self, layer: int, residual: torch.Tensor, update: torch.Tensor) -> None:  # noqa: B027, optional
        """What attention added to the residual stream; comes after ``see`` of the same layer and chunk.

        Args:
            layer: Among the attention layers.
            residual: ``[T, E]``, the layer's input.
            update: ``[T, E]``, what is added to it.
        """

    def end_sample(self) -> None:  # noqa: B027, optional
        """The sample is over: fold what it showed into the totals.

        Raises:
            SchemeConfigError: it was too short to learn from; the message says what length is needed.
        """

    @abstractmethod
    def result(self) -> tuple[Mapping[str, Any], Mapping[str, torch.Tensor]]:
        """What was learnt: entries for the profile's ``options`` beside the calibration's own, and its tensors.

        Raises:
            SchemeConfigError: too little was seen to learn from; the message says what is missing.
        """

    @abstractmethod
    def state(self) -> Mapping[str, torch.Tensor]:
        """Totals over the samples so far, for going on after a kill: ``restore`` takes them."""

    @abstractmethod
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from ``state``; the options and the model are the same."""
