"""``foveate calibrate``: learns a scheme's profile of a model, from text and without training."""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from foveate.kv_cache.geometry import CacheGeometry, default_page_size
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.patches.errors import PatchError
from foveate.patches.families import ModelFacts, facts
from foveate.patches.fingerprint import fingerprint
from foveate.patches.interface import PackedStep
from foveate.patches.residual import watch_residual
from foveate.patches.step import build_step
from foveate.sparse_attn import registry
from foveate.sparse_attn.calibration.base import Calibrator, ModelShape
from foveate.sparse_attn.errors import ProfileError, SchemeError
from foveate.sparse_attn.profile import Profile

from .calibration_text import documents, windows
from .exceptions import EngineError
from .loader import LoadedModel, config_of, load
from .options import EngineOptions
from .packaged import PackagedModelError
from .settings import Settings
from .writable import check_writable

# Tokens per forward pass: bounds what a calibrator holds of one layer.
CHUNK_TOKENS = 512


def run(given: Namespace, settings: Settings) -> int:
    """Writes the profile to ``given.output``, and says on standard error how it goes.

    Returns:
        Exit code: 1 if no profile could be made.
    """
    try:
        scheme = registry.load(given.scheme)
        if not scheme.calibrated:
            names = [name for name in registry.names() if registry.load(name).calibrated]
            raise SchemeError(f"{given.scheme} reads no profile; calibrate one of: {', '.join(names)}")
        text = None if given.text is None else given.text.read_text(encoding="utf-8")
        if not given.output.parent.is_dir():
            raise FileNotFoundError(f"there is no directory {given.output.parent}")
        check_writable(given.output)
        options = EngineOptions.of(settings)
        shape = shape_of(facts(config_of(options)))
        calibrator = scheme.calibrator(shape, options_of(given.option))  # what it does not know is told at once
        loaded = load(options)
        with loaded.attached:
            samples = samples_for(loaded, calibrator, text, given.tokens, given.samples)
            profile = calibrate(loaded, given.scheme, calibrator, samples, given.output)
    except (SchemeError, PatchError, PackagedModelError, EngineError, OSError, ValueError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    told = ", ".join(f"{name} {value}" for name, value in sorted(profile.options.items()))
    print(f"{given.output}: {given.scheme} for {settings.model}, {told}", file=sys.stderr)
    return 0


def options_of(given: Sequence[str]) -> dict[str, Any]:
    """``["a=1", "b=x"]`` as a dict; values that are JSON are read as such.

    Raises:
        ValueError: one is not ``name=value``.
    """
    options = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise ValueError(f"--option takes NAME=VALUE, got {item!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def shape_of(facts: ModelFacts) -> ModelShape:
    return ModelShape(facts.num_layers, facts.num_heads, facts.num_kv_heads, facts.head_dim, facts.windows)


def samples_for(
    loaded: LoadedModel, calibrator: Calibrator, text: str | None, tokens: int | None, samples: int | None
) -> list[list[int]]:
    """Token ids of each sample.

    Args:
        loaded: Its tokenizer, and how long a text it takes.
        calibrator: What it asks for where nothing else is said.
        text: To cut samples from; ``None`` makes documents.
        tokens: Per sample.
        samples: How many.

    Raises:
        ValueError: a sample would be longer than the model's context, too short to calibrate on, or
            the text shorter than a sample.
    """
    tokens = min(calibrator.sample_tokens, loaded.context_length) if tokens is None else tokens
    count = calibrator.samples if samples is None else samples
    if not calibrator.decode_tokens < tokens <= loaded.context_length or count < 1:
        raise ValueError(
            f"cannot calibrate on {count} samples of {tokens} tokens: at least 1 sample is needed, of more than "
            f"{calibrator.decode_tokens} tokens and at most the model's context, {loaded.context_length}"
        )
    tokenizer = loaded.tokenizer
    prefix: list[int] = tokenizer.encode("", add_special_tokens=True)
    if text is None:
        return documents(lambda part: _encode(tokenizer, part), prefix, tokens, count)
    return windows(_encode(tokenizer, text), prefix, tokens, count)


def _encode(tokenizer: Any, text: str) -> list[int]:
    # `verbose` would warn that a whole book is longer than the model's context.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def calibrate(
    loaded: LoadedModel, scheme: str, calibrator: Calibrator, samples: Sequence[Sequence[int]], output: Path
) -> Profile:
    """Runs the samples and writes the profile, whole or not at all.

    After each sample what was learnt so far is written beside ``output``; if the program is killed,
    the same call goes on from there, and comes to the same profile.

    Args:
        loaded: The model, attached.
        scheme: Name of the scheme.
        calibrator: Fresh.
        samples: Token ids of each.
        output: File to write.
    """
    model = fingerprint(loaded.model)
    data = hashlib.sha256(json.dumps([list(sample) for sample in samples]).encode()).hexdigest()
    options = asdict(calibrator.options)
    partial = _Partial(output, scheme, model, options, data)
    done = partial.restore(calibrator)
    cache = KVCacheManager(PagePool(_geometry(loaded, max(map(len, samples)))), prefix_reuse=False)
    total = sum(map(len, samples))
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, desc=f"calibrating {scheme}", unit=" tokens", file=sys.stderr))
        bar.update(sum(map(len, samples[:done])))
        if calibrator.needs_residual:
            stack.enter_context(watch_residual(loaded.model, calibrator.see_residual))
        for index in range(done, len(samples)):
            for count in _run(loaded, cache, calibrator, samples[index]):
                bar.update(count)
            calibrator.end_sample()
            partial.save(calibrator, index + 1)
    learnt, tensors = calibrator.result()
    lengths = {"samples": len(samples), "sample_tokens": max(map(len, samples))}
    profile = Profile(scheme, model, {**options, **lengths, **learnt}, data, tensors)
    profile.save(output)
    partial.delete()
    return profile


@torch.inference_mode()
def _run(loaded: LoadedModel, cache: KVCacheManager, calibrator: Calibrator, sample: Sequence[int]) -> Iterator[int]:
    """One sample, densely and in chunks; yields the tokens of each chunk when it is done."""
    tile = calibrator.tile_tokens
    chunk = max(CHUNK_TOKENS // tile, 1) * tile
    prompt = len(sample) - calibrator.decode_tokens
    counts = [min(chunk, prompt - start) for start in range(0, prompt, chunk)] + [1] * calibrator.decode_tokens
    ids = torch.tensor([list(sample)], device=loaded.device)
    table = cache.open([], b"")
    try:
        for count in counts:
            start = table.num_tokens
            step = build_step(cache, [(table, count)], None)
            step.observer = calibrator
            loaded.model(
                input_ids=ids[:, start : start + count],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=1,
                foveate_step=PackedStep(step),
            )
            cache.commit(table, sample, start + count)
            yield count
    finally:
        cache.free(table)


def _geometry(loaded: LoadedModel, tokens: int) -> CacheGeometry:
    facts, size = loaded.attached.facts, default_page_size(loaded.device)
    one = CacheGeometry(facts.num_layers, facts.num_kv_heads, facts.head_dim, size, 1, loaded.dtype, loaded.device)
    return CacheGeometry(
        facts.num_layers, facts.num_kv_heads, facts.head_dim, size, one.pages_for(tokens), loaded.dtype, loaded.device
    )


class _Partial:
    """What was learnt so far, beside the output: a profile of a scheme that does not exist."""

    def __init__(
        self, output: Path, scheme: str, model: Mapping[str, Any], options: Mapping[str, Any], data: str
    ) -> None:
        self._path = output.with_name(f"{output.name}.partial")
        self._scheme = f"{scheme} (unfinished)"
        self._model, self._options, self._data = model, options, data

    def restore(self, calibrator: Calibrator) -> int:
        """Samples that were done before; 0 if there were none, or they were of another calibration."""
        if not self._path.exists():
            return 0
        try:
            found = Profile.load(self._path)
        except ProfileError as error:
            print(f"foveate: starting afresh: {error}", file=sys.stderr)
            return 0
        options = dict(found.options)
        done = int(options.pop("done", 0))
        known = (found.scheme, found.model, options, found.data_hash)
        if known != (self._scheme, self._model, self._options, self._data):
            print(f"foveate: starting afresh: {self._path} is of another calibration", file=sys.stderr)
            return 0
        calibrator.restore(found.tensors)
        return done

    def save(self, calibrator: Calibrator, done: int) -> None:
        options = {**self._options, "done": done}
        Profile(self._scheme, self._model, options, self._data, calibrator.state()).save(self._path)

    def delete(self) -> None:
        self._path.unlink(missing_ok=True)
