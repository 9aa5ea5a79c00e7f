"""Log-probabilities as completions write them: four lists side by side, an echoed prompt in front."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .answers import finite
from .request import TokenLogprob
from .token_text import TokenText

Lists = dict[str, list[Any]]
_CONTINUATION = 0x80  # the two upper bits of every byte of a character but its first are 10


class CompletionLogprobs:
    """The lists of one choice, in pieces.

    ``text_offset`` is where a token begins in the choice's text, in characters. A token that begins
    within a character has the offset of that character.

    Args:
        tokens: Text and bytes of tokens.
        skip_special_tokens: Whether special tokens are left out of the text.
        offset: Characters in front of the first token.
    """

    def __init__(self, tokens: TokenText, skip_special_tokens: bool, offset: int = 0) -> None:
        self._tokens = tokens
        self._skip = skip_special_tokens
        self._offset = offset

    def lists(self, entries: Iterable[TokenLogprob]) -> Lists:
        """The lists for the tokens that come next."""
        lists = _empty()
        for entry in entries:
            _, spelled = self._tokens.of(entry.token_id)
            silent = self._skip and self._tokens.is_special(entry.token_id)
            begin, self._offset = (self._offset, self._offset) if silent else _counted(spelled, self._offset)
            _append(lists, self._tokens, entry.token_id, entry.logprob, _best(entry, self._tokens), begin)
        return lists


def echoed(token_ids: Sequence[int], text: str, entries: Sequence[TokenLogprob], top: int, tokens: TokenText) -> Lists:
    """The lists for a prompt. Its first token has no log-probability: nothing was predicted for it.

    Args:
        token_ids: T tokens.
        text: Their text, as it is echoed.
        entries: T - 1.
        top: Alternatives to show beside each.
        tokens: Text and bytes of tokens.
    """
    lists = _empty()
    offset = 0
    for index, token_id in enumerate(token_ids):
        begin, offset = _followed(token_id, text, offset, tokens)
        entry = entries[index - 1] if index else None
        best = None if entry is None else _best(entry, tokens, top)
        _append(lists, tokens, token_id, None if entry is None else entry.logprob, best, begin)
    return lists


def joined(first: Lists, second: Lists) -> Lists:
    return {name: first[name] + second[name] for name in first}


def sliced(lists: Lists, size: int) -> Iterable[Lists]:
    """The same in pieces of ``size`` tokens."""
    for start in range(0, len(lists["tokens"]), size):
        yield {name: values[start : start + size] for name, values in lists.items()}


def prompt_logprobs(
    entries: Sequence[TokenLogprob], top: int, tokens: TokenText
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's ``prompt_logprobs``: per token of the prompt its id and the best ones; ``None`` for the first.

    ``rank`` is ``None`` where the token is not among the best.
    """
    body: list[dict[str, dict[str, Any]] | None] = [None]
    for entry in entries:
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:top], 1)}
        pairs = {entry.token_id: ranked.get(entry.token_id, (entry.logprob, None)), **ranked}
        body.append(
            {
                str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": tokens.of(token)[0]}
                for token, (logprob, rank) in pairs.items()
            }
        )
    return body


def _empty() -> Lists:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _append(
    lists: Lists, tokens: TokenText, token_id: int, logprob: float | None, best: dict[str, float] | None, begin: int
) -> None:
    lists["tokens"].append(tokens.of(token_id)[0])
    lists["token_logprobs"].append(None if logprob is None else finite(logprob))
    lists["top_logprobs"].append(best)
    lists["text_offset"].append(begin)


def _best(entry: TokenLogprob, tokens: TokenText, top: int | None = None) -> dict[str, float]:
    """By text, the token itself among them, as OpenAI has it. Of tokens with equal text the best counts."""
    best: dict[str, float] = {}
    for token, logprob in (*entry.top[:top], (entry.token_id, entry.logprob)):
        best.setdefault(tokens.of(token)[0], finite(logprob))
    return best


def _counted(spelled: Sequence[int], offset: int) -> tuple[int, int]:
    """Where a token begins and ends, by its bytes."""
    inside = bool(spelled) and spelled[0] & 0xC0 == _CONTINUATION
    return max(0, offset - inside), offset + sum(byte & 0xC0 != _CONTINUATION for byte in spelled)


def _followed(token_id: int, text: str, offset: int, tokens: TokenText) -> tuple[int, int]:
    """The same where the text is known: it may lack a leading space, or special tokens that were added to it."""
    piece, spelled = tokens.of(token_id)
    if "\ufffd" not in piece:
        for shown in (piece, piece.removeprefix(" ")):
            if text.startswith(shown, offset):
                return offset, offset + len(shown)
        if tokens.is_special(token_id):
            return offset, offset
    begin, end = _counted(spelled, offset)
    return min(begin, len(text)), min(end, len(text))
