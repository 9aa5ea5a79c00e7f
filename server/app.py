"""The application: routes, errors, limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from foveate import __version__

from . import routes_cache, routes_chat, routes_completions, routes_meta, routes_responses
from .access import Access
from .batch import routes_batches, routes_files
from .batch.service import open_service
from .engine_protocol import EngineLike
from .errors import install_handlers
from .head import HeadAsGet
from .limits import Limits
from .openapi import describe_app
from .settings import Settings
from .state import ServerState, attach_state


def create_app(engine: EngineLike | None, settings: Settings) -> FastAPI:
    """The HTTP server's app around ``engine``.

    ``None`` stands for an engine still being loaded: every request but ``/metrics`` gets a 503
    until ``ServerState.serve`` is called.

    Raises:
        BatchError: ``--batch-dir`` cannot be used.
        ValueError: a key file went bad since it was checked, or one of OpenTelemetry's own variables is wrong.
    """
    state = ServerState(settings)
    if engine is not None:
        state.serve(engine)

    batches = open_service(state)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if batches is not None:
            await batches.start()
        yield
        if batches is not None:
            await batches.stop()
        await asyncio.to_thread(state.close)

    # No pages for browsers: they would load scripts from elsewhere. No telemetry of FastAPI's own.
    app = FastAPI(
        title="foveate",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    attach_state(app, state)
    app.state.batches = batches
    install_handlers(app)
    for routes in (
        routes_completions,
        routes_chat,
        routes_responses,
        routes_cache,
        routes_meta,
        routes_files,
        routes_batches,
    ):
        app.include_router(routes.router)
    describe_app(app, state.keys.locked)
    # The last one added is the outermost.
    app.add_middleware(HeadAsGet)
    app.add_middleware(Limits, settings=settings, keys=state.keys)
    app.add_middleware(Access, metrics=state.metrics, tracing=state.tracing)
    if settings.cors_origin:
        # Without credentials: a page sends its key itself, and no cookie of the browser counts here.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app
