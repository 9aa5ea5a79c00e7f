"""Sentences about nothing that a task asks for: without digits, names or codes, and as many as are wanted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


_WHO = _list(
    "the gardener | an old sailor | the night watchman | her youngest brother | a travelling merchant | a stable hand |"
    "the schoolteacher | the baker's wife | a retired judge | the clockmaker | his neighbour | the ferryman |"
    "a young painter | the postmaster | an apprentice carpenter | the village doctor | a wandering musician |"
    "the shepherd | the innkeeper | a quiet librarian | the glassblower | the stonemason | a foreign student |"
    "the tailor | the lighthouse keeper | a beekeeper | the miller's daughter | the captain | an elderly botanist"
)
_DID = _list(
    "carried | mended | sketched | described | forgot | sold | admired | inherited | borrowed | polished | hid |"
    "returned | weighed | examined | praised | photographed | repaired | counted | studied | wrapped"
)
_WHAT = _list(
    "a brass telescope | the torn map | two baskets of apples | a letter from abroad | the silver kettle |"
    "an unfinished portrait | a bundle of dry herbs | the broken violin | a leather satchel | the family almanac |"
    "a jar of honey | the painted screen | a coil of rope | an iron lantern | the wedding quilt | a sack of barley |"
    "the chess set | a bottle of ink | the copper bell | a wooden flute | the folded sail | a pair of boots |"
    "the wicker chair | a tin of biscuits | the marble bust"
)
_WHEN = _list(
    "before the rain began | late in the autumn | on the first warm evening of the year | while the others slept |"
    "as soon as the bells fell silent | after a long and tiresome journey | in the year of the great flood |"
    "without a word to anyone | just as the fog lifted | during the spring fair | when the tide was low |"
    "shortly after supper | to everyone's surprise | for reasons that nobody understood | with great care |"
    "once the guests had left"
)
_WHERE = _list(
    "beside the river | under the chestnut trees | in a narrow street | at the edge of the forest |"
    "near the town hall | on the stone steps | behind the orchard | in the small kitchen | along the sea wall |"
    "at the crossroads | in front of the bakery | by the frozen lake | in the attic | on the hill above the village"
)
_REMARK = _list(
    "nobody asked why | it was a habit that lasted many years | the children laughed about it for weeks |"
    "some said it was foolish | later it was told differently | the weather changed soon afterwards |"
    "there was nothing unusual in that | a dog barked in the distance | the smell of bread filled the air |"
    "still the work had to be done | the candles had almost burnt down | the road was empty by then |"
    "everyone agreed that the winter would be mild | it took longer than expected"
)

_FORMS: tuple[Callable[[Callable[[tuple[str, ...]], str]], str], ...] = (
    lambda of: f"{of(_WHO)} {of(_DID)} {of(_WHAT)} {of(_WHERE)} {of(_WHEN)}",
    lambda of: f"{of(_WHEN)}, {of(_WHO)} {of(_DID)} {of(_WHAT)}, and {of(_WHO)} {of(_DID)} {of(_WHAT)} {of(_WHERE)}",
    lambda of: f"{of(_WHERE)} {of(_WHO)} met {of(_WHO)}, who had {of(_DID)} {of(_WHAT)} {of(_WHEN)}",
    lambda of: f"{of(_REMARK)}, but {of(_WHO)} {of(_DID)} {of(_WHAT)} all the same",
    lambda of: of(_REMARK),
    lambda of: f"{of(_WHO)} told {of(_WHO)} that {of(_WHAT)} had been left {of(_WHERE)} {of(_WHEN)}",
)


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences without end, the same for the same ``rng``."""
    while True:
        text = rng.choice(_FORMS)(rng.choice)
        yield f"{text[0].upper()}{text[1:]}."
