"""One streamed completion as a client sees it: when each piece came, and how it ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx

from .arrivals import Answer


class ServerError(Exception):
    """The server did not answer as one of its kind does; the message says what it said."""


class Client:
    """Talks to one server, with no limit on connections: an open load must not wait for itself.

    Args:
        url: Of the server; ``/v1`` is added.
        api_key: Sent as a bearer token.
        timeout: Seconds for one whole answer.
        transport: For tests.

    Raises:
        ServerError: the URL is none.
    """

    def __init__(
        self, url: str, api_key: str | None, timeout: float, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._timeout = timeout
        try:
            self._http = httpx.AsyncClient(
                base_url=url.rstrip("/").removesuffix("/v1") + "/v1/",
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=timeout,
                transport=transport,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
                trust_env=False,  # no proxy on the way
            )
        except httpx.InvalidURL as error:
            raise ServerError(f"{url}: {error}") from error

    async def close(self) -> None:
        await self._http.aclose()

    async def model(self, name: str | None) -> dict[str, Any]:
        """What the server says of a model, the first that it lists if none is named.

        Raises:
            ServerError: it cannot be reached, refuses, or has no such model.
        """
        try:
            answer = await self._http.get("models")
            answer.raise_for_status()
            listed: list[dict[str, Any]] = answer.json()["data"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self._http.base_url}models: {error or type(error).__name__}") from error
        for one in listed:
            if name in (None, one["id"]):
                return one
        raise ServerError(f"the server has no model {name!r}; it has: {', '.join(one['id'] for one in listed)}")

    async def complete(self, body: Mapping[str, Any], due: float, clock: Callable[[], float]) -> Answer:
        """Streams one completion.

        Args:
            body: Of the request; streaming and usage are asked for here.
            due: When it should have been sent, by ``clock``.
            clock: Seconds since the load began.

        Returns:
            The answer; whatever went wrong is its ``error``, in a word: the server's own may be long and all differ.
        """
        sent = clock()
        pieces: list[float] = []
        tokens, error, last = 0, None, None
        whole = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with asyncio.timeout(self._timeout):
                async with self._http.stream("POST", "completions", json=whole) as response:
                    if response.status_code != 200:
                        await response.aread()
                        return Answer(due, sent, (), clock(), 0, str(response.status_code))
                    async for event in _events(response):
                        if "error" in event:
                            error = "error in the stream"
                        if event.get("choices"):
                            choice, now = event["choices"][0], clock()
                            if choice.get("text"):
                                pieces.append(now)
                            if choice.get("finish_reason") is not None:
                                last = now
                        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        except (TimeoutError, httpx.TimeoutException):
            error = "timeout"
        except (httpx.HTTPError, OSError):
            error = "connection"
        except (ValueError, AttributeError, TypeError, KeyError):
            error = "not a stream of completions"
        if error is None and last is None:
            error = "cut off"
        return Answer(due, sent, tuple(pieces), clock(), tokens or len(pieces), error, last)

    async def refusal(self, body: Mapping[str, Any]) -> str | None:
        """What the server has against a request, in its own words; ``None`` if it answers.

        Raises:
            ServerError: it cannot be reached.
        """
        try:
            answer = await self._http.post("completions", json=dict(body))
        except httpx.HTTPError as error:
            raise ServerError(f"{self._http.base_url}completions: {error or type(error).__name__}") from error
        if answer.status_code == 200:
            return None
        try:
            said = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = answer.text[:200]
        return f"{answer.status_code}: {said}"


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)
