"""Token ids to calibrate on: windows of a given text, or documents made here from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import resources
from pathlib import Path

Encode = Callable[[str], list[int]]

_NAMES = (
    "Ada", "Bruno", "Clara", "Dmitri", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Kemal", "Lucia", "Mira",
    "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Stefan", "Tomoko", "Umar", "Vera", "Wilma", "Yusuf",
)  # fmt: skip
_TRADES = ("baker", "engineer", "gardener", "judge", "librarian", "painter", "pilot", "surgeon", "tailor", "teacher")
_PLACES = ("archive", "brewery", "chapel", "dockyard", "garrison", "library", "mill", "museum", "theatre", "warehouse")
_SIDES = ("eastern", "lower", "new", "northern", "old", "southern", "upper", "western")
_TOWNS = ("Arvika", "Brno", "Cadiz", "Delft", "Evora", "Fano", "Ghent", "Halle", "Izmir", "Jena", "Kotor", "Lund")

# Two facts, and as many questions, per so many tokens.
_TOKENS_PER_CHAIN = 256


def prose() -> str:
    """The text that comes with the package: the GNU General Public License 3, free to copy as it is."""
    return (Path(str(resources.files("foveate.server"))) / "data" / "calibration.txt").read_text(encoding="utf-8")


def windows(ids: list[int], prefix: list[int], tokens: int, samples: int) -> list[list[int]]:
    """``samples`` pieces of ``tokens`` tokens, evenly spaced over ``ids`` and each begun with ``prefix``.

    Raises:
        ValueError: the text is too short for one.
    """
    length = tokens - len(prefix)
    if length < 1 or len(ids) < length:
        raise ValueError(
            f"the text has {len(ids)} tokens, a sample needs {max(length, 1)}; give more, or fewer --tokens"
        )
    last = len(ids) - length
    starts = [last * index // max(samples - 1, 1) for index in range(samples)]
    return [prefix + ids[start : start + length] for start in starts]


def documents(encode: Encode, prefix: list[int], tokens: int, samples: int) -> list[list[int]]:
    """Documents of ``tokens`` tokens: prose with facts strewn in, then questions that join two of them, answered.

    The same for the same tokenizer, always.

    Args:
        encode: Text to token ids, without special tokens.
        prefix: What each text of this model begins with.
        tokens: Per document, prefix included.
        samples: How many.
    """
    paragraphs = [encode(part.strip() + "\n\n") for part in prose().split("\n\n") if part.strip()]
    return [
        prefix + _document(random.Random(seed), encode, paragraphs, tokens - len(prefix)) for seed in range(samples)
    ]


def _document(rng: random.Random, encode: Encode, paragraphs: list[list[int]], tokens: int) -> list[int]:
    facts, questions = _chains(rng, max(2, tokens // _TOKENS_PER_CHAIN))
    pieces = [encode(fact + "\n\n") for fact in facts]
    tail = [token for question in questions for token in encode(question + "\n")]
    room = tokens - len(tail) - sum(map(len, pieces))
    place = rng.randrange(len(paragraphs))
    filler: list[list[int]] = []
    while room > 0:
        filler.append(paragraphs[place % len(paragraphs)][:room])
        room -= len(filler[-1])
        place += 1
    for piece in pieces:
        filler.insert(rng.randint(0, len(filler)), piece)
    # Only a document too short for its questions loses anything here: its beginning.
    return [token for piece in [*filler, tail] for token in piece][-tokens:]


def _chains(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    """``2 * count`` facts in random order, and ``count`` questions about pairs of them."""
    facts, questions = [], []
    everyone = [f"{name} the {trade}" for name in _NAMES for trade in _TRADES]
    everywhere = [f"the {side} {place}" for side in _SIDES for place in _PLACES]
    people = rng.sample(everyone, min(count, len(everyone), len(everywhere)))
    for person, place in zip(people, rng.sample(everywhere, len(people)), strict=True):
        town, code = rng.choice(_TOWNS), rng.randint(10000, 99999)
        facts += [f"{person} works in {place}.", f"{place.capitalize()} is in {town}, and its access code is {code}."]
        questions.append(f"{person} works in {place}, which is in {town}. The access code there is {code}.")
    rng.shuffle(facts)
    rng.shuffle(questions)
    return facts, questions
