"""Bodies of completions, tokenize and detokenize, and the fields that all generation shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from .request import SamplingParams
from .sampling_limits import (
    LARGEST_PRIORITY,
    LEAST_PRIORITY,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_CHARS,
    MAX_STOPS,
)
from .schemas_grammar import GrammarBody
from .schemas_labels import LabelledBody
from .validation import Body, at_most

MAX_NAME_CHARS = 256
INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1

NO_FUNCTIONS = "use tools and tool_choice (chat, responses)"
TEXT_ONLY = "this server reads and writes text only"

# Whichever endpoint a name belongs to, none passes it over: a client that sends it asks for something.
_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((1,), "only 1 is supported"),
    "suffix": (("",), "inserting before a suffix is not supported"),
    "functions": (([],), NO_FUNCTIONS),
    "function_call": (("none",), NO_FUNCTIONS),
    "audio": ((), TEXT_ONLY),
    "modalities": ((["text"],), TEXT_ONLY),
    "prediction": ((), "predicted output is not supported"),
    "web_search_options": ((), "this server does not search the web"),
    "moderation": ((), "moderation is not supported"),
    "store": ((False,), "answers are not stored"),
    "service_tier": (("auto", "default"), "there is one tier, default"),
    "verbosity": (("medium",), "verbosity cannot be chosen"),
    "truncate_prompt_tokens": ((), "prompts are never cut; shorten the prompt"),
    "prompt_embeds": ((), "embeddings as a prompt are not supported"),
    "return_token_ids": ((False,), "token ids are not returned; see /tokenize"),
    "use_beam_search": ((False,), "beam search is not supported"),
    "bad_words": (([],), "bad_words is not supported; use logit_bias"),
    "allowed_token_ids": ((), "allowed_token_ids is not supported; use logit_bias"),
    "logits_processors": (([],), "code in a request is never run"),
    "vllm_xargs": (({},), "there are no arguments of this kind"),
    "timings_per_token": ((False,), "times are in /metrics"),
    "prompt_cache_options": (({},), "how prefixes are kept cannot be chosen"),
    "prompt_cache_retention": (("in_memory", "in-memory"), "only in_memory can be chosen"),
}


def _policy_of(given: Any) -> Any:
    return {"scheme": given} if isinstance(given, str) else given


# What ``sampling_limits`` checks of these, for the description of the server.
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOPS = WithJsonSchema({"anyOf": [_STOP, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP}]})
_TOKEN_ID = {"type": "integer", "minimum": 0}
_TOKEN_IDS = WithJsonSchema({"type": "array", "maxItems": MAX_STOPS, "items": _TOKEN_ID})
_BIASES = WithJsonSchema(
    {
        "type": "object",
        "maxProperties": MAX_BIASES,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
)


class GenerationBody(GrammarBody, LabelledBody):
    """What completions and chat have in common. OpenAI's names first, then vLLM's, then our own.

    Types and plain bounds are checked here; ``sampling_limits`` checks everything again, for every
    way into the engine, and what needs the model or two fields at once.
    """

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = _REFUSED

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], _BIASES, at_most(MAX_BIASES)] = Field({})
    seed: int | None = Field(None, ge=-_INT64_MAX - 1, le=_INT64_MAX)
    stop: Annotated[list[str], _STOPS] = Field([], max_length=MAX_STOPS)

    top_k: int = Field(0, ge=-1, le=INT32_MAX)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stop_token_ids: Annotated[list[int], _TOKEN_IDS] = Field([], max_length=MAX_STOPS)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = Field("", max_length=MAX_NAME_CHARS)
    cache_prompt: bool = True

    priority: int = Field(0, ge=LEAST_PRIORITY, le=LARGEST_PRIORITY)
    timeout: float | None = Field(None, gt=0)

    attention: Annotated[
        dict[str, Any] | None, BeforeValidator(_policy_of, json_schema_input_type=dict[str, Any] | str | None)
    ] = Field(None, max_length=64)
    return_progress: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_ids(cls, value: dict[str, float]) -> dict[str, float]:
        if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in value):
            raise ValueError("the keys are token ids")
        return value

    @field_validator("attention")
    @classmethod
    def _scheme_is_text(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("scheme", ""), str):
            raise ValueError("scheme must be a string")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _in_one_piece(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise ValueError("prompt_logprobs cannot be streamed")
        return value

    @field_validator("return_progress")
    @classmethod
    def _needs_stream(cls, value: bool, info: ValidationInfo) -> bool:
        if value and not info.data.get("stream"):
            raise ValueError("return_progress needs stream=true")
        return value

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report beside each chosen token; ``None`` for no log-probabilities."""
        raise NotImplementedError

    @property
    def prompt_alternatives(self) -> int | None:
        """The same for each token of the prompt."""
        return self.prompt_logprobs

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.token_limit,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(key): bias for key, bias in self.logit_bias.items()},
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.alternatives,
            prompt_logprobs=self.prompt_alternatives,
            n=self.n,
        )


_IDS = {"type": "array", "minItems": 1, "items": _TOKEN_ID}
_TEXT = {"type": "string", "minLength": 1}
_PROMPT = {"anyOf": [_TEXT, _IDS, {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _IDS]}}]}


class CompletionBody(GenerationBody):
    """``POST /v1/completions``. ``prompt``: text, texts, token ids, or lists of token ids."""

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **GenerationBody.refused,
        "max_completion_tokens": ((), "use max_tokens"),
    }

    prompt: Annotated[str | list[Any], WithJsonSchema(_PROMPT)]
    max_tokens: int | None = Field(16, ge=0, le=INT32_MAX)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _text_or_list(cls, value: Any) -> Any:
        if not isinstance(value, (str, list)):
            raise ValueError("a prompt is a string, a list of strings, token ids, or a list of lists of token ids")
        return value

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((count for count in asked if count is not None), default=None)


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = Field(None, max_length=MAX_NAME_CHARS)
    tokens: Annotated[list[Any], WithJsonSchema({"type": "array", "items": _TOKEN_ID})]
