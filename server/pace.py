"""How fast steps are, learnt while they run: how much prompt fits beside answers, and when a queue will move."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .loader import LoadedModel
from .sequence import Chunk, Sequence

# Tokens of prompt beside the first answers, before anything was measured.
FIRST_WORK = 64.0
# A single step counts for so much of what is expected of the next.
NEWEST_SHARE = 0.5
# A step that the machine held up must not change what is expected by more than this factor.
LARGEST_CHANGE = 2.0
# Steps with less work say little about what work costs.
LEAST_WORK = 16.0
# The rate of prompt tokens forgets what is older than about this.
RATE_SECONDS = 30.0
# Weights of a layer, where no linear layer tells its shape.
_UNKNOWN_LINEAR = 2**20


def context_of_equal_cost(loaded: LoadedModel) -> float:
    """Keys whose dense attention costs a token as many multiplications as its linear layers do.

    3,000 for SmolLM2-135M, 25,000 for a Llama of 7B.
    """
    head = loaded.model.get_output_embeddings()
    # Not the weights: those of a layer may be packed into something that is no parameter.
    linear = sum(
        layer.in_features * layer.out_features
        for layer in loaded.model.modules()
        if layer is not head and hasattr(layer, "in_features") and hasattr(layer, "out_features")
    )
    facts = loaded.attached.facts
    linear = linear or facts.num_layers * _UNKNOWN_LINEAR
    return float(linear / (2 * facts.num_layers * facts.num_heads * facts.head_dim))


class Pace:
    """The time of a step as ``answers + work * unit``, both learnt.

    Work is counted in prompt tokens: a token costs 1 for the linear layers, and as much again for
    every ``context_of_equal_cost`` keys that it reads. Where that is wrong (a kernel's speed, a
    scheme's selection), the unit drifts with the context, and a step is corrected by the one before.
    With a constant cost the chunk comes to the asked time by the share of the answers' time in it
    per step, whatever the start.

    Args:
        step_seconds: Time that a step may take while answers are written.
        context_of_equal_cost: Keys whose attention costs a token as much as its linear layers.
    """

    def __init__(self, step_seconds: float, context_of_equal_cost: float) -> None:
        self._step_seconds = step_seconds
        self._key_work = 1 / context_of_equal_cost
        self._unit: float | None = None  # seconds per work
        self._answers = 0.0  # seconds of a step without prompts
        self._tokens = self._seconds = 0.0

    @property
    def room(self) -> float:
        """Work for prompts in a step that also writes answers.

        At least as much time as the answers themselves take: otherwise many answers would let no
        prompt come in.
        """
        if self._unit is None:
            return FIRST_WORK
        return max(self._step_seconds - self._answers, self._answers) / self._unit

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens computed per second of late, answers and pauses for them counted in; 0 if none were."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def work(self, chunk: Chunk) -> float:
        """Work of a chunk of prompt."""
        return chunk.count * (1 + self._per_key(chunk.sequence) * (chunk.start + chunk.count / 2))

    def tokens(self, work: float, chunk: Chunk) -> int:
        """How many tokens from the start of ``chunk`` on cost ``work``."""
        per_key = self._per_key(chunk.sequence)
        linear = 1 + per_key * chunk.start
        # per_key / 2 * n^2 + linear * n = work, solved in the form that does not cancel for a small per_key
        return math.floor(2 * work / (linear + math.sqrt(linear * linear + 2 * per_key * work)))

    def observe(self, chunks: Iterable[Chunk], seconds: float) -> None:
        """Learns from a step that took ``seconds``."""
        prompts = [chunk for chunk in chunks if chunk.count > 1]
        tokens = sum(chunk.count for chunk in prompts)
        kept = math.exp(-seconds / RATE_SECONDS)
        self._tokens, self._seconds = self._tokens * kept + tokens, self._seconds * kept + seconds
        if not prompts:
            self._answers += (seconds - self._answers) * (NEWEST_SHARE if self._answers else 1)
            return
        work = sum(map(self.work, prompts))
        unit = max(seconds - self._answers, seconds / 10) / work
        if self._unit is None:
            self._unit = unit
        elif work >= LEAST_WORK:
            unit = min(max(unit, self._unit / LARGEST_CHANGE), self._unit * LARGEST_CHANGE)
            self._unit += (unit - self._unit) * NEWEST_SHARE

    def _per_key(self, sequence: Sequence) -> float:
        group = sequence.group
        return self._key_work * (group.keys_read / group.keys_dense if group.keys_dense else 1.0)
