"""A policy reads tokens that it is given, and what it would say next is looked at: teacher forcing, and questions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from foveate.kv_cache.geometry import CacheGeometry, default_page_size
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.patches.interface import PackedStep
from foveate.patches.step import build_step
from foveate.sparse_attn.protocol import Scheme

from ..loader import LoadedModel
from .tasks import Prompt

# Rows of logits that are turned into float32 at once.
_ROWS = 64

# Room for questions about words that are longer than the right answer.
_SLACK_TOKENS = 256


class Reader:
    """One sequence under one policy, read in the chunks that the engine would make.

    Args:
        loaded: The model, attached; nobody else computes with it meanwhile.
        scheme: The policy.
        tokens: Of the whole sequence, at most.
        prompt_tokens: Those of its prompt: what follows is decoded one by one, and the last ones
            before are the scheme's dense tail.
        chunk_tokens: Prompt tokens per forward pass.
        geometry: Of the engine's pool, whose page size and element type are to be used; the defaults if ``None``.
        dense_tail: Whether the prompt has a dense tail, if the scheme has one.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        scheme: Scheme,
        tokens: int,
        prompt_tokens: int,
        chunk_tokens: int,
        geometry: CacheGeometry | None = None,
        *,
        dense_tail: bool = True,
    ) -> None:
        self._loaded, self._scheme, self._dense_tail = loaded, scheme, dense_tail
        self._prompt_tokens, self._chunk_tokens = prompt_tokens, chunk_tokens
        facts, device = loaded.attached.facts, loaded.device
        one = geometry or CacheGeometry(
            facts.num_layers, facts.num_kv_heads, facts.head_dim, default_page_size(device), 1, loaded.dtype, device
        )
        geometry = replace(one, num_pages=one.pages_for(tokens))
        self._cache = KVCacheManager(PagePool(geometry, scheme.page_stats(geometry)), prefix_reuse=False)
        self._table = self._cache.open([], b"")
        self._read: list[int] = []
        self._keys = torch.zeros(2, dtype=torch.float64)

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return len(self._read)

    @property
    def keys_read_fraction(self) -> float:
        """Keys read so far over those of dense attention."""
        read, dense = self._keys.tolist()
        return read / dense if dense else 1.0

    @torch.inference_mode()
    def read(self, ids: Sequence[int], first: int = 0) -> Iterator[torch.Tensor]:
        """Goes on with ``ids``; yields the logits ``[N, vocab]`` behind the tokens from position ``first`` on.

        There is one yield per chunk that holds such a token, in order.
        """
        for start, stop in self._chunks(len(ids)):
            step = build_step(
                self._cache,
                [(self._table, stop - start)],
                self._scheme,
                self._loaded.rotary,
                self._prompt_tokens,
                self._dense_tail,
            )
            begin = len(self._read)
            self._read += ids[start:stop]
            for group in step.groups:  # as the engine has it
                group.wanted = group.rows.host_context_lens[-1] > first
            kept = max(min(len(self._read) - first, stop - start), 0)
            output = self._loaded.model(
                input_ids=torch.tensor([self._read[begin:]], device=self._loaded.device),
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=kept or 1,
                foveate_step=PackedStep(step),
            )
            self._cache.commit(self._table, self._read)
            self._keys += step.keys_read.sum(0).cpu()
            if kept:
                yield output.logits[0]

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        done = len(self._read)
        start = 0
        while start < count:
            left = self._prompt_tokens - done - start
            stop = min(start + (min(left, self._chunk_tokens) if left > 0 else 1), count)
            yield start, stop
            start = stop


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """
    Attributes:
        tokens: The continuation.
        logprobs: ``[N, vocab]`` float32, the distributions its tokens were, or would be, drawn from.
        keys_read_fraction: Over prompt and answer.
    """

    tokens: list[int]
    logprobs: torch.Tensor
    keys_read_fraction: float


def answer(
    loaded: LoadedModel,
    scheme: Scheme,
    prompt: Sequence[int],
    count: int,
    chunk_tokens: int,
    forced: Sequence[int] | None = None,
    *,
    geometry: CacheGeometry | None = None,
) -> Answer:
    """The greedy continuation of ``prompt`` by ``count`` tokens; or distributions along a ``forced`` one.

    End-of-text ends nothing.
    """
    reader = Reader(loaded, scheme, len(prompt) + count, len(prompt), chunk_tokens, geometry)
    [logits] = reader.read(prompt, first=len(prompt) - 1)
    rows: list[torch.Tensor] = []
    tokens: list[int] = []
    while True:
        rows.append(logits[-1].float().log_softmax(-1))
        tokens.append(int(rows[-1].argmax()) if forced is None else forced[len(tokens)])
        if len(tokens) == count:
            return Answer(tokens, torch.stack(rows), reader.keys_read_fraction)
        [logits] = reader.read(tokens[-1:])


def agreement(dense: Answer, other: Answer) -> dict[str, float]:
    """How a policy differs from dense along dense's own continuation.

    Returns:
        ``match``: share of dense's tokens that are the other's best too; ``kl``: KL(dense || other)
        in nats per token.
    """
    best = other.logprobs.argmax(-1).tolist()
    match = sum(a == b for a, b in zip(best, dense.tokens, strict=True)) / len(best)
    divergence = torch.nn.functional.kl_div(other.logprobs, dense.logprobs, reduction="batchmean", log_target=True)
    return {"match": match, "kl": max(float(divergence), 0.0)}


def loss(
    loaded: LoadedModel,
    scheme: Scheme,
    ids: Sequence[int],
    scored_from: int,
    chunk_tokens: int,
    *,
    geometry: CacheGeometry | None = None,
) -> tuple[float, float]:
    """Mean negative log-likelihood of ``ids[scored_from:]`` as a prompt, and the share of keys read.

    A text asks nothing at its end, so no token of it belongs to the dense tail.

    Returns:
        ``(nats per token, keys_read_fraction)``.
    """
    reader = Reader(loaded, scheme, len(ids), len(ids), chunk_tokens, geometry, dense_tail=False)
    targets = torch.tensor(ids[scored_from:], device=loaded.device)
    total, done = 0.0, 0
    for logits in reader.read(ids[:-1], first=scored_from - 1):
        for rows in torch.split(logits, _ROWS):
            wanted = targets[done : done + len(rows)]
            total += float(torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="sum"))
            done += len(rows)
    return total / done, reader.keys_read_fraction


def converse(
    loaded: LoadedModel,
    scheme: Scheme,
    prompt: Prompt,
    chunk_tokens: int,
    *,
    tokens: int,
    geometry: CacheGeometry | None = None,
) -> tuple[list[str], float]:
    """The model's greedy answers to a prompt's turns, each question read behind the answer before.

    An answer ends at the end of its sentence or line, or after the tokens that its turn allows. The
    turns end early where an answer holds no word that the next question could be about.

    Args:
        loaded: The model, attached.
        scheme: The policy.
        prompt: Its first turn is the end of its text.
        chunk_tokens: Prompt tokens per forward pass.
        tokens: Of prompt, questions and answers, at most.
        geometry: See ``Reader``.

    Returns:
        ``(answers, keys_read_fraction)``.
    """
    tokenizer = loaded.tokenizer
    ids: list[int] = tokenizer.encode(prompt.text, add_special_tokens=True)
    reader = Reader(loaded, scheme, max(tokens, len(ids)) + _SLACK_TOKENS, len(ids), chunk_tokens, geometry)
    said: list[str] = []
    for turn in prompt.turns:
        if said:
            word = re.search(r"\w+", said[-1])
            if word is None:
                break
            ids += tokenizer.encode(turn.text.format(word[0]), add_special_tokens=False)
        start = len(ids)
        text = ""
        while len(ids) - start < turn.tokens and not re.search(r"[.\n]", text.lstrip()):
            *_, logits = reader.read(ids[reader.position :], first=len(ids) - 1)
            ids.append(int(logits[-1].argmax()))
            text = tokenizer.decode(ids[start:])
        said.append(text)
    return said, reader.keys_read_fraction
