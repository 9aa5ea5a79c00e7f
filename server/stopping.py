"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from .request import SamplingParams


class StopChecker:
    """Finds the stop string that is complete first, wherever the text is cut into pieces.

    Of several that are complete at the same character the longest counts. Text is held back only while it may be
    the beginning of a stop string (Knuth, Morris, Pratt, 1977: a few steps per character and stop string).

    Args:
        params: ``stop`` and ``include_stop_str_in_output`` are read.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._include = params.include_stop_str_in_output
        self._words = [(word, _borders(word)) for word in params.stop]
        self._matched = [0] * len(self._words)  # characters of each word that the text ends with
        self._held = ""

    def push(self, text: str, active: bool = True) -> tuple[str, bool]:
        """Takes new text.

        Args:
            text: What came since the last call.
            active: Whether a stop string that is complete now ends generation; false before ``min_tokens``.

        Returns:
            The text that may go out, and whether generation ends. After that nothing is held back.
        """
        if not self._words:
            return text, False
        position = len(self._held)
        self._held += text
        for char in text:
            position += 1
            found = self._step(char)
            if found and active:
                end = position if self._include else position - found
                emitted, self._held = self._held[:end], ""
                return emitted, True
        end = len(self._held) - max(self._matched)
        emitted, self._held = self._held[:end], self._held[end:]
        return emitted, False

    def flush(self) -> str:
        """What was held back. To be called when generation ends for another reason."""
        rest, self._held = self._held, ""
        return rest

    def _step(self, char: str) -> int:
        """Length of the longest stop string that ``char`` completes, or 0."""
        longest = 0
        for index, (word, borders) in enumerate(self._words):
            matched = self._matched[index]
            while matched and word[matched] != char:
                matched = borders[matched]
            matched += word[matched] == char
            if matched == len(word):
                longest = max(longest, matched)
                matched = borders[matched]
            self._matched[index] = matched
        return longest


def _borders(word: str) -> list[int]:
    """For each n, the longest proper prefix of ``word[:n]`` that also ends it."""
    borders = [0, 0]
    for char in word[1:]:
        length = borders[-1]
        while length and word[length] != char:
            length = borders[length]
        borders.append(length + (word[length] == char))
    return borders
