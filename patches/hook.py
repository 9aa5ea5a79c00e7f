"""The forward hooks that give each pass of an attached model its step."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from foveate.kv_cache.errors import OutOfPages
from foveate.kv_cache.manager import KVCacheManager
from foveate.sparse_attn.protocol import QueryRotator, Scheme

from .cache import PagedGenerateCache
from .errors import AttachError, CacheExhausted, UnsupportedCall
from .interface import NAME, PackedStep
from .pass_inputs import check_positions, real_tokens, refuse

# Held while a pass begins. One for all models: a lock in the hook would keep an attached model from being copied.
_BEGINNING = threading.Lock()


@dataclass(slots=True)
class _Pass:
    """A forward pass under way, in the thread ``thread``."""

    cache: PagedGenerateCache
    columns: int
    kept: bool
    packed: PackedStep
    replaced: DynamicCache | None
    thread: int

    def abandon(self) -> None:
        """Ends it as one that failed."""
        self.cache.abandon()
        if not self.kept:
            self.cache.reset()


class StepHook:
    """Makes the step of every forward pass whose caller did not pass one; one such pass at a time.

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
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        )

    def remove(self) -> None:
        """Takes the hooks off and frees the pages of every cache that is still alive."""
        for handle in self._handles:
            handle.remove()
        for cache in tuple(self._caches):
            cache.detach()

    def _before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        chosen = module.config.get_text_config()._attn_implementation
        if chosen != NAME:
            raise AttachError(
                f"this model was attached, and its attention was set to {chosen!r} after that: call .detach() first"
            )
        if kwargs.get("foveate_step") is not None:
            return None
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None or len(args) > len(self._names):
            return None  # the model has its own message for that
        with _BEGINNING:
            self._end_interrupted()
            self._begin(module, given, inputs)
        return (), given

    def _end_interrupted(self) -> None:
        """Gives up a pass that Ctrl-C ended: then no hook is called.

        Raises:
            UnsupportedCall: it is under way in another thread.
        """
        if self._pass is None:
            return
        if self._pass.thread != threading.get_ident() and any(
            thread.ident == self._pass.thread for thread in threading.enumerate()
        ):
            raise UnsupportedCall(
                "another thread's forward pass of this attached model is under way, and there can be one at a time: "
                "let threads take turns by a lock of your own, or use foveate.LLM or the server, which batch them"
            )
        self._pass.abandon()
        self._pass = None

    def _begin(self, module: torch.nn.Module, given: dict[str, Any], inputs: torch.Tensor) -> None:
        """Starts a pass, and puts what it needs into ``given``."""
        refuse(given, module.training)
        batch, columns = inputs.shape[:2]
        cache, kept = self._cache(given, batch)
        seen, real = real_tokens(given.get("attention_mask"), cache, columns)
        held = torch.tensor([table.num_tokens for table in cache.tables])
        position_ids = (real.cumsum(1) - 1 + held[:, None]).masked_fill(~real, 0).to(inputs.device)
        check_positions(given.get("position_ids"), position_ids, real, seen)
        try:
            step = cache.begin(real.sum(1).tolist(), self._scheme, self._rotary)
        except OutOfPages as error:
            if not cache.get_seq_length():
                cache.reset()
            pages = cache.manager.allocator.num_pages
            raise CacheExhausted(error, pages, cache.manager.page_size) from error
        packed = PackedStep(step, None if bool(real.all()) else real.flatten().nonzero()[:, 0].to(inputs.device))
        past = given.get("past_key_values")
        thread = threading.current_thread()  # which is in enumerate() from now on, whoever started it
        self._pass = _Pass(
            cache, columns, kept, packed, past if isinstance(past, DynamicCache) else None, thread.ident or 0
        )
        if "position_ids" in self._names:
            given["position_ids"] = position_ids
        given["attention_mask"] = None
        given["past_key_values"] = cache if kept else None
        given["foveate_step"] = packed

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        done = self._pass
        # Also called for passes that were refused while another one was under way.
        if done is None or kwargs.get("foveate_step") is not done.packed:
            return
        try:
            if output is None:  # the pass failed
                done.abandon()
                return
            done.cache.finish(done.columns)
            if done.replaced is not None:
                self._replaced.add(done.replaced)
            keys_read = done.packed.step.keys_read
            self.keys_read = self.keys_read.to(keys_read.device) + keys_read.sum(0)
            if not done.kept:
                done.cache.reset()
        finally:
            self._pass = None

    def _cache(self, given: dict[str, Any], batch: int) -> tuple[PagedGenerateCache, bool]:
        """The cache of this pass, and whether it lives on after it."""
        past = given.get("past_key_values")
        manager = self._manager_for(batch)
        if isinstance(past, PagedGenerateCache):
            if past not in self._caches:
                raise UnsupportedCall("this cache was made by another attached model")
            if past.manager is not manager:
                raise UnsupportedCall("this cache is of another pool: the model has another element type since then")
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
        return PagedGenerateCache(manager, batch, self._caches), kept
