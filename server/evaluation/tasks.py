"""The tasks. Those that retrieve follow RULER's construction (Hsieh et al., arXiv:2404.06654), in completion form.

Small models find a fact when the prompt ends where it would go on, and often not when they are
asked for it in a chat. So a prompt is a document and then the beginning of a sentence that only the
planted fact can end. Where several things are asked for, the next question follows on the answer:
it is read token by token, under the policy for decoding, and no dense tail helps it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase

from .document import Encode, Planted, compose

# Raised when a task is made in another way, so that results of both are not mixed.
VERSION = 1

_PLACES = (
    "Ankara", "Athens", "Bergen", "Bogota", "Bremen", "Cairo", "Cork", "Dakar", "Dallas", "Denver", "Dublin", "Geneva",
    "Havana", "Kyoto", "Lagos", "Lima", "Lisbon", "London", "Lyon", "Madrid", "Malta", "Miami", "Milan", "Naples",
    "Oslo", "Oxford", "Prague", "Quito", "Seoul", "Sydney", "Turin", "Venice", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip
_CODE_DIGITS = 7
_NAME_LETTERS = 3
_KEYS, _QUERIES, _HOPS = 4, 4, 4

# Tokens beyond those of the bare answer, for a model that says a word more.
_SPARE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing that is asked for.

    Attributes:
        text: The beginning of a sentence; ``{}`` stands for the first word of the answer before.
        answer: How the planted facts end it.
        tokens: To generate, at most.
    """

    text: str
    answer: str
    tokens: int

    def found(self, continuation: str) -> bool:
        """Whether ``continuation`` contains the answer, as a word of its own."""
        return re.search(rf"(?<!\w){re.escape(self.answer)}(?!\w)", continuation) is not None


@dataclass(frozen=True, slots=True)
class Prompt:
    """
    Attributes:
        text: The document, and the text of the first turn.
        turns: At least one.
    """

    text: str
    turns: tuple[Turn, ...]

    def score(self, continuations: Sequence[str]) -> float:
        """Share of the turns whose answer was found; one that was not reached was not."""
        found = [turn.found(text) for turn, text in zip(self.turns, continuations, strict=False)]
        return sum(found) / len(self.turns)


Write = Callable[[random.Random, Encode, int, float | None], Prompt]


@dataclass(frozen=True, slots=True)
class Task:
    """
    Attributes:
        about: What it shows, in a line.
        by_depth: It is run at several depths of the document.
        write: Makes the prompt from a generator, the tokenizer, the tokens of prompt and answers
            together, and the depth; ``None`` for a task that reads given text instead.
    """

    about: str
    by_depth: bool = False
    write: Write | None = None


def needle(rng: random.Random, encode: Encode, length: int, depth: float | None) -> Prompt:
    """One fact, and its beginning once more at the end (RULER's single needle)."""
    [(place, code)] = _codes(rng, 1)
    planted = [Planted(depth or 0.0, _fact(place, code))]
    return _prompt(rng, encode, length, planted, [(_asked(place), code)])


def multikey(rng: random.Random, encode: Encode, length: int, depth: float | None) -> Prompt:
    """One fact among three others of its kind at random depths (RULER's multi-key needle)."""
    facts = _codes(rng, _KEYS)
    depths = [depth or 0.0, *(rng.random() for _ in facts[1:])]
    planted = [Planted(where, _fact(*fact)) for where, fact in zip(depths, facts, strict=True)]
    place, code = facts[0]
    return _prompt(rng, encode, length, planted, [(_asked(place), code)])


def multiquery(rng: random.Random, encode: Encode, length: int, depth: float | None) -> Prompt:
    """Four facts at random depths, asked for one after the other (RULER's multi-query needle)."""
    facts = _codes(rng, _QUERIES)
    planted = [Planted(rng.random(), _fact(*fact)) for fact in facts]
    return _prompt(rng, encode, length, planted, [(_asked(place), code) for place, code in facts])


def variable_tracking(rng: random.Random, encode: Encode, length: int, depth: float | None) -> Prompt:
    """A chain of variables, each given the value of the one before (RULER's variable tracking).

    It is followed from its end: each question is about what the model itself answered, so a link
    counts only if the links behind it were found.
    """
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = "".join(rng.choices(ascii_uppercase, k=_NAME_LETTERS))
        names += [name] * (name not in names)
    value = str(rng.randrange(10 ** (_CODE_DIGITS - 1), 10**_CODE_DIGITS))
    texts = [f"The variable {names[0]} has the value {value}."]
    texts += [f"The variable {name} has the value of the variable {of}." for of, name in pairwise(names)]
    depths = sorted(rng.random() for _ in texts)
    planted = [Planted(*fact) for fact in zip(depths, texts, strict=True)]
    link = "\n\nReminder. The variable {} has the value of the variable"
    end = "\n\nReminder. The variable {} has the value"
    behind = names[:-1][::-1]
    asked = [(link.format(names[-1]), behind[0]), *((link, name) for name in behind[1:]), (end, value)]
    return _prompt(rng, encode, length, planted, asked)


TASKS = {
    "needle": Task("one fact in a long document", True, needle),
    "multikey": Task("one fact among three of its kind", True, multikey),
    "multiquery": Task("four facts, asked for one after the other", write=multiquery),
    "variable_tracking": Task("a chain of four variables, followed link by link", write=variable_tracking),
    "perplexity": Task("how well real text is predicted"),
    "agreement": Task("how often the best next token is dense's, and how far the distributions are apart"),
}


def _codes(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Places and codes, all different."""
    codes = rng.sample(range(10 ** (_CODE_DIGITS - 1), 10**_CODE_DIGITS), count)
    return list(zip(rng.sample(_PLACES, count), map(str, codes), strict=True))


def _fact(place: str, code: str) -> str:
    return f"The secret access code of {place} is {code}."


def _asked(place: str) -> str:
    return f"\n\nReminder. The secret access code of {place} is"


def _prompt(
    rng: random.Random, encode: Encode, length: int, planted: Sequence[Planted], asked: Sequence[tuple[str, str]]
) -> Prompt:
    """A prompt whose turns have the texts and answers ``asked``."""
    turns = tuple(Turn(text, answer, len(encode(f" {answer}")) + _SPARE_TOKENS) for text, answer in asked)
    later = sum(len(encode(turn.text.format(before.answer))) for before, turn in pairwise(turns))
    room = length - later - sum(turn.tokens for turn in turns)
    return Prompt(compose(rng, encode, room, planted, tail=turns[0].text), turns)
