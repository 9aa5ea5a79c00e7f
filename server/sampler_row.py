"""What the sampler knows of one sequence. The sequence owns it, so nothing stays behind in a batch slot."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .grammar.matcher import GrammarState, Mask, set_bits
from .request import SamplingParams

# Below this, float32 has no room between the best token and the next: choose the best.
GREEDY_BELOW = 1e-5


class TokenCounts:
    """Distinct tokens of one sequence, and how often each was generated.

    Attributes:
        ids: Distinct tokens, in the order in which they were met.
        counts: Beside each, how often it was generated; 0 for those met in the prompt only.
    """

    __slots__ = ("_num_read", "_slots", "counts", "ids")

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt_token_ids))}
        self.ids = array("q", self._slots)
        self.counts = array("q", bytes(8 * len(self._slots)))
        self._num_read = 0

    def update(self, output_token_ids: Sequence[int]) -> None:
        """Counts what was generated since the last call. The list only ever grows."""
        for token in output_token_ids[self._num_read :]:
            slot = self._slots.setdefault(token, len(self.ids))
            if slot == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[slot] += 1
        self._num_read = len(output_token_ids)


@dataclass(slots=True, eq=False)
class SamplerRow:
    """How the next token of one sequence is drawn.

    The state (random stream, token counts) outlives a preemption: a sequence that is computed
    again draws on where it stopped.

    Args:
        params: Checked by ``check_sampling``.
        prompt_token_ids: Live list of the sequence, read only.
        output_token_ids: Live list of the sequence; the engine appends, the row reads.
        eos_token_ids: What ends a text for this model.
        choice: Which of the ``n`` choices; its seed is ``params.seed + choice``.

    Attributes:
        greedy: The best token is taken, nothing is drawn.
        penalised: Tokens already seen change the logits.
        bias_ids: Ids of ``params.logit_bias``.
        bias_values: Their biases.
        ender_ids: End-of-text and stop ids.
        grammar: Where the answer stands in ``params.grammar``.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: list[int]
    eos_token_ids: Sequence[int]
    choice: int = 0
    greedy: bool = field(init=False)
    penalised: bool = field(init=False)
    bias_ids: array[int] = field(init=False, repr=False)
    bias_values: array[float] = field(init=False, repr=False)
    ender_ids: array[int] = field(init=False, repr=False)
    grammar: GrammarState | None = field(init=False, repr=False, default=None)
    _generator: torch.Generator | None = field(init=False, repr=False, default=None)
    _counts: TokenCounts | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        params = self.params
        self.greedy = params.temperature < GREEDY_BELOW or params.top_k == 1
        self.penalised = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        self.bias_ids = array("q", params.logit_bias)
        self.bias_values = array("f", params.logit_bias.values())
        self.ender_ids = array("q", dict.fromkeys((*self.eos_token_ids, *params.stop_token_ids)))
        if params.grammar is not None:
            self.grammar = params.grammar.begin()

    @property
    def must_go_on(self) -> bool:
        """Whether ``min_tokens`` is not reached yet."""
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the grammar lets nothing follow."""
        if self.grammar is None:
            return False
        self.grammar.read(self.output_token_ids)
        return self.grammar.is_complete

    def allowed(self, vocab_size: int) -> tuple[Mask, bool]:
        """What the grammar of this row, which has one, lets follow.

        Returns:
            Mask as ``GrammarState.mask`` gives it, with what may end the text, and whether there is nothing else.
        """
        assert self.grammar is not None
        self.grammar.read(self.output_token_ids)
        mask = self.grammar.mask(vocab_size)
        set_bits(mask, self.eos_token_ids, False)
        only_end = not mask.any() and self.grammar.accepts
        if only_end:
            set_bits(mask, self.eos_token_ids, True)
        if self.grammar.accepts:
            set_bits(mask, self.params.stop_token_ids if self.params.ignore_eos else self.ender_ids, True)
        return mask, only_end

    def counts(self) -> TokenCounts:
        """Tokens seen so far. Only the repetition penalty looks at the prompt."""
        if self._counts is None:
            self._counts = TokenCounts(self.prompt_token_ids if self.params.repetition_penalty != 1 else ())
        self._counts.update(self.output_token_ids)
        return self._counts

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The row's own random stream, or ``None`` where no seed was given."""
        if self._generator is None and self.params.seed is not None:
            self._generator = torch.Generator(device).manual_seed(self.params.seed + self.choice)
        return self._generator

    def stream_state(self) -> torch.Tensor | None:
        """Where the random stream stands; ``None`` while nothing was drawn from it."""
        return None if self._generator is None else self._generator.get_state()

    def restore_stream(self, state: torch.Tensor | None) -> None:
        """Puts the random stream back to where ``stream_state`` found it."""
        if self._generator is not None and state is not None:
            self._generator.set_state(state)
        else:
            self._generator = None
