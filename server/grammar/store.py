"""Compiled grammars of one model, kept for the requests that will bring them again."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llguidance
from tokenizers import AddedToken, Tokenizer

from .compile import matcher_of, tokenizer_of
from .guard import SECONDS, Guard
from .matcher import Grammar
from .source import GrammarRefused, GrammarSource, literals

MAX_CACHED = 256
MAX_CACHED_BYTES = 2**20  # of grammar text; a compiled one held up to 200 times as much (an enum of 20,000 words)
_WAIT_SECONDS = 30.0
_END = "<|foveate:end|>"


class GrammarsUnavailable(Exception):
    """This model's tokenizer is of a kind that constrained output cannot read."""


class GrammarsBusy(Exception):
    """Too many other grammars are being compiled."""


class Grammars:
    """Compiles grammars for one model, in a thread of its own, one at a time.

    Args:
        tokenizer: The ``transformers`` tokenizer, a fast one.
        vocab_size: Width of the logits.
        seconds: Time for one grammar.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, seconds: float = SECONDS) -> None:
        self._hf_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_id = 0
        self._special: dict[str, int] = {}
        self._seconds = seconds
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._guard: Guard | None = None
        self._unavailable: str | None = None  # why, once the tokenizer was read in vain
        self._thread: ThreadPoolExecutor | None = None
        self._cached: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    async def compile(self, source: GrammarSource) -> Grammar:
        """The grammar of ``source``.

        Raises:
            GrammarRefused: it is wrong, too large, or takes too long.
            GrammarsUnavailable: constrained output does not work with this model.
            GrammarsBusy: others are in front, and take too long.
        """
        cached = self._find(source)
        if cached is not None:
            return cached
        with self._lock:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="foveate-grammar")
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self.compile_now, source)
        except TimeoutError:
            raise GrammarsBusy("compiling this request's grammar took too long; try again later") from None

    def compile_now(self, source: GrammarSource) -> Grammar:
        """As ``compile``, but blocks; not to be used from two threads at once."""
        cached = self._find(source)
        if cached is not None:
            return cached
        if self._tokenizer is None or self._guard is None:
            self.load()
        try:
            grammar = self._compiled(source)
        except GrammarRefused:
            loosened = self._loosened(source)
            if loosened is None:
                raise
            grammar = self._compiled(loosened)
        self._keep(source, grammar)
        return grammar

    def _compiled(self, source: GrammarSource) -> Grammar:
        text = self._tried(source)
        assert self._tokenizer is not None
        try:
            return Grammar(matcher_of(self._tokenizer, text), self._end_id)
        except ValueError as error:
            raise GrammarRefused(str(error), source.param) from None

    def _tried(self, source: GrammarSource) -> str:
        for literal in literals(source):
            # The library would take the token for the text, and fail in the middle of an answer.
            token = next((token for token in self._special if token in literal), None)
            if token is not None:
                raise GrammarRefused(f"it holds {token}, a special token of the model, which is no text", source.param)
        assert self._guard is not None
        return self._guard.normal_form(source)

    def _loosened(self, source: GrammarSource) -> GrammarSource | None:
        """``source`` without those of its parts that are refused alone; ``None`` if none are.

        Raises:
            GrammarRefused: such a part must be held to.
        """
        refused: set[str] = set()
        for name, part in source.parts.items():
            try:
                self._tried(part)
            except GrammarRefused as error:
                if part.loosened is None:
                    reason = str(error).partition(" 1 | start:")[0]  # what follows is how the server wrote it
                    raise GrammarRefused(f"{name}: {reason}", part.param) from None
                refused.add(name)
        return source.loosened(frozenset(refused)) if refused and source.loosened else None

    def close(self) -> None:
        """Ends thread and process; blocks until what is being compiled is done."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if self._guard is not None:
            self._guard.close()

    def load(self) -> None:
        """Reads the tokenizer. To be called before requests are: nothing else runs in this process meanwhile.

        That took 0.2 s for 49,152 tokens, and 5 s for 262,144.

        Raises:
            GrammarsUnavailable: constrained output does not work with this model.
        """
        if self._unavailable is not None:
            raise GrammarsUnavailable(self._unavailable)
        try:
            self._load()
        except GrammarsUnavailable as error:
            self._unavailable = str(error)
            raise

    def _load(self) -> None:
        backend = getattr(self._hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise GrammarsUnavailable("constrained output needs a model with a fast tokenizer")
        own = Tokenizer.from_str(backend.to_str())
        own.no_padding()
        own.no_truncation()
        # The end of a text is a token of its own here: which ids mean it to the model is the sampler's matter.
        own.add_special_tokens([AddedToken(_END, special=True)])
        self._end_id = int(own.token_to_id(_END) or 0)
        try:
            self._tokenizer = tokenizer_of(own.to_str(), max(self._vocab_size, self._end_id + 1), self._end_id)
        except Exception as error:
            raise GrammarsUnavailable("constrained output does not know this model's kind of tokenizer") from error
        added = self._hf_tokenizer.added_tokens_decoder
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        self._guard = Guard(self._special, self._seconds)

    def _find(self, source: GrammarSource) -> Grammar | None:
        with self._lock:
            found = self._cached.get((source.kind, source.text))
            if found is not None:
                self._cached.move_to_end((source.kind, source.text))
            return found

    def _keep(self, source: GrammarSource, grammar: Grammar) -> None:
        with self._lock:
            self._cached[source.kind, source.text] = grammar
            self._cached_bytes += len(source.text.encode())
            while len(self._cached) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
                (_, text), _ = self._cached.popitem(last=False)
                self._cached_bytes -= len(text.encode())
