"""The forward hooks that give each pass of an attached model its step."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from foveate.kv_cache.errors import OutOfPages
from foveate.kv_cache.manager import KVCacheManager
from foveate.sparse_attn.protocol import QueryRotator, Scheme, StepState

from .cache import PagedGenerateCache
from .errors import CacheExhausted, UnsupportedCall
from .interface import PackedStep

# Inputs that change what attention reads in ways that a step does not carry.
_FOREIGN_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "mm_encoder_outputs",
    "encoder_hidden_states",
)


@dataclass(slots=True)
class _Pass:
    """A forward pass under way."""

    cache: PagedGenerateCache
    columns: int
    kept: bool
    step: StepState
    replaced: DynamicCache | None


class StepHook:
    """Makes the step of every forward pass whose caller did not pass one.

    Args:
        model: Hooks are installed on it; ``remove`` takes them off.
        scheme: Policy of every pass.
        rotary: For schemes that move positions.
        manager_for: Gives the manager, from the batch size of the first pass.

    Attributes:
        keys_read: ``[2]`` float64: key reads done, and what dense attention would have read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scheme: Scheme,
        rotary: QueryRotator | None,
        manager_for: Callable[[int], KVCacheManager],
    ) -> None:
        self._scheme = scheme
        self._rotary = rotary
        self._manager_for = manager_for
        self._use_cache = bool(getattr(model.config.get_text_config(), "use_cache", True))
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._caches: weakref.WeakSet[PagedGenerateCache] = weakref.WeakSet()
        self._replaced: weakref.WeakSet[DynamicCache] = weakref.WeakSet()
        self._pass: _Pass | None = None
        self.keys_read = torch.zeros(2, dtype=torch.float64)
        self._handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        )

    def remove(self) -> None:
        """Takes the hooks off and frees the pages of every cache that is still alive."""
        for handle in self._handles:
            handle.remove()
        for cache in tuple(self._caches):
            cache.detach()

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get("foveate_step") is not None:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None or len(args) > len(self._names):
            return None  # the model has its own message for that
        _refuse(given)
        batch, columns = inputs.shape[:2]
        cache, kept = self._cache(given, batch)
        real, counts = _real_tokens(given.get("attention_mask"), cache, columns)
        try:
            step = cache.begin(counts, self._scheme, self._rotary)
        except OutOfPages as error:
            if not cache.get_seq_length():
                cache.reset()
            pages = cache.manager.allocator.num_pages
            raise CacheExhausted(error, pages, cache.manager.page_size) from error
        past = given.get("past_key_values")
        self._pass = _Pass(cache, columns, kept, step, past if isinstance(past, DynamicCache) else None)
        position_ids = torch.zeros(batch, columns, dtype=torch.int64, device=inputs.device)
        position_ids[real.to(inputs.device)] = step.positions.to(inputs.device)
        _check_positions(given.get("position_ids"), position_ids, real)
        if "position_ids" in self._names:
            given["position_ids"] = position_ids
        index = None if bool(real.all()) else real.flatten().nonzero()[:, 0].to(inputs.device)
        given["attention_mask"] = None
        given["past_key_values"] = cache if kept else None
        given["foveate_step"] = PackedStep(step, index)
        return (), given

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        done, self._pass = self._pass, None
        if done is None:
            return
        if output is None:  # the pass failed
            done.cache.abandon()
        else:
            done.cache.finish(done.columns)
            if done.replaced is not None:
                self._replaced.add(done.replaced)
            self.keys_read = self.keys_read.to(done.step.keys_read.device) + done.step.keys_read.sum(0)
        if not done.kept:
            done.cache.reset()

    def _cache(self, given: Mapping[str, Any], batch: int) -> tuple[PagedGenerateCache, bool]:
        """The cache of this pass, and whether it lives on after it."""
        past = given.get("past_key_values")
        if isinstance(past, PagedGenerateCache):
            if past not in self._caches:
                raise UnsupportedCall("this cache was made by another attached model")
            if past.batch_size != batch:
                raise UnsupportedCall(f"the cache holds {past.batch_size} rows, the batch has {batch}")
            return past, True
        if past is not None and not (isinstance(past, DynamicCache) and past.get_seq_length() == 0):
            raise UnsupportedCall(
                f"past_key_values is a {type(past).__name__} of its own; leave it (and cache_implementation) out, "
                "an attached model keeps keys in pages"
            )
        if past in self._replaced:
            raise UnsupportedCall(
                "the tokens of this DynamicCache went to pages in an earlier pass; go on with that pass's "
                "output.past_key_values"
            )
        use_cache = given.get("use_cache")
        kept = past is not None or (self._use_cache if use_cache is None else bool(use_cache))
        cache = PagedGenerateCache(self._manager_for(batch), batch)
        self._caches.add(cache)
        return cache, kept


def _refuse(given: Mapping[str, Any]) -> None:
    for name in _FOREIGN_INPUTS:
        if given.get(name) is not None:
            raise UnsupportedCall(f"an attached model takes text only, got {name}")
    if given.get("output_attentions"):
        raise UnsupportedCall("paged attention never has the whole attention matrix: leave output_attentions out")


def _real_tokens(mask: Any, cache: PagedGenerateCache, columns: int) -> tuple[torch.Tensor, list[int]]:
    """Which entries are tokens, bool ``[B, L]`` on the host, and how many per row."""
    batch, past = cache.batch_size, cache.get_seq_length()
    if mask is None:
        if past != max((table.num_tokens for table in cache.tables), default=0) or any(
            table.num_tokens != past for table in cache.tables
        ):
            raise UnsupportedCall("the rows of this cache are padded, so each pass needs the attention_mask")
        return torch.ones(batch, columns, dtype=torch.bool), [columns] * batch
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, past + columns):
        shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedCall(
            f"attention_mask must be [batch, past + new] = {(batch, past + columns)} and mark padding, got {shape}"
        )
    seen = mask.bool().cpu()
    real = seen[:, past:]
    counts: list[int] = real.sum(1).tolist()
    if seen.sum(1).tolist() != [table.num_tokens + count for table, count in zip(cache.tables, counts, strict=True)]:
        raise UnsupportedCall("attention_mask marks other tokens of the past as padding than before")
    if not any(counts):
        raise UnsupportedCall("attention_mask marks every token as padding")
    return real, counts


def _check_positions(given: Any, expected: torch.Tensor, real: torch.Tensor) -> None:
    if given is None:
        return
    if given.ndim == 2:
        rows = given.to(expected.device).expand_as(expected)
        if bool((rows == expected)[real.to(expected.device)].all()):
            return
    raise UnsupportedCall(
        "position_ids must count the tokens of each row from 0, padding left out; "
        "give packed sequences as a padded batch instead"
    )
