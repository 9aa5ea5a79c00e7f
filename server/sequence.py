"""One choice of one request on its way through the engine."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from foveate.kv_cache.table import BlockTable
from foveate.sparse_attn.protocol import Phase

from .detokenizer import Detokenizer
from .request import GenerationRequest
from .sampling import SamplerRow
from .stopping import StopChecker


@dataclass(slots=True)
class Wait:
    """How a sequence stands in the queue; only the scheduler uses it.

    Attributes:
        found_tokens: Tokens of it that the prefix index held when somebody asked.
        is_blocked: It was its turn, and there were too few pages.
        passed_tokens: Tokens of the sequences that came in before it since then.
        pages: With fewer free pages it does not fit; 0 where that is not known.
    """

    found_tokens: int | None = None
    is_blocked: bool = False
    passed_tokens: int = 0
    pages: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, pages and sampler state of one choice. Only the engine's thread touches it.

    Attributes:
        group: The request and its other choices.
        index: Which choice of the request.
        tokens: Prompt and generated ids.
        sampler: How its next token is drawn.
        detokenizer: From ids to text.
        stopping: Watches for stop strings.
        table: Its pages; ``None`` while it waits.
        num_computed: Tokens whose K and V are in pages.
        wait: How it stands in the queue.
    """

    group: RequestGroup
    index: int
    tokens: list[int]
    sampler: SamplerRow
    detokenizer: Detokenizer
    stopping: StopChecker
    table: BlockTable | None = None
    num_computed: int = 0
    wait: Wait = field(default_factory=Wait)

    @property
    def reusable_tokens(self) -> list[int]:
        """Tokens whose keys may come from the cache. Where logits of the prompt are still wanted, they are computed."""
        request, done = self.group.request, self.group.num_scored
        if request.sampling.prompt_logprobs is None or done >= len(request.prompt_token_ids) - 1:
            return self.tokens
        return self.tokens[: done + 1]

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.group.request.prompt_token_ids)

    @property
    def seats(self) -> int:
        """Answers that will be written at once: the request's choices while they are one sequence, else one."""
        return 1 if self.index or self.num_generated else self.group.request.sampling.n

    @property
    def pages(self) -> list[int]:
        """Those of its table, none without one."""
        return [] if self.table is None else self.table.pages

    @property
    def priority(self) -> int:
        """Smaller goes first."""
        return self.group.request.priority

    @property
    def order(self) -> tuple[int, float, int]:
        """Priority, then the age of its request, then the choice: the order in which sequences are served."""
        return self.priority, self.group.request.arrival, self.index


@dataclass(slots=True, eq=False)
class RequestGroup:
    """A request and its unfinished choices.

    Attributes:
        request: As submitted.
        namespace: What its K and V depend on beside the tokens (policy, salt); ``None`` where nobody may find them.
        max_tokens: Tokens to generate at most, the context's limit counted in.
        sequences: Choices not yet finished. Before the prompt is computed there is one, which is
            then forked.
        cached_tokens: Prompt tokens found in the prefix cache.
        num_scored: Positions of the prompt whose logits told of its next token, if that was asked for.
        generated_tokens: Of all choices.
        pages: Most pages that its choices held at once.
        keys_read: Key reads done.
        keys_dense: Key reads that dense attention would have done.
        mass_kept: Attention mass kept, summed over the tokens that were audited.
        audited_tokens: Their number.
        waited_seconds: From its arrival until it was first computed; ``None`` before that.
    """

    request: GenerationRequest
    namespace: bytes | None
    max_tokens: int
    sequences: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0
    num_scored: int = 0
    generated_tokens: int = 0
    pages: int = 0
    keys_read: float = 0.0
    keys_dense: float = 0.0
    mass_kept: float = 0.0
    audited_tokens: int = 0
    waited_seconds: float | None = None

    @property
    def tile(self) -> int:
        """Prompts are best cut at multiples of so many tokens: there, chunks do not change what is selected."""
        scheme = self.request.scheme.for_phase(Phase.PREFILL)
        return scheme.tile if scheme.pools_queries else 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + count - 1`` of a sequence, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def ends_sequence(self) -> bool:
        """Whether the next token can be drawn after this chunk."""
        return self.start + self.count == len(self.sequence.tokens)

    @property
    def tokens(self) -> SequenceOf[int]:
        return self.sequence.tokens[self.start : self.start + self.count]
