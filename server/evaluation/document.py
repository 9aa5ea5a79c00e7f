"""Documents of an exact length in tokens, with facts planted at exact depths."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from .filler import sentences

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Planted:
    """A sentence and where it goes: 0 is the beginning of the document, 1 its end."""

    depth: float
    text: str


def compose(
    rng: random.Random, encode: Encode, tokens: int, planted: Sequence[Planted], head: str = "", tail: str = ""
) -> str:
    """Filler with ``planted`` between its sentences.

    The document begins in the middle of a sentence, so that it can be as long as is asked to a
    word. Depths are measured in tokens of filler.

    Args:
        rng: Chooses the filler.
        encode: Text to token ids, as the whole will be encoded.
        tokens: Of the whole.
        planted: Facts, in any order.
        head: Text before the document.
        tail: Text behind it.

    Raises:
        ValueError: there is no room for what must be there.
    """
    stream = sentences(rng)
    bare = len(encode(_join(head, "", [], [], planted, tail)))
    if bare > tokens:
        raise ValueError(f"{tokens} tokens have no room for the {bare} that the task itself needs")
    filler: list[str] = []
    lengths: list[int] = []

    def text(opening: str) -> str:
        return _join(head, opening, filler, lengths, planted, tail)

    # A tokenizer may need fewer tokens for sentences in a row than for each alone: then more of them follow.
    while (room := tokens - len(encode(text("")))) > 0:
        while room > 0:
            filler.append(next(stream))
            lengths.append(own_tokens(encode, " " + filler[-1]))
            room -= lengths[-1]
    while filler and len(encode(text(""))) > tokens:
        filler.pop()
        lengths.pop()
    words = next(stream).split()
    for opening in _endings(words):
        if len(encode(text(opening))) <= tokens:
            return text(opening)
    return text("")


def own_tokens(encode: Encode, text: str) -> int:
    """Tokens of ``text`` inside a longer one: without those that every text begins or ends with."""
    return len(encode(text)) - len(encode(""))


def _endings(words: list[str]) -> Iterator[str]:
    """The last words of a sentence, most first."""
    for start in range(1, len(words)):
        yield " ".join(words[start:])


def _join(
    head: str, opening: str, filler: Sequence[str], lengths: Sequence[int], planted: Sequence[Planted], tail: str
) -> str:
    before = [0, *accumulate(lengths)]  # tokens in front of each gap between sentences
    pieces: list[list[str]] = [[] for _ in before]
    for fact in sorted(planted, key=lambda fact: fact.depth):
        place = fact.depth * before[-1]
        gap = bisect_left(before, place)
        if gap and place - before[gap - 1] < before[gap] - place:
            gap -= 1
        pieces[gap].append(fact.text)
    body = [opening, *pieces[0]]
    for sentence, facts in zip(filler, pieces[1:], strict=True):
        body += [sentence, *facts]
    return head + " ".join(part for part in body if part) + tail
