"""The one check of sampling parameters, used by HTTP, batch files and the offline API."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .exceptions import InvalidRequest
from .request import SamplingParams

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_BIASES = 1024
LEAST_PRIORITY, LARGEST_PRIORITY = -(2**31), 2**31 - 1
_INT64 = 2**63


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuses every value that the sampler cannot work with.

    ``min_tokens`` has no upper bound while ``max_tokens`` is ``None``: the engine bounds it by the context.

    Args:
        params: What the caller asked for; types are checked too, since the offline API takes anything.
        vocab_size: Width of the model's logits. The tokenizer may know fewer ids.

    Raises:
        InvalidRequest: a value is out of range; ``param`` names it.
    """
    _real(params, "temperature", 0, 2)
    _integer(params, "top_k", -1)
    _real(params, "top_p", 0, 1, above=True)
    _real(params, "min_p", 0, 1)
    _real(params, "presence_penalty", -2, 2)
    _real(params, "frequency_penalty", -2, 2)
    _real(params, "repetition_penalty", 0, 10, above=True)
    _integer(params, "n", 1, MAX_CHOICES)
    _integer(params, "min_tokens", 0)
    if params.max_tokens is not None:
        _integer(params, "max_tokens", 0)
        if params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({params.min_tokens}) must not be above max_tokens ({params.max_tokens})", "min_tokens"
            )
    if params.logprobs is not None:
        _integer(params, "logprobs", 0, MAX_LOGPROBS)
    if params.prompt_logprobs is not None:
        _integer(params, "prompt_logprobs", 0, MAX_LOGPROBS)
    if params.seed is not None:
        _integer(params, "seed", -_INT64, _INT64 - 1)
    _check_stops(params.stop)
    _check_biases(params.logit_bias)
    if not isinstance(params.stop_token_ids, tuple | list):
        raise InvalidRequest("stop_token_ids must be a list of token ids", "stop_token_ids")
    _check_ids("stop_token_ids", params.stop_token_ids, MAX_STOPS, vocab_size)
    _check_ids("logit_bias", params.logit_bias, MAX_BIASES, vocab_size)


def check_priority(priority: Any) -> None:
    """
    Raises:
        InvalidRequest: it is no whole number of 32 bits.
    """
    if not (_is_integer(priority) and LEAST_PRIORITY <= priority <= LARGEST_PRIORITY):
        bounds = f"from {LEAST_PRIORITY} to {LARGEST_PRIORITY}"
        raise InvalidRequest(f"priority must be a whole number {bounds}, got {_shown(priority)}", "priority")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(params: SamplingParams, name: str, low: float, high: float, above: bool = False) -> None:
    value = getattr(params, name)
    if not (_is_number(value) and low <= value <= high and not (above and value == low)):
        bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise InvalidRequest(f"{name} must be a number {bounds}, got {_shown(value)}", name)


def _integer(params: SamplingParams, name: str, low: int, high: int | None = None) -> None:
    value = getattr(params, name)
    if not (_is_integer(value) and low <= value and (high is None or value <= high)):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InvalidRequest(f"{name} must be a whole number {bounds}, got {_shown(value)}", name)


def _check_stops(stops: Any) -> None:
    if not isinstance(stops, tuple | list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop must be a list of strings", "stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop takes at most {MAX_STOPS} strings, got {len(stops)}", "stop")
    if any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidRequest(f"a stop string must have 1 to {MAX_STOP_CHARS} characters", "stop")


def _check_biases(biases: Any) -> None:
    if not isinstance(biases, Mapping):
        raise InvalidRequest("logit_bias must map token ids to numbers", "logit_bias")
    for bias in biases.values():
        if not (_is_number(bias) and -100 <= bias <= 100):
            raise InvalidRequest(f"a value of logit_bias must be from -100 to 100, got {_shown(bias)}", "logit_bias")


def _check_ids(name: str, ids: Collection[Any], limit: int, vocab_size: int) -> None:
    if len(ids) > limit:
        raise InvalidRequest(f"{name} takes at most {limit} ids, got {len(ids)}", name)
    for token_id in ids:
        if not (_is_integer(token_id) and 0 <= token_id < vocab_size):
            raise InvalidRequest(f"{name} takes token ids from 0 to {vocab_size - 1}, got {_shown(token_id)}", name)


def _shown(value: Any) -> str:
    """A value as an error message quotes it: short, and never an object's address."""
    if isinstance(value, str):
        return repr(value[:40])
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64):
        return repr(value)
    return f"a value of type {type(value).__name__}"
