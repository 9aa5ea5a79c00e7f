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
from enum import Enum
from itertools import pairwise, takewhile

from .document import Encode, Planted, compose, own_tokens

# Raised when a task is made in another way, so that results of both are not mixed.
VERSION = 4

_PLACES = (
    "Ankara", "Athens", "Bergen", "Bogota", "Bremen", "Cairo", "Cork", "Dakar", "Dallas", "Denver", "Dublin", "Geneva",
    "Havana", "Kyoto", "Lagos", "Lima", "Lisbon", "London", "Lyon", "Madrid", "Malta", "Miami", "Milan", "Naples",
    "Oslo", "Oxford", "Prague", "Quito", "Seoul", "Sydney", "Turin", "Venice", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip
_PEOPLE = (
    "Albert", "Brenda", "Cedric", "Dorothy", "Edgar", "Frieda", "Gustav", "Harriet", "Igor", "Judith", "Konrad",
    "Louisa", "Martin", "Nora", "Oliver", "Paula", "Rupert", "Sonja", "Theodor", "Ursula", "Victor", "Winifred",
)  # fmt: skip
_GOODS = ("amber", "coffee", "cotton", "ivory", "pepper", "salt", "silk", "sugar", "timber", "tobacco", "wool")
_ANIMALS = ("camel", "cobra", "dolphin", "falcon", "leopard", "monkey", "panther", "parrot", "raven", "tiger", "zebra")
_RELATIONS = (
    "The messenger {} comes from",
    "The merchants of {} trade in",
    "The seal on the {} shows a",
    "The secret number of the {} is",
)
_REMINDER = "\n\nReminder. "
_CODE_DIGITS = 7
_KEYS = 4

# Tokens beyond those of the bare answer, for a model that says a word more.
_SPARE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Turn:
    """One thing that is asked for.

    Attributes:
        text: The beginning of a sentence; ``{}`` stands for the first word of the answer before.
        answer: How the planted facts end it.
        tokens: To generate, at most.
        depth: Where its fact stands, 0 to 1, if that was asked for.
    """

    text: str
    answer: str
    tokens: int
    depth: float | None = None

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

    def found(self, continuations: Sequence[str]) -> list[bool]:
        """Which turns' answers were found; in a chain, none behind the first that was not."""
        found = [turn.found(text) for turn, text in zip(self.turns, continuations, strict=False)]
        if any("{}" in turn.text for turn in self.turns):
            found = list(takewhile(bool, found))
        return found + [False] * (len(self.turns) - len(found))

    def score(self, continuations: Sequence[str]) -> float:
        """Share of the turns whose answer was found."""
        return sum(self.found(continuations)) / len(self.turns)


Write = Callable[[random.Random, Encode, int, Sequence[float]], Prompt]


class Depths(Enum):
    """What a task does with the depths that are asked for."""

    NONE = "none"
    EACH = "a prompt for each"
    ALL = "a prompt with a fact at each"


@dataclass(frozen=True, slots=True)
class Task:
    """
    Attributes:
        about: What it shows, in a line.
        depths: Where in the document what is asked for stands.
        write: Makes the prompt from a generator, the tokenizer, the tokens of prompt and answers
            together, and the depths, of which there is one with ``Depths.EACH``; ``None`` for a task
            that reads given text instead.
    """

    about: str
    depths: Depths = Depths.NONE
    write: Write | None = None


def needle(rng: random.Random, encode: Encode, length: int, depths: Sequence[float]) -> Prompt:
    """One fact, and its beginning once more at the end (RULER's single needle)."""
    return _facts(rng, encode, length, depths, asked=1)


def multikey(rng: random.Random, encode: Encode, length: int, depths: Sequence[float]) -> Prompt:
    """One fact among three others of its kind at random depths (RULER's multi-key needle)."""
    return _facts(rng, encode, length, [*depths, *(rng.random() for _ in range(_KEYS - 1))], asked=1)


def multiquery(rng: random.Random, encode: Encode, length: int, depths: Sequence[float]) -> Prompt:
    """Facts at each depth, asked for one after the other in a random order (RULER's multi-query needle)."""
    depths = rng.sample(depths, len(depths))
    return _facts(rng, encode, length, depths, asked=len(depths))


def variable_tracking(rng: random.Random, encode: Encode, length: int, depths: Sequence[float]) -> Prompt:
    """A chain of four facts at random depths, the answer of each the subject of the next (RULER's variable tracking).

    Each question is about what the model itself answered, and a link counts only if those before it
    were found. RULER gives variables the values of variables; models of 0.3B parameters do not
    follow that even with dense attention (measured: 0.2 of the links), but relations of different
    kinds they do.
    """
    links = [rng.choice(kind) for kind in (_PEOPLE, _PLACES, _GOODS, _ANIMALS)]
    links.append(str(rng.randrange(10 ** (_CODE_DIGITS - 1), 10**_CODE_DIGITS)))
    planted = [
        Planted(rng.random(), f"{relation.format(subject)} {answer}.")
        for relation, (subject, answer) in zip(_RELATIONS, pairwise(links), strict=True)
    ]
    asked = [(_REMINDER + relation, answer, None) for relation, answer in zip(_RELATIONS, links[1:], strict=True)]
    asked[0] = (_REMINDER + _RELATIONS[0].format(links[0]), links[1], None)
    return _prompt(rng, encode, length, planted, asked)


TASKS = {
    "needle": Task("one fact in a long document", Depths.EACH, needle),
    "multikey": Task("one fact among three others of its kind", Depths.EACH, multikey),
    "multiquery": Task("a fact at each depth, asked for one after the other", Depths.ALL, multiquery),
    "variable_tracking": Task("a chain of four facts, each leading to the next", write=variable_tracking),
    "perplexity": Task("how well real text is predicted"),
    "agreement": Task("how often the best next token is dense's, and how far the distributions are apart"),
}


def _codes(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Places and codes, all different.

    Raises:
        ValueError: there are not so many places.
    """
    if count > len(_PLACES):
        raise ValueError(f"{count} facts in a document are too many: there are {len(_PLACES)} places to tell them of")
    codes = rng.sample(range(10 ** (_CODE_DIGITS - 1), 10**_CODE_DIGITS), count)
    return list(zip(rng.sample(_PLACES, count), map(str, codes), strict=True))


def _fact(place: str, code: str) -> str:
    return f"The secret access code of {place} is {code}."


def _asked(place: str) -> str:
    return f"{_REMINDER}The secret access code of {place} is"


def _facts(rng: random.Random, encode: Encode, length: int, depths: Sequence[float], asked: int) -> Prompt:
    """A prompt with a code at each of ``depths``, and questions about the first ``asked`` of them."""
    facts = _codes(rng, len(depths))
    planted = [Planted(depth, _fact(*fact)) for depth, fact in zip(depths, facts, strict=True)]
    questions = [(_asked(place), code, depth) for (place, code), depth in zip(facts, depths, strict=True)]
    return _prompt(rng, encode, length, planted, questions[:asked])


def _prompt(
    rng: random.Random,
    encode: Encode,
    length: int,
    planted: Sequence[Planted],
    asked: Sequence[tuple[str, str, float | None]],
) -> Prompt:
    """A prompt whose turns have the texts, answers and depths ``asked``."""
    turns = tuple(
        Turn(text, answer, own_tokens(encode, f" {answer}") + _SPARE_TOKENS, depth) for text, answer, depth in asked
    )
    later = sum(own_tokens(encode, turn.text.format(before.answer)) for before, turn in pairwise(turns))
    room = length - later - sum(turn.tokens for turn in turns)
    return Prompt(compose(rng, encode, room, planted, tail=turns[0].text), turns)
