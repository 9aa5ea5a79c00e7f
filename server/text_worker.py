"""Tokenizers and chat templates run here, in threads, with a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from .errors import ApiError

P = ParamSpec("P")
T = TypeVar("T")


class TextWorker:
    """A few threads for work on text, so that the event loop stays free.

    A call that runs too long cannot be stopped; its thread is lost until it ends, its caller is not.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="foveate-text")
        self._seconds = seconds

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``function``'s result.

        Raises:
            ApiError: it took too long, or native code panicked.
            Exception: whatever ``function`` raises.
        """

        def call() -> T:
            try:
                return function(*args, **kwargs)
            except (Exception, KeyboardInterrupt, SystemExit):
                raise
            except BaseException as panic:  # a Rust panic of the tokenizer, which must not end the event loop
                raise ApiError(400, "The text could not be processed.", code="invalid_value") from panic

        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError:
            raise ApiError(503, "Reading the text took too long.", type="server_error", code="text_timeout") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
