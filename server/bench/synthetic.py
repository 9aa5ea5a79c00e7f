"""A model of a named shape with random weights, ready to be served; and profiles for it, made from random tokens.

Random weights cost what learnt ones cost wherever the work does not depend on the values. It does in schemes that
read until enough attention is reached: random weights attend to everything alike, so these read nearly everything.
``keys_read_fraction`` in the report tells.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foveate.patches.fingerprint import fingerprint
from foveate.patches.synthetic import synthetic_model
from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import CalibrationMissing, ProfileError, SchemeError
from foveate.sparse_attn.profile import Profile

from ..calibrate import calibrate, shape_of
from ..loader import LoadedModel, check_kv_dtype, device_of, dtype_of, ready
from ..memory import tune_allocator
from ..options import EngineOptions
from .shapes import SHAPES

# Enough tokens to learn thresholds from; a threshold holds for other lengths by the same share of keys.
PROFILE_TOKENS = 2048
_FILE = "synthetic-{}.safetensors"


class LetterTokenizer:
    """Stands in for a tokenizer: a letter per token, so that the engine has text to send."""

    eos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) % 95 for letter in text]

    def decode(self, token_ids: Sequence[int], **_: bool) -> str:
        return "".join(chr(32 + token % 95) for token in token_ids)


def load_synthetic(shape: str, options: EngineOptions, seed: int, vocab: int | None = None) -> LoadedModel:
    """A model that nobody trained.

    Args:
        shape: A key of ``SHAPES``.
        options: ``dtype="auto"`` is bfloat16 where the device multiplies it natively.
        seed: Of the weights.
        vocab: Tokens, instead of the shape's own.

    Raises:
        InvalidRequest: an option does not fit the device.
    """
    known = SHAPES[shape]
    device = device_of(options.device)
    check_kv_dtype(options, device)
    if device.type == "cpu":
        tune_allocator()
    dtype = dtype_of(options.dtype, device)
    model = synthetic_model(
        known.model_type,
        dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
        device,
        seed,
        **known.config(vocab),
    )
    return ready(model, LetterTokenizer(), options)


def with_profiles(
    loaded: LoadedModel, attentions: Iterable[Mapping[str, Any]], directory: Path, seed: int
) -> tuple[LoadedModel, list[str]]:
    """Makes the profiles that policies ask for and nobody gave, from random tokens.

    Args:
        loaded: A synthetic model.
        attentions: Policies.
        directory: Where the profiles are kept, and found again by a later run.
        seed: Of the tokens.

    Returns:
        The model with these profiles, and the schemes that they are for.
    """
    made: list[str] = []
    for attention in attentions:
        while (missing := _missing_profile(attention, loaded.profiles)) and missing not in made:
            profile = _profile(loaded, missing, directory / _FILE.format(missing), seed)
            loaded = replace(loaded, profiles={**loaded.profiles, missing: profile})
            made.append(missing)
    return loaded, made


def forget_profiles(directory: Path) -> None:
    """Deletes the profiles that an earlier run left."""
    for path in directory.glob(_FILE.format("*")):
        path.unlink()


def _missing_profile(attention: Mapping[str, Any], profiles: Mapping[str, Profile]) -> str | None:
    options = dict(attention)
    try:
        registry.build(options.pop("scheme"), profiles, **options)
    except CalibrationMissing as error:
        return error.scheme
    except SchemeError:
        return None  # said when the policy is built for the engine
    return None


def _profile(loaded: LoadedModel, scheme: str, path: Path, seed: int) -> Profile:
    try:
        profile = Profile.load(path)
        profile.check_model(fingerprint(loaded.model))
    except ProfileError:
        calibrator = registry.load(scheme).calibrator(shape_of(loaded.attached.facts), {})
        tokens = min(PROFILE_TOKENS, loaded.context_length)
        sample = random.Random(seed).choices(range(loaded.vocab_size), k=tokens)
        profile = calibrate(loaded, scheme, calibrator, [sample], path)
    return profile
