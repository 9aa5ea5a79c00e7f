"""What the routes of one app share."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fastapi import FastAPI, Request

from .chat_template import ChatTemplate
from .engine_protocol import EngineLike
from .errors import ApiError
from .grammar.store import Grammars, GrammarsUnavailable
from .keys import KeyRing
from .metrics import ServerMetrics
from .settings import Settings
from .text_worker import TextWorker
from .token_text import TokenText
from .tracing import Tracing

_log = logging.getLogger(__name__)

_TEXT_THREADS = 4
_TEXT_SECONDS = 30.0
_RETRY_SECONDS = 5
_WORDS = {
    "loading": "The model is still being loaded.",
    "draining": "The server is stopping.",
    "dead": "The engine has stopped.",
    "stalled": "The engine makes no progress.",
    "queue_full": "Too many requests wait.",
}


@dataclass(frozen=True, slots=True)
class Served:
    """The engine and what reads and writes its model's text."""

    engine: EngineLike
    tokens: TokenText
    chat: ChatTemplate
    grammars: Grammars


class ServerState:
    """Settings, metrics and, once its model is loaded, the engine."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.keys = KeyRing(settings)
        self.metrics = ServerMetrics(lambda: self._served.engine if self._served else None)
        self.tracing = None
        if settings.otlp_endpoint is not None:
            self.tracing = Tracing(settings.otlp_endpoint, settings.served_model_name or settings.model)
        self.text = TextWorker(_TEXT_THREADS, _TEXT_SECONDS)
        self.draining = False
        self._served: Served | None = None

    def serve(self, engine: EngineLike) -> None:
        """From now on requests go to ``engine``."""
        grammars = Grammars(engine.tokenizer, engine.vocab_size)
        try:
            grammars.load()
        except GrammarsUnavailable as error:  # requests that need it are told so
            _log.warning("%s", error)
        self._served = Served(
            engine, TokenText(engine.tokenizer), ChatTemplate(engine.tokenizer, self.settings.tool_parser), grammars
        )

    @property
    def condition(self) -> str:
        """``ready``, or why no request is taken."""
        if self.draining:
            return "draining"
        return "loading" if self._served is None else self._served.engine.state

    @property
    def health(self) -> str:
        """As ``condition``, and ``stalled`` when the engine's loop no longer turns."""
        if self._served is None or self.condition != "ready":
            return self.condition
        stalled = self._served.engine.snapshot().heartbeat_age_seconds > self.settings.stall_seconds
        return "stalled" if stalled else "ready"

    @property
    def readiness(self) -> str:
        """As ``health``, and ``queue_full`` while the next request would be refused for it."""
        health = self.health
        if health != "ready" or self._served is None:
            return health
        waiting = self._served.engine.snapshot().waiting
        return "queue_full" if waiting >= self.settings.max_queued_requests else "ready"

    def close(self) -> None:
        """Ends the threads of this state; blocks."""
        self.text.close()
        if self._served is not None:
            self._served.grammars.close()
        if self.tracing is not None:
            self.tracing.close()

    def served(self) -> Served:
        """The model that is served.

        Raises:
            ApiError: 503, no request is taken.
        """
        condition = self.condition
        if self._served is None or condition != "ready":
            raise unavailable(condition)
        return self._served

    def served_as(self, model: str | None) -> Served:
        """The model that is served, if a client's name for it is right; no name is right too.

        Raises:
            ApiError: 503, or 404 for another model.
        """
        served = self.served()
        if model is not None and model != served.engine.model_name:
            raise ApiError(
                404,
                f"There is no such model here; this server has {served.engine.model_name!r}.",
                param="model",
                code="model_not_found",
            )
        return served


def unavailable(condition: str) -> ApiError:
    return ApiError(
        503,
        _WORDS[condition],
        type="service_unavailable",
        code=condition,
        headers={"retry-after": str(_RETRY_SECONDS)},
    )


def attach_state(app: FastAPI, state: ServerState) -> None:
    app.state.foveate = state


def state_of_app(app: FastAPI) -> ServerState:
    """The state that ``create_app`` attached."""
    state: ServerState = app.state.foveate
    return state


def state_of(request: Request) -> ServerState:
    return state_of_app(request.app)
