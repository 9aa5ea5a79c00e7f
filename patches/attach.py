"""``attach``: runs a ``transformers`` model on paged, sparse attention, and undoes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from foveate.kv_cache.geometry import CacheGeometry, default_page_size
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import CalibrationMissing
from foveate.sparse_attn.protocol import Scheme

from .errors import AttachError, UnsupportedCall, UnsupportedModel
from .families import ModelFacts, facts
from .fingerprint import fingerprint
from .hook import StepHook
from .interface import NAME, register
from .profiles import profiles_for
from .rotary import ModelRotary

# Bound of a pool that nobody gave a size. On a CPU its pages cost memory only once written.
DEFAULT_POOL_BYTES = 4 * 2**30


class Attached:
    """A model that runs on paged attention until ``detach``; also a context manager.

    Args:
        model: Changed in place.
        scheme: Policy of passes that bring no step of their own; ``None``: every pass must.
        manager: Their pages; ``None`` makes a pool at the first of them.
        page_size: Tokens per page of that pool.
        num_pages: Pages of that pool.

    Attributes:
        model: The model.
        facts: What its config says.
        scheme: As given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        scheme: Scheme | None = None,
        manager: KVCacheManager | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
    ) -> None:
        self.model = model
        self.facts = facts(model.config)
        if model.config.get_text_config()._attn_implementation == NAME:
            raise AttachError("this model is attached already; call .detach() on the earlier attachment first")
        self.scheme = scheme
        self._manager = manager
        self._given = manager is not None
        self._page_size = page_size
        self._num_pages = num_pages
        self._hook: StepHook | None = None
        self._keys_read = [0.0, 0.0]  # by a hook that is gone
        if scheme is not None and manager is None:
            self._geometry(1 if num_pages is None else num_pages)  # says now which of the sizes is wrong
        rotary = ModelRotary(model) if scheme is not None and scheme.moves_positions else None
        self._implementations = [(config, config._attn_implementation_internal) for config in _configs(model)]
        try:
            _switch(model)
            if scheme is not None:
                self._hook = StepHook(model, scheme, rotary, self._manager_for)
        except BaseException:
            self.detach()
            raise

    @property
    def manager(self) -> KVCacheManager | None:
        """The cache; ``None`` before the first pass when none was given."""
        return self._manager

    @property
    def keys_read_fraction(self) -> float:
        """Keys read so far over those of dense attention, also after ``detach``; 1 before the first pass."""
        read, dense = self._keys_read if self._hook is None else self._hook.keys_read.tolist()
        return read / dense if dense else 1.0

    def detach(self) -> None:
        """Gives the model its own attention back and frees all pages. May be called again."""
        hook, self._hook = self._hook, None
        try:
            if hook is not None:
                self._keys_read = hook.keys_read.tolist()
                hook.remove()
        finally:
            before, self._implementations = self._implementations, []
            for config, implementation in before:
                config._attn_implementation_internal = implementation

    def __enter__(self) -> Attached:
        """
        Raises:
            AttachError: it was detached.
        """
        if not self._implementations:
            raise AttachError("this attachment was detached, so the model has its own attention; attach anew")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _manager_for(self, batch: int) -> KVCacheManager:
        self._let_go_of_other_pages()
        if self._manager is None:
            one = self._geometry(1)
            num_pages = self._num_pages or min(
                batch * one.pages_for(self.facts.context_length),
                max(batch, DEFAULT_POOL_BYTES // one.bytes_per_page),
            )
            geometry = self._geometry(num_pages)
            stats = self.scheme.page_stats(geometry) if self.scheme else ()
            self._manager = KVCacheManager(PagePool(geometry, stats), prefix_reuse=False)
        return self._manager

    def _let_go_of_other_pages(self) -> None:
        """Drops a pool that no longer fits, since the model was moved or given another element type."""
        if self._manager is None or _fits(self._manager.pool, self.model):
            return
        if self._given or self._manager.num_pages_in_use:
            pool, kind = self._manager.pool, "it was given" if self._given else "that caches hold"
            raise UnsupportedCall(
                f"the model is {self.model.dtype} on {self.model.device} now, and the pages {kind} are "
                f"{pool.geometry.dtype} on {pool.keys.device}: attach it anew"
            )
        self._manager = None

    def _geometry(self, num_pages: int) -> CacheGeometry:
        return CacheGeometry(
            num_layers=self.facts.num_layers,
            num_kv_heads=self.facts.num_kv_heads,
            head_dim=self.facts.head_dim,
            page_size=default_page_size(self.model.device) if self._page_size is None else self._page_size,
            num_pages=num_pages,
            dtype=self.model.dtype,
            device=self.model.device,
        )


def attach(
    model: PreTrainedModel,
    policy: str | Scheme | Mapping[str, Any] = "dense",
    cache: KVCacheManager | None = None,
    *,
    page_size: int | None = None,
    num_pages: int | None = None,
    profile: str | Path | Sequence[str | Path] = (),
) -> Attached:
    """Makes a model run on paged attention: forward, ``generate()``, or steps of the caller's own.

    One forward pass at a time: several threads take turns by a lock of their own, or ask ``LLM`` or the server,
    which batch them. No gradient passes through; ``backward`` raises ``UnsupportedCall``. A mask with padding between
    tokens needs ``position_ids``; ``generate()`` makes them.

    Args:
        model: A causal LM of ``transformers``; of what ``torch.compile`` or PEFT made of one, the model inside.
        policy: A scheme, its name, or ``{"scheme": name, option: value, ...}``.
        cache: Pages to use, of the model's element type or int8, on its device. Left out, the first pass
            makes a pool for its batch at the model's context length, of at most 4 GiB.
        page_size: Tokens per page of that pool.
        num_pages: Pages of that pool.
        profile: Files of profiles of this model (``foveate calibrate``), or one, for schemes that need one. Those that
            come with the package are found by themselves.

    Returns:
        The attachment: call ``.detach()``, or use it in a ``with`` statement.

    Raises:
        AttachError: the model is attached already.
        UnsupportedModel: its attention is not one that pages can serve, or it is no model of ``transformers``.
        SchemeError: no such scheme or option, or a profile is missing or of another model.
        ValueError: the cache does not fit the model, a size is out of range, or arguments contradict each other.
    """
    model = _unwrapped(model)
    if cache is not None and (page_size is not None or num_pages is not None):
        raise ValueError("a cache has its own page_size and num_pages")
    if len({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}) > 1:
        raise UnsupportedModel("the model lies on several devices, the pages on one")
    scheme = _scheme(model, policy, profile)
    if cache is not None:
        _check_fit(cache.pool, model, facts(model.config))
        cache.pool.declare(scheme.page_stats(cache.pool.geometry))
    return Attached(model, scheme, cache, page_size, num_pages)


def attach_engine(model: PreTrainedModel) -> Attached:
    """Makes a model run on paged attention for a caller that passes ``foveate_step`` each time.

    Raises:
        AttachError: the model is attached already.
        UnsupportedModel: its attention is not one that pages can serve.
    """
    return Attached(model)


def _unwrapped(model: Any) -> PreTrainedModel:
    """The model that does the work: what is called through a wrapper calls it, and hooks must be on it."""
    found = model
    while not isinstance(found, PreTrainedModel):
        inner = found.get_base_model() if hasattr(found, "get_base_model") else getattr(found, "_orig_mod", None)
        if inner is None:
            raise UnsupportedModel(f"{type(model).__name__} is no model of transformers (PreTrainedModel)")
        found = inner
    return found


def _scheme(
    model: PreTrainedModel, policy: str | Scheme | Mapping[str, Any], profile: str | Path | Sequence[str | Path]
) -> Scheme:
    if isinstance(policy, Scheme):
        if profile:
            raise ValueError("a scheme has its own profile: give its name and options, or no `profile`")
        return policy
    options = {"scheme": policy} if isinstance(policy, str) else dict(policy) if isinstance(policy, Mapping) else {}
    if not isinstance(options.get("scheme"), str):
        raise ValueError(f"a policy names its scheme: {{'scheme': ...}}, one of {', '.join(registry.names())}")
    name = options.pop("scheme")
    if not profile:
        with suppress(CalibrationMissing):  # else weights need not be read
            return registry.build(name, **options)
    return registry.build(name, profiles_for(fingerprint(model), profile), **options)


def _configs(model: PreTrainedModel) -> Iterator[PreTrainedConfig]:
    """Every config in the model and in its configs, once each."""
    found = (getattr(module, "config", None) for module in model.modules())
    waiting = [config for config in found if isinstance(config, PreTrainedConfig)]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) not in seen:
            seen.add(id(config))
            waiting += [part for name in config.sub_configs if (part := getattr(config, name, None)) is not None]
            yield config


def _switch(model: PreTrainedModel) -> None:
    """Chooses our attention for the text part. ``transformers`` only warns where that fails."""
    register()
    text = model.config.get_text_config()
    own = [name for name in model.config.sub_configs if getattr(model.config, name, None) is text]
    model.set_attn_implementation(dict.fromkeys(own, NAME) if own else NAME)
    if text._attn_implementation != NAME:
        raise UnsupportedModel(
            f"{type(model).__name__} does not let its attention be chosen: its code does not use "
            "transformers' AttentionInterface"
        )


def _fits(pool: PagePool, model: PreTrainedModel) -> bool:
    # A geometry may say "cuda" and mean the first.
    return pool.keys.device == model.device and (pool.geometry.quantized or pool.geometry.dtype == model.dtype)


def _check_fit(pool: PagePool, model: PreTrainedModel, known: ModelFacts) -> None:
    geometry = pool.geometry
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        if getattr(geometry, name) != getattr(known, name):
            raise ValueError(f"the cache has {name}={getattr(geometry, name)}, the model {getattr(known, name)}")
    if not geometry.quantized and geometry.dtype != model.dtype:
        raise ValueError(f"the cache holds {geometry.dtype}, the model computes in {model.dtype}")
    if pool.keys.device != model.device:  # a geometry may say "cuda" and mean the first
        raise ValueError(f"the cache lies on {pool.keys.device}, the model on {model.device}")
