"""What one layer's choice of keys holds of what another layer attends to: two ways to count it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..protocol import Phase


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """Pooled attention of R tiles in every layer.

    Attributes:
        scores: ``[L, R, G, U]`` float32, probability summed over a tile's queries and a KV head's query heads.
        starts: ``[R]``, position of each tile's first key of its own; in decode that of the query, plus 1.
        phase: Of all of them.
        queries: Query tokens of all tiles.
    """

    scores: torch.Tensor
    starts: torch.Tensor
    phase: Phase
    queries: int


class Holdings(ABC):
    """Sums over samples; indices ``[a, b, y, x]`` stand for heads x of layer a and y of layer b, a <= b.

    Args:
        layers: L.
        heads: KV heads, G.
        top_tokens: Keys per tile and head that are a choice.

    Attributes:
        kept_tokens: Keys before a tile that are no candidates, since they are read anyway.
    """

    weighs_layers: ClassVar[bool]
    kept_tokens: int = 0

    def __init__(self, layers: int, heads: int, top_tokens: int) -> None:
        self._shape = (layers, layers, heads, heads)
        self._top = top_tokens

    @abstractmethod
    def add(self, maps: Maps) -> None:
        """Takes the tiles of a chunk in."""

    @abstractmethod
    def end_sample(self) -> None:
        """The sample is over."""

    @abstractmethod
    def mean(self) -> torch.Tensor:
        """``[L, L, G, G]`` over the samples so far."""

    @abstractmethod
    def state(self) -> Mapping[str, torch.Tensor]: ...

    @abstractmethod
    def restore(self, state: Mapping[str, torch.Tensor]) -> None: ...

    def _held(self, scores: torch.Tensor) -> tuple[torch.Tensor, Iterator[tuple[int, int, torch.Tensor]]]:
        """What own choices hold, ``[L, R, G]``; and for each a <= b what a's choice holds for b, ``[R, G, G]``."""
        heads = scores.shape[2]
        best = torch.topk(scores, min(self._top, scores.shape[3]), dim=-1)

        def pairs() -> Iterator[tuple[int, int, torch.Tensor]]:
            for a in range(len(scores)):
                chosen = best.indices[a, :, None].expand(-1, heads, -1, -1)  # [R, y, x, k]
                for b in range(a, len(scores)):
                    theirs = scores[b, :, :, None].expand(-1, -1, heads, -1)
                    yield a, b, theirs.gather(3, chosen).sum(-1)

        return best.values.sum(-1), pairs()


class Similarity(Holdings):
    """The paper's (arXiv:2512.16391, section 3): a share, of the worst tile of a sample.

        r = (sum over top(a, x) of A(b, y) + own(b, y)) / (sum over top(b, y) of A(b, y) + own(b, y))

    A tile's own tokens count to both. Weighed by the importance of layer b.
    """

    weighs_layers = True

    def __init__(self, layers: int, heads: int, top_tokens: int) -> None:
        super().__init__(layers, heads, top_tokens)
        self._sum = torch.zeros(self._shape, dtype=torch.float64)
        self._samples = torch.zeros(1, dtype=torch.float64)
        self._least = torch.full(self._shape, float("inf"))

    def add(self, maps: Maps) -> None:
        outside = torch.arange(maps.scores.shape[3]) >= maps.starts[:, None, None]
        own = (maps.scores * outside).sum(-1)
        most, pairs = self._held(maps.scores.masked_fill(outside, 0.0))
        for a, b, held in pairs:
            # A tile without probability anywhere is held whole by any choice; rounding may exceed 1.
            share = ((held + own[b, :, :, None]) / (most[b] + own[b])[..., None]).nan_to_num(1.0).clamp(0.0, 1.0)
            self._least[a, b] = torch.minimum(self._least[a, b], share.amin(0))

    def end_sample(self) -> None:
        self._sum += self._least.double().nan_to_num(posinf=0.0)
        self._samples += 1
        self._least.fill_(float("inf"))

    def mean(self) -> torch.Tensor:
        return self._sum / self._samples

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"similarity": self._sum, "samples": self._samples}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sum, self._samples = state["similarity"].clone(), state["samples"].clone()


class Mass(Holdings):
    """Ours: attention per query that a's choice holds for b among the keys that must be chosen to be read.

    Those are the keys between sinks and window: what is always read cannot be lost, and where a
    layer looks nowhere else it may reuse any choice. Prompt and answer count alike.
    """

    weighs_layers = False

    def __init__(self, layers: int, heads: int, top_tokens: int, sink_tokens: int, window_tokens: int) -> None:
        super().__init__(layers, heads, top_tokens)
        self._sinks, self._window = sink_tokens, window_tokens
        self.kept_tokens = sink_tokens + window_tokens
        self._sum = torch.zeros(len(Phase), *self._shape, dtype=torch.float64)
        self._queries = torch.zeros(len(Phase), dtype=torch.float64)

    def add(self, maps: Maps) -> None:
        phase = list(Phase).index(maps.phase)
        keys = torch.arange(maps.scores.shape[3])
        free = (keys >= self._sinks) & (keys < maps.starts[:, None, None] - self._window)
        for a, b, held in self._held(maps.scores * free)[1]:
            self._sum[phase, a, b] += held.sum(0)
        self._queries[phase] += maps.queries

    def end_sample(self) -> None:
        pass

    def mean(self) -> torch.Tensor:
        seen = self._queries > 0
        return (self._sum[seen] / self._queries[seen, None, None, None, None]).mean(0)

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"held": self._sum, "queries": self._queries}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sum, self._queries = state["held"].clone(), state["queries"].clone()
