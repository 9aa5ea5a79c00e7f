"""When requests of an open load arrive, and what is said of how they were answered. Needs no model and no server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from .figures import spread


def poisson(rate: float, count: int, seed: object) -> list[float]:
    """Seconds at which ``count`` requests arrive, ascending: gaps are exponential with mean ``1 / rate``.

    The same seed gives the same moments, and a rate twice as high the same moments at half the time.

    Raises:
        ValueError: ``rate`` is not above 0.
    """
    if not rate > 0:
        raise ValueError(f"arrivals need a rate above 0, got {rate}")
    source = random.Random(seed if isinstance(seed, (int, str)) else str(seed))
    return list(accumulate(source.expovariate(1.0) / rate for _ in range(count)))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client saw of one request; all times in seconds since the load began.

    Attributes:
        due: When it should have been sent.
        sent: When it was.
        pieces: When each piece of the stream with text came.
        end: When it was over, well or not.
        tokens: Generated, as the server counts them.
        error: ``None`` if the answer is whole, else what went wrong: ``429``, ``timeout`` and the like.
        last: When the last token came, with the reason why it was the last; it may have had no text.
    """

    due: float
    sent: float
    pieces: tuple[float, ...]
    end: float
    tokens: int
    error: str | None = None
    last: float | None = None

    @property
    def ttft(self) -> float | None:
        """Time to first token, from when the request was due: a late client must not flatter the server."""
        return self.pieces[0] - self.due if self.pieces else None

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first that has text; ``None`` of one token."""
        if not self.pieces or self.tokens < 2:
            return None
        last = self.pieces[-1] if self.last is None else self.last
        return (last - self.pieces[0]) / (self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Between one piece and the next: what a reader feels."""
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]

    def keeps(self, slo_ttft: float, slo_tpot: float) -> bool:
        """Whether it was answered whole and in time."""
        if self.error is not None or self.ttft is None:
            return False
        return self.ttft <= slo_ttft and (self.tpot is None or self.tpot <= slo_tpot)


def summarize(answers: Sequence[Answer], slo_ttft: float, slo_tpot: float) -> dict[str, Any]:
    """Waiting times of the whole answers, and what was good among all.

    The load lasts from 0, when it begins, to the end of its last answer. ``goodput`` is requests per second of
    these seconds that kept both promises.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("no answers")
    whole = [answer for answer in answers if answer.error is None]
    good = [answer for answer in answers if answer.keeps(slo_ttft, slo_tpot)]
    seconds = max(answer.end for answer in answers)
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    return {
        "requests": len(answers),
        "completed": len(whole),
        "errors": errors,
        "seconds": seconds,
        "tokens_per_second": sum(answer.tokens for answer in whole) / seconds,
        "goodput": len(good) / seconds,
        "good_share": len(good) / len(answers),
        "ttft_seconds": spread([answer.ttft for answer in whole if answer.ttft is not None]),
        "tpot_seconds": spread([answer.tpot for answer in whole if answer.tpot is not None]),
        "itl_seconds": spread([gap for answer in whole for gap in answer.gaps]),
        "late_seconds": max(answer.sent - answer.due for answer in answers),
    }
