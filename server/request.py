"""What a caller asks of the engine, and what the engine says back.

Plain dataclasses: the HTTP layer, the offline API and the tests all speak these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from foveate.sparse_attn.protocol import Scheme

from .grammar.matcher import Grammar

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when generation ends.

    Args:
        max_tokens: Tokens to generate at most; ``None`` fills the context, 0 only reads the prompt.
        min_tokens: No end-of-text, stop id or stop string before this many tokens.
        temperature: 0 is greedy.
        top_k: 0 or -1 is off.
        top_p: Nucleus; 1 is off.
        min_p: Share of the best token's probability; 0 is off.
        presence_penalty: Once per token that was generated (OpenAI).
        frequency_penalty: Per occurrence among the generated tokens (OpenAI).
        repetition_penalty: On prompt and generated tokens (CTRL); 1 is off.
        logit_bias: Token id -> added to its logit.
        seed: Makes sampling repeat, whatever else runs in the batch.
        stop: Strings that end generation.
        stop_token_ids: Ids that end generation.
        ignore_eos: Go on after end-of-text.
        include_stop_str_in_output: Keep the stop string in the text.
        skip_special_tokens: Leave special tokens out of the text.
        logprobs: ``None``, or how many alternatives to report beside each chosen token.
        prompt_logprobs: The same for each token of the prompt but the first, for which nothing is predicted.
            Such a request computes its whole prompt, cached or not.
        n: Choices per prompt; the prompt is computed once.
        visible_ids: Special tokens that stay in the text although others are left out.
        grammar: What each answer must look like. It ends where the grammar lets nothing follow, ``min_tokens`` and
            ``ignore_eos`` notwithstanding, and end-of-text is drawn only where the grammar lets it end.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    visible_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a chosen token, and of the best alternatives (best first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost.

    Attributes:
        keys_read_fraction: Keys read over keys that dense attention would have read.
        pages: KV pages held at the end.
        mass_kept: Share of dense attention's mass on the keys that were read, a mean over the
            generated tokens, layers and heads that were audited; ``None`` if none was.
        audited_tokens: Number of these tokens.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    scheme: str
    keys_read_fraction: float
    pages: int
    mass_kept: float | None = None
    audited_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Prefill has come this far (tokens of the prompt). Times are seconds since the request's arrival.

    Attributes:
        waited_seconds: When its first chunk began to be computed.
    """

    total: int
    cached: int
    processed: int
    elapsed_seconds: float
    waited_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of the next tokens of the prompt, from its second token on. They come before any ``Delta``."""

    entries: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of choice ``index``. ``finish_reason`` is set on its last delta.

    ``text`` may be empty while ``token_ids`` is not (bytes of an unfinished character, or a
    possible start of a stop string, are held back).
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that ended well."""

    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not."""

    error: Exception


Event = Progress | PromptLogprobs | Delta | Finished | Failed
EventSink = Callable[[Event], None]


@dataclass(slots=True)
class GenerationRequest:
    """One prompt on its way through the engine.

    Attributes:
        request_id: Made by the server, unique.
        prompt_token_ids: At least one id, each below the model's vocabulary size.
        sampling: See ``SamplingParams``.
        scheme: The attention policy, already built and checked.
        salt: Separates prefix-cache entries of different owners. ``None``: nothing is found, and nothing is left.
        on_event: Called from the engine's thread, must not block.
        priority: Smaller goes first; equal ones by age.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    scheme: Scheme
    on_event: EventSink
    salt: str | None = ""
    priority: int = 0
    arrival: float = field(default_factory=time.monotonic)
