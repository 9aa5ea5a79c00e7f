"""`foveate serve` as a process, for benches that stop or kill it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

FOVEATE = [sys.executable, "-m", "foveate.server"]


class Server:
    """A server on a free loopback port; made when it is ready.

    Raises:
        RuntimeError: it ended before it was ready.
    """

    def __init__(self, model: str, log: Path, *flags: str) -> None:
        command = [*FOVEATE, "serve", model, "--port", "0", "--log-level", "warning", *flags]
        self._log = log.open("ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("foveate is ready on "):
                self.url = line.split()[-1]
                return
        raise RuntimeError(f"the server did not start; see {log}")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a GET, or to a POST of ``body``; text where it is not JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            text = answer.read().decode()
        return json.loads(text) if text[:1] in "{[" else text

    def metric(self, name: str) -> float:
        """A number of ``/metrics`` without labels."""
        lines = str(self.ask("/metrics")).splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))

    def end(self, kill: bool = False) -> int:
        """Stops it, by SIGKILL or as an operator would; returns its exit status."""
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        status = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()
        return status
