"""Log-probabilities of a prompt's own tokens, from the step that computes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from foveate.patches.logit_rows import LogitRows

from .exceptions import BadLogits
from .loader import LoadedModel
from .logits import upload
from .logprobs import as_logprobs, fetch, log_probabilities
from .request import TokenLogprob
from .sequence import Chunk

# Logits in memory at once: 64 rows of a vocabulary of 262,144 are 32 MB in bfloat16, 0.3 GB with what comes of them.
BLOCK_ELEMENTS = 2**24
BLOCK_ROWS = 512

PromptScores = tuple[TokenLogprob, ...] | BadLogits | None


class PromptScorer:
    """What the chunks of one step ask of their prompts: the rows at which to look, and what is found there.

    The logits of position p tell of the token at p + 1. What a preempted request was told already
    is not computed again.

    Args:
        loaded: The model.
        chunks: Of this step.
    """

    def __init__(self, loaded: LoadedModel, chunks: Sequence[Chunk]) -> None:
        self._loaded = loaded
        self._chunks = chunks
        self._wanted = [_positions(chunk) for chunk in chunks]
        self._rows: list[dict[int, int]] = [{} for _ in chunks]  # position -> row

    @property
    def asks(self) -> bool:
        """Is anything asked for?"""
        return any(self._wanted)

    def place(self, owner: int, start: int, count: int, row: int) -> None:
        """Says that positions ``start`` to ``start + count - 1`` of chunk ``owner`` are packed from ``row`` on."""
        wanted = self._wanted[owner]
        for position in range(max(start, wanted.start), min(start + count, wanted.stop)):
            self._rows[owner][position] = row + position - start

    def watching(self) -> AbstractContextManager[LogitRows | None]:
        """To be held around the forward pass and ``scores``."""
        return LogitRows(self._loaded.model) if any(self._rows) else nullcontext()

    def scores(self, logits: LogitRows | None) -> list[PromptScores]:
        """Per chunk, the log-probabilities of prompt tokens; ``None`` where nothing was asked."""
        found: list[PromptScores] = []
        for chunk, rows in zip(self._chunks, self._rows, strict=True):
            found.append(self._score(logits, chunk, rows) if logits is not None and rows else None)
        return found

    def _score(self, logits: LogitRows, chunk: Chunk, rows: dict[int, int]) -> PromptScores:
        device = self._loaded.device
        request = chunk.sequence.group.request
        positions = sorted(rows)
        block = min(BLOCK_ROWS, max(1, BLOCK_ELEMENTS // self._loaded.vocab_size))
        entries: list[TokenLogprob] = []
        for first in range(0, len(positions), block):
            part = positions[first : first + block]
            values = logits.of(upload(torch.tensor([rows[position] for position in part]), device))
            tokens = upload(torch.tensor([request.prompt_token_ids[position + 1] for position in part]), device)
            reporting = dict.fromkeys(range(len(part)), request.sampling.prompt_logprobs or 0)
            is_sound = values.amax(-1).isfinite()
            ids, sound, *reported = fetch(tokens.int(), is_sound.int(), *log_probabilities(values, tokens, reporting))
            if not sound.all():
                return BadLogits("the model gave logits that are not finite")
            entries += as_logprobs(ids, reporting, *reported).values()
        return tuple(entries)


def _positions(chunk: Chunk) -> range:
    group = chunk.sequence.group
    if group.request.sampling.prompt_logprobs is None:
        return range(0)
    last = len(group.request.prompt_token_ids) - 1
    return range(max(chunk.start, group.num_scored), min(chunk.start + chunk.count, last))
