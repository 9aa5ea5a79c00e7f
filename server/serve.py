"""``foveate serve``: loads the model behind a listening socket, and stops without losing answers.

The socket answers from the first moment: /health says 503 while the model is being loaded. SIGTERM
or Ctrl-C: no new requests (503), running answers go on for ``drain_seconds``, the rest end with an
error event, then the process exits with 0. A second signal stops at once: connections are cut off.
An engine that dies by itself ends the process with 1, so that whoever supervises it starts it anew.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from functools import partial
from types import FrameType

import uvicorn

from . import logs
from .app import create_app
from .batch.errors import BatchError
from .engine_protocol import EngineLike
from .http_protocol import bounded_protocol
from .limits import body_limit
from .names import is_loopback
from .settings import Settings
from .settings_operation import unknown_variables
from .state import ServerState, state_of_app

_TIMES = ("_seconds", "_timeout")
_STUCK_SECONDS = 2.0  # for threads to end that are done but for a little
_POOLED = re.compile(r"foveate-.*_\d+")  # as ThreadPoolExecutor names its threads
_GRACE_SECONDS = 5  # for connections to take their last bytes after the engine has stopped

_log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """Serves until told to stop and returns the exit status."""
    logs.configure(settings.log_level, settings.log_format)
    for name in unknown_variables(set(Settings.model_fields)):
        _log.warning("%s is no setting and was passed over", name)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        complain(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", settings)
        return 1
    _log.info("limits: %s", ", ".join(f"{name}={value}" for name, value in limits_of(settings).items()))

    try:
        app = create_app(None, settings)
    except BatchError as error:
        listener.close()
        complain(str(error), settings)
        return 1
    except ValueError as error:  # what settings and environment say; the rest of it was checked before
        listener.close()
        complain(str(error), settings)
        return 2
    if not state_of_app(app).keys.locked and not is_loopback(settings.host):
        _log.warning("listening on %s without an API key: whoever reaches this port can use it", settings.host)
    _reload_keys_on_hangup(state_of_app(app))
    server = FoveateServer(server_config(app, settings), state_of_app(app), listener)
    threading.Thread(target=server.load, name="foveate-load", daemon=True).start()
    server.run(sockets=[listener])
    if server.loading or _stuck():
        # The loader is inside native code; tearing the interpreter down under it would crash. Threads that a disk or a
        # tokenizer holds would be waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(server.status)
    return server.status


def _stuck() -> bool:
    """Whether a pool's thread is still at work that was told to end; Python waits for those, whether daemons or not."""
    deadline = time.monotonic() + _STUCK_SECONDS
    for thread in [thread for thread in threading.enumerate() if _POOLED.fullmatch(thread.name)]:
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            _log.warning("%s is still at work and is left behind", thread.name)
            return True
    return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 picks a free one. ``::`` takes IPv4 too.

    Raises:
        OSError: the address is taken or not ours.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    both = address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(address, family=family, dualstack_ipv6=both)


def address_of(listener: socket.socket, tls: bool = False) -> str:
    """The URL of ``listener``."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{scheme}://{host}:{port}"


def _reload_keys_on_hangup(state: ServerState) -> None:
    """SIGHUP reads the key files again. On a thread: a signal's handler must neither block nor log."""

    def handle(sig: int, frame: FrameType | None) -> None:
        threading.Thread(target=state.keys.reload, name="foveate-keys", daemon=True).start()

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, handle)


def complain(reason: str, settings: Settings) -> None:
    """Says on stderr, in the form of the log, why the server ends."""
    if settings.log_format == "json":
        _log.critical("%s", reason)
    else:
        print(f"foveate: {reason}", file=sys.stderr, flush=True)


def limits_of(settings: Settings) -> dict[str, float]:
    """The limits on requests, by their names in ``Settings``."""
    names = [name for name in Settings.model_fields if name.startswith("max_") or name.endswith(_TIMES)]
    return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}


def server_config(app: object, settings: Settings) -> uvicorn.Config:
    """uvicorn's settings: httptools, since h11 answers twice when both body lengths are given."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=bounded_protocol(settings.max_header_bytes, partial(body_limit, settings=settings), settings.read_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        access_log=False,  # see access.py
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )


class FoveateServer(uvicorn.Server):
    """uvicorn with an engine behind it.

    Attributes:
        status: Exit status of the process.
        loading: Whether the model is still being loaded.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, listener: socket.socket) -> None:
        super().__init__(config)
        self.status = 0
        self.loading = True
        self._state = state
        self._url = address_of(listener, state.settings.tls_cert is not None)  # now: the socket may be closed later
        self._listening = threading.Event()
        self._engine: EngineLike | None = None

    def load(self) -> None:
        """Loads the model and takes requests; runs in a thread of its own."""
        from .engine import Engine

        logs.adopt_libraries()  # they came with it
        try:
            engine: EngineLike = Engine.load(self._state.settings)
            self._state.serve(engine)
        except Exception as error:
            _log.debug("loading failed", exc_info=True)
            complain(f"cannot serve {self._state.settings.model}: {error}", self._state.settings)
            self.status = 1
            self.should_exit = True
            return
        finally:
            self.loading = False
        self._engine = engine
        self._listening.wait()
        if not self._state.draining:
            print(f"foveate is ready on {self._url}", flush=True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening.set()

    async def on_tick(self, counter: int) -> bool:
        engine = self._engine
        if engine is not None and engine.state == "dead" and not self._state.draining and not self.should_exit:
            _log.critical("the engine has stopped; the server ends")
            self.status = 1
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._state.draining:
            # Not by way of uvicorn, which answers what it cancels as a failure. What must last is on the disk.
            os._exit(self.status)
        self._state.draining = True
        threading.Thread(target=self._drain, name="foveate-drain", daemon=True).start()

    def _drain(self) -> None:
        """Lets running answers end while the socket still says 503 to new ones."""
        try:
            if self._engine is not None:
                self._engine.shutdown(self._state.settings.drain_seconds)
        finally:
            self.should_exit = True
