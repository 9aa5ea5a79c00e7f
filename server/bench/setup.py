"""From the command line to an engine that measures, and the policies it can run."""

from __future__ import annotations

import random
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from foveate.patches.errors import PatchError
from foveate.sparse_attn.errors import SchemeError

from ..calibrate import options_of
from ..engine import Engine
from ..evaluation.policies import Policy, Refused, build, named
from ..exceptions import EngineError, PoolTooSmall
from ..journal import OtherResults
from ..loader import LoadedModel, load
from ..options import EngineOptions
from ..packaged import PackagedModelError
from ..settings import Settings
from .synthetic import forget_profiles, load_synthetic, with_profiles

# What a user can bring about: said in one line, without a trace.
ERRORS = (SchemeError, PatchError, PackagedModelError, EngineError, OtherResults, OSError, ValueError)

# Ids below are often special tokens, which no prompt is made of.
FIRST_TOKEN = 10


@dataclass(frozen=True, slots=True)
class Bench:
    """
    Attributes:
        engine: Without prefix reuse; nobody else uses it.
        loaded: Its model.
        options: Its options.
        policies: What can be run.
        refused: What cannot, and why.
        synthetic_profiles: Schemes whose profile was made from random tokens.
    """

    engine: Engine
    loaded: LoadedModel
    options: EngineOptions
    policies: list[Policy]
    refused: list[Refused]
    synthetic_profiles: list[str]


def wanted(given: Namespace) -> list[dict[str, Any]]:
    """The policies that ``--scheme``, ``--option`` and ``--policy`` name, or that their absence means.

    Raises:
        SchemeConfigError: no named scheme has an option that was given.
        ValueError: an option is not ``NAME=VALUE``.
    """
    names = given.scheme
    if names is None:
        names = [] if given.policy else given.default_schemes or []
    found: list[dict[str, Any]] = []
    for attention in [*named(names, options_of(given.option)), *given.policy]:
        if attention not in found:
            found.append(attention)
    return found


@contextmanager
def prepared(given: Namespace, settings: Settings, max_running: int, new_tokens: int) -> Iterator[Bench]:
    """Loads the model, or draws one, and starts an engine whose pool holds ``max_running`` of the longest prompts.

    ``given.lengths`` loses those that do not fit the model's context; each is told on standard error.

    Raises:
        ValueError: no length fits.
        PoolTooSmall: the longest does not fit the KV cache.
        SchemeError, PatchError, PackagedModelError, EngineError, OSError: as elsewhere.
    """
    if given.threads:
        torch.set_num_threads(given.threads)
    attentions = wanted(given)
    # What was computed before must not help.
    options = replace(EngineOptions.of(settings), prefix_reuse=False, max_running=max_running)
    # In a thread that ends with it, as ``Engine.load`` does and for its reason: the engine computes in one of its own.
    with ThreadPoolExecutor(1, "foveate-load") as loader:
        loaded, made = loader.submit(_load, given, options, attentions).result()
    room = loaded.context_length - new_tokens
    for length in given.lengths:
        if length > room:
            print(f"foveate: {length} tokens left out: the model's context has room for {room}", file=sys.stderr)
    given.lengths = [length for length in given.lengths if length <= room]
    if not given.lengths:
        raise ValueError("no length is left to measure")
    # The pool is made for so many contexts as run at once, so the context is no longer than needed.
    longest = max(given.lengths) + new_tokens
    engine = Engine(replace(loaded, context_length=longest), options)
    try:
        if engine.cache.capacity_tokens < longest:
            raise PoolTooSmall(longest, engine.cache.capacity_tokens)
        policies, refused = build(attentions, engine.build_scheme)
        yield Bench(engine, loaded, options, policies, refused, made)
    finally:
        engine.shutdown(0)


def _load(
    given: Namespace, options: EngineOptions, attentions: Sequence[dict[str, Any]]
) -> tuple[LoadedModel, list[str]]:
    """The model, and the schemes whose profile was made from random tokens."""
    if not given.synthetic:
        return load(options), []
    loaded = load_synthetic(given.synthetic, options, given.seed, given.vocab)
    with tempfile.TemporaryDirectory() as spare:
        directory: Path = given.output or Path(spare)
        directory.mkdir(parents=True, exist_ok=True)
        if getattr(given, "fresh", False):
            forget_profiles(directory)
        return with_profiles(loaded, attentions, directory, given.seed)


def random_prompt(seed: int, name: object, vocab: int, length: int) -> list[int]:
    """``length`` random token ids; the same for the same seed and name."""
    return random.Random(f"{seed} {name}").choices(range(min(FIRST_TOKEN, vocab - 1), vocab), k=length)


def reasons(refused: Sequence[Refused]) -> list[dict[str, Any]]:
    """Refused policies for the report."""
    return [{"attention": dict(item.attention), "reason": item.reason} for item in refused]
