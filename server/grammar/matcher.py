"""A compiled grammar, and where one answer stands in it."""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from .compile import reason_of

Mask = NDArray[np.uint32]


class Grammar:
    """A compiled grammar; many answers may use it at once.

    Args:
        prototype: A matcher at its beginning, never moved.
        end_id: What ``prototype`` takes for the end of a text; no token of the model.
    """

    def __init__(self, prototype: llguidance.LLMatcher, end_id: int) -> None:
        self._prototype = prototype
        self._end_id = end_id

    def begin(self) -> GrammarState:
        """The beginning of an answer."""
        return GrammarState(self._prototype.deep_copy(), self._end_id)


class GrammarState:
    """Where one answer stands in its grammar. It belongs to the answer: preemption leaves it as it is."""

    def __init__(self, matcher: llguidance.LLMatcher, end_id: int) -> None:
        self._matcher = matcher
        self._end_id = end_id
        self._num_read = 0

    def read(self, output_token_ids: Sequence[int]) -> None:
        """Moves over the tokens that came since the last call. The list only ever grows."""
        for token in output_token_ids[self._num_read :]:
            self._matcher.consume_token(token)
        self._num_read = len(output_token_ids)

    @property
    def failure(self) -> str | None:
        """Why no token can follow although the text is not complete; ``None`` while all is well."""
        return reason_of(self._matcher.get_error()) if self._matcher.is_error() else None

    @property
    def accepts(self) -> bool:
        """Whether the text may end here."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether the text must end here: nothing may follow."""
        return self.accepts and self._matcher.is_stopped()

    def mask(self, vocab_size: int) -> Mask:
        """Tokens that may follow as text.

        Returns:
            ``[ceil(vocab_size / 32)]``, bit i % 32 of word i // 32 for token i. All zero after a failure or at the
            end. The end of the text itself is never among them.
        """
        words = np.zeros(-(-vocab_size // 32), np.uint32)
        if self._matcher.is_error() or self.is_complete:
            return words
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            return words
        given = np.frombuffer(bits, np.uint32)[: len(words)]
        words[: len(given)] = given
        set_bits(words, (self._end_id,), False)
        if vocab_size % 32:
            words[-1] &= np.uint32((1 << vocab_size % 32) - 1)
        return words


def set_bits(mask: Mask, tokens: Sequence[int], value: bool) -> None:
    """Allows or forbids ``tokens`` in ``mask``; those beyond it are left out."""
    for token in tokens:
        word, bit = divmod(token, 32)
        if word < len(mask):
            if value:
                mask[word] |= np.uint32(1 << bit)
            else:
                mask[word] &= np.uint32(~(1 << bit) & 0xFFFF_FFFF)
