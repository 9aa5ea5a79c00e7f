"""A real server on a loopback port, in a thread, around any engine; and a client that writes bytes."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from foveate.server.app import create_app
from foveate.server.serve import FoveateServer, address_of, listen, server_config
from foveate.server.settings import Settings
from foveate.server.state import state_of_app


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class LiveServer:
    """Serves ``engine`` until ``stop``."""

    def __init__(self, engine: Any, **options: Any) -> None:
        settings = Settings(model=engine.model_name, port=0, **options)
        listener = listen(settings.host, settings.port)
        self.port = listener.getsockname()[1]
        self.url = address_of(listener)
        app = create_app(engine, settings)
        self.server = FoveateServer(server_config(app, settings), state_of_app(app), listener)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self._thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def connect(self, timeout: float = 60.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def raw(self, data: bytes, timeout: float = 60.0) -> bytes:
        """Everything that the server says to ``data`` until it closes the connection."""
        with self.connect(timeout) as connection:
            said = b""
            with suppress(BrokenPipeError, ConnectionResetError):  # it refused before it had read all
                connection.sendall(data)
            with suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    said += part
            return said


class _Bytes:
    def __init__(self, data: io.BytesIO) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return self._data


def answers_in(said: bytes, method: str = "POST") -> list[Answer]:
    """The answers in ``said``, one after another; bytes that are no answer raise."""
    data = io.BytesIO(said)
    data.close = lambda: None  # type: ignore[method-assign]
    answers = []
    while data.tell() < len(said):
        response = http.client.HTTPResponse(_Bytes(data), method=method)  # type: ignore[arg-type]
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answers.append(Answer(response.status, headers, response.read()))
    return answers
