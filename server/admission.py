"""Which requests the engine takes, and what it makes of them before they are computed."""

from __future__ import annotations

import hashlib

from foveate.kv_cache.manager import KVCacheManager

from .detokenizer import Detokenizer
from .exceptions import ContextOverflow, InvalidRequest, PoolTooSmall
from .loader import LoadedModel
from .request import GenerationRequest
from .sampling import SamplerRow, check_sampling
from .sequence import RequestGroup, Sequence
from .stopping import StopChecker


class Admission:
    """Checks requests against a model and its cache. Every method may be called from any thread."""

    def __init__(self, loaded: LoadedModel, cache: KVCacheManager) -> None:
        self._loaded = loaded
        self._cache = cache
        self._eos = sorted(loaded.eos_token_ids)

    def admit(self, request: GenerationRequest) -> RequestGroup:
        """Checks a request, and makes its first sequence.

        Raises:
            InvalidRequest: a value is out of range.
            ContextOverflow: prompt and answer exceed the context.
            PoolTooSmall: they exceed the KV pool.
        """
        prompt, params = request.prompt_token_ids, request.sampling
        check_sampling(params, self._loaded.vocab_size)
        if not prompt:
            raise InvalidRequest("the prompt holds no token", param="prompt")
        if min(prompt) < 0 or max(prompt) >= self._loaded.vocab_size:
            raise InvalidRequest(f"token ids must be from 0 to {self._loaded.vocab_size - 1}", param="prompt")
        room = self._loaded.context_length - len(prompt)
        wanted = params.max_tokens if params.max_tokens is not None else max(room, 1)
        if wanted > room:
            raise ContextOverflow(len(prompt), wanted, self._loaded.context_length)
        if len(prompt) + wanted > self._cache.capacity_tokens:
            raise PoolTooSmall(len(prompt) + wanted, self._cache.capacity_tokens)
        policy = f"{request.scheme.identity}\0{request.salt}"
        group = RequestGroup(request, hashlib.sha256(policy.encode("utf-8", "surrogatepass")).digest(), wanted)
        group.sequences.append(self.sequence(group, 0))
        return group

    def sequence(self, group: RequestGroup, index: int) -> Sequence:
        """Choice ``index`` of a request, nothing of it computed."""
        request = group.request
        prompt, params = request.prompt_token_ids, request.sampling
        return Sequence(
            group,
            index,
            list(prompt),
            SamplerRow(params, prompt, [], self._eos, index),
            Detokenizer(self._loaded.tokenizer, prompt, params),
            StopChecker(params),
        )
