"""The protocol of a scheme: the only file that a scheme's author must read.

A scheme is one file in ``schemes/`` and one line in ``registry.py``. It only *chooses* keys. It
never computes attention, never writes the cache, keeps no state between calls, and does not know
which model or server it runs in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import PageStat
from foveate.kv_cache.view import LayerPages, PagedView, Rows

from .errors import CalibrationMissing, SchemeConfigError
from .profile import Profile
from .selection import CAUSAL, Band, Plan, Ranking, Segment, Tiles

if TYPE_CHECKING:
    from .calibration.base import Calibrator, ModelShape

OptionsClass = TypeVar("OptionsClass")


# No option counts more than this, tokens or anything else: positions stay far inside 32 bits.
LARGEST_COUNT = 1 << 24
# Kernels are given float32.
LARGEST_NUMBER = torch.finfo(torch.float32).max


def check_kinds(options: Any) -> None:
    """Holds the options that a dataclass annotates as ``int``, ``float`` or ``bool`` to what such an option can be.

    An option comes from one client, and what it breaks inside a step is broken for all in the step. A whole number
    that was given for a ``float`` becomes one: kernels take integers of 64 bits only.

    Raises:
        SchemeConfigError: an ``int`` is no whole number from 0 to ``LARGEST_COUNT``, a ``float`` no number that
            float32 holds, or a ``bool`` neither true nor false; the message names it.
    """
    for item in fields(options):
        value = getattr(options, item.name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if item.type in ("int", int):
            if not whole or value < 0:
                raise SchemeConfigError(f"{item.name} must be a whole number >= 0, got {value!r}")
            if value > LARGEST_COUNT:
                raise SchemeConfigError(f"{item.name} must be at most {LARGEST_COUNT}, got {value}")
        elif item.type in ("float", float):
            # Python compares a whole number of any size; NaN is never below.
            if not ((whole or isinstance(value, float)) and abs(value) <= LARGEST_NUMBER):
                raise SchemeConfigError(f"{item.name} must be a number that float32 holds, got {value!r}")
            object.__setattr__(options, item.name, float(value))
        elif item.type in ("bool", bool) and not isinstance(value, bool):
            raise SchemeConfigError(f"{item.name} must be true or false, got {value!r}")


@dataclass(frozen=True, slots=True)
class SchemeOptions:
    """Options that every scheme has; a scheme subclasses it and adds its own.

    ``budget.py`` alone acts on these: what they keep comes on top of what the scheme chooses. A scheme's own are
    looked at by ``check_kinds``, so its ``__post_init__`` calls this one first and says only what is particular.

    Args:
        sink_tokens: First tokens of the context, always read.
        window_tokens: Last tokens before each query's tile, always read.
        dense_tail_tokens: Last tokens of the prompt, whose queries read every key.
    """

    sink_tokens: int = 0
    window_tokens: int = 0
    dense_tail_tokens: int = 0

    def __post_init__(self) -> None:
        check_kinds(self)


class Role(Enum):
    """What a layer does under a scheme."""

    DENSE = "dense"
    DENSE_ANCHOR = "dense_anchor"  # reads everything, but its selection is made and carried
    SELECT = "select"
    REUSE = "reuse"


@dataclass(frozen=True, slots=True)
class LayerRole:
    """A layer's role; ``anchor`` is the layer whose selection a ``REUSE`` layer reads."""

    role: Role
    anchor: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """The model family's own attention facts, honoured by every kernel.

    Attributes:
        scale: Factor on the logits.
        softcap: ``softcap * tanh(logit / softcap)`` after scaling; 0 is off (Gemma 2).
        band: Causal, or the layer's own sliding window.
        sinks: ``[H]`` learned sink logits, or ``None`` (gpt-oss): one more term in the
            denominator, neither scaled nor capped.
    """

    scale: float
    softcap: float = 0.0
    band: Band = CAUSAL
    sinks: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerCall:
    """One layer's attention call: its index among the attention layers, and its facts."""

    index: int
    spec: AttentionSpec


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class Scheme(ABC):
    """A training-free rule for which keys each query reads.

    Class attributes:
        name: Registry key.
        source: The paper it follows.
        Options: Its options.
        calibrated: It reads a profile, made by ``foveate calibrate MODEL --scheme NAME``.
        pools_queries: In prefill a query's keys depend on the other queries of its tile too, so a
            prompt must be cut at multiples of ``tile`` for chunks to change nothing.
        same_in_decode: A query reads the same keys in decode as it would in a prompt.

    Attributes:
        granularity: Tokens per selected index.
        tile: Queries that share one selection row in prefill (1 in decode).
        keeps_own_tile: ``budget.py`` adds each tile's own tokens to its selection in prefill.
        keeps_own_token: The same of the newest token in decode.
        moves_positions: Some segment has a ``position_cap``, so a ``QueryRotator`` is needed.
        needs_token_ids: It reads ``Rows.host_token_ids``, which only an engine can give.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type[SchemeOptions]] = SchemeOptions
    calibrated: ClassVar[bool] = False
    pools_queries: ClassVar[bool] = False
    same_in_decode: ClassVar[bool] = True

    granularity: int = 1
    tile: int = 128
    keeps_own_tile: bool = True
    keeps_own_token: bool = True
    moves_positions: bool = False
    needs_token_ids: bool = False

    def __init__(self, options: SchemeOptions, profiles: Mapping[str, Profile] | None = None) -> None:
        """``profiles`` are those of the model, by scheme."""
        self.options = options
        self.profile = (profiles or {}).get(self.name)

    @property
    def identity(self) -> str:
        """Equal iff two schemes read the same keys: part of what a cached page depends on."""
        return f"{self.name}\0{self.options!r}\0{self.profile.digest if self.profile else ''}"

    def needed_profile(self) -> Profile:
        """The profile.

        Raises:
            CalibrationMissing: there is none; the message is the command that makes it.
        """
        if self.profile is None:
            raise CalibrationMissing(self.name)
        return self.profile

    @classmethod
    def calibrator(cls, shape: ModelShape, options: Mapping[str, Any]) -> Calibrator:
        """What learns this scheme's profile of a model, for schemes that are ``calibrated``.

        Args:
            shape: The model.
            options: Options of the calibration, as a user gave them.

        Raises:
            SchemeConfigError: the scheme reads no profile, or an option is unknown or out of range.
        """
        raise SchemeConfigError(f"{cls.name} reads no profile, so there is nothing to calibrate")

    def for_phase(self, phase: Phase) -> Scheme:
        """The scheme that acts in a phase: itself, unless it is made of others or reads all keys in that phase."""
        return self

    def page_stats(self, geometry: CacheGeometry) -> tuple[PageStat, ...]:
        """Statistics that the pool must keep for this scheme."""
        return ()

    def roles(self, num_layers: int) -> tuple[LayerRole, ...]:
        """One role per attention layer; by default all select."""
        return (LayerRole(Role.SELECT),) * num_layers

    @abstractmethod
    def select_prefill(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Plan:
        """Chooses keys for each tile of ``query`` ``[T, H, D]``; ``tiles`` are of size ``self.tile``.

        Sinks, window and the tile's own tokens need not be in the result, and should not be
        candidates (``budget.free_units``): the budget is for what they leave out.
        """

    @abstractmethod
    def select_decode(self, query: torch.Tensor, view: PagedView, tiles: Tiles, layer: LayerCall) -> Plan:
        """Chooses keys for one query per sequence, ``[S, H, D]``; ``tiles`` are of size 1."""

    def ranking(self, tiles: Tiles, phase: Phase) -> Ranking | None:
        """How queries choose, in every layer, where exact scores alone decide; otherwise ``None``.

        ``select_decode`` chooses the same: compiled kernels choose by this within a call for several layers, so who
        overrides one of the two overrides both.
        """
        return None

    def head_map(self, layer: LayerCall, device: torch.device) -> torch.Tensor | None:
        """``[G]`` int64, the row of its anchor's plan for each KV head of a ``REUSE`` layer; ``None``: its own."""
        return None

    def segments(self, plan: Plan, band: Band) -> tuple[Segment, ...]:
        """How the selected keys are read; by default in one piece, positions as the model has them."""
        return (Segment(plan, band),)


class QueryRotator(Protocol):
    """What ``patches`` knows of a model's rotary embedding, as far as a scheme may need it."""

    def cap(self, query: torch.Tensor, positions: torch.Tensor, cap: int, layer: int) -> torch.Tensor:
        """Moves rotated queries ``[T, H, D]`` from ``positions`` ``[T]`` to ``min(positions, cap)``."""
        ...


@dataclass(slots=True, eq=False)
class StepGroup:
    """Sequences of one step that share policy and phase: one call of the kernels.

    Attributes:
        scheme: The policy. ``None`` reads every key (dense prompt tails).
        phase: Prefill, or decode with one query per sequence.
        start: First of its queries in the step's packed row.
        rows: Its sequences.
        owners: For each sequence, the caller's index for ``StepState.keys_read``.
        carried: Plans of anchor layers, for the layers that reuse them.
        tiles: Tiles by size, made once per step.
        wanted: Whether anybody wants what the last layer makes of its queries. If not, it only writes their keys and
            values, and what else it makes of them may be anything.
    """

    scheme: Scheme | None
    phase: Phase
    start: int
    rows: Rows
    owners: tuple[int, ...]
    carried: dict[int, Plan] = field(default_factory=dict)
    tiles: dict[int, Tiles] = field(default_factory=dict)
    wanted: bool = True

    def tiles_of(self, size: int) -> Tiles:
        if size not in self.tiles:
            self.tiles[size] = Tiles.of(self.rows, size)
        return self.tiles[size]

    def owner_index(self, device: torch.device) -> torch.Tensor:
        """``[S]`` int64: ``owners``, uploaded once per step."""
        if "owners" not in self.rows.plans:
            self.rows.plans["owners"] = torch.tensor(self.owners).to(device, non_blocking=True)
        index: torch.Tensor = self.rows.plans["owners"]
        return index


class Observer(Protocol):
    """Looks on while a step is computed: the audit, and calibration."""

    def see(
        self,
        query: torch.Tensor,
        view: PagedView,
        layer: LayerCall,
        group: StepGroup,
        segments: Sequence[Segment],
        lse: torch.Tensor,
    ) -> None:
        """One group's attention in one layer, after it was computed.

        Args:
            query: ``[T, H, D]``, as the model rotated it.
            view: Keys of this step are written.
            layer: Which layer, and its facts.
            group: Which sequences, phase and scheme.
            segments: What was read.
            lse: ``[T, H]`` float32, natural log-sum-exp of the logits read, learned sinks left out.
        """
        ...


class LayerPool(Protocol):
    """The part of the pool that a step needs."""

    @property
    def num_layers(self) -> int: ...

    def layer(self, index: int) -> LayerPages: ...


Roles = MutableMapping[Scheme, tuple[tuple[LayerRole, ...], frozenset[int | None]]]


@dataclass(slots=True, eq=False)
class StepState:
    """Everything one forward pass needs beside the model; made per step, passed explicitly.

    Attributes:
        pool: Pages by layer.
        slots: ``[T]`` int64, where each token's K and V go (page * page_size + offset); -1 is nowhere.
        positions: ``[T]`` int64.
        groups: Cover the T queries without gap or overlap, in order.
        rotary: For schemes that read keys at other positions, or ``None``.
        keys_read: ``[owners, 2]`` float64 on the device: key reads done, and what dense attention
            would have read, summed over queries, heads and layers.
        roles: Layer roles by scheme, and the anchors among them; kept over steps of one model by whoever makes them.
        observer: Called after each group of each layer, or ``None``.
    """

    pool: LayerPool
    slots: torch.Tensor
    positions: torch.Tensor
    groups: Sequence[StepGroup]
    rotary: QueryRotator | None
    keys_read: torch.Tensor
    roles: Roles = field(default_factory=WeakKeyDictionary)
    observer: Observer | None = None

    @property
    def num_layers(self) -> int:
        return self.pool.num_layers


def options_from(cls: type[OptionsClass], given: Mapping[str, Any]) -> OptionsClass:
    """Builds options, a dataclass, from a request's dict.

    Raises:
        SchemeConfigError: an option is unknown (the message lists those that exist) or out of range.
    """
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - known)
    if unknown:
        raise SchemeConfigError(f"unknown option {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    return cls(**given)
