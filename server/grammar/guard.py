"""Keeps the trial process, and does without its answer when that takes too long."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from .compile import miniature, normal_form
from .source import GrammarRefused, GrammarSource

SECONDS = 5.0
_START_SECONDS = 30.0
_BY_ID = re.compile(r"<\[(\d+)\]>")
# No more of the environment than a Python program needs: keys of the server may be in the rest.
_ENVIRONMENT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "VIRTUAL_ENV")


class TrialUnavailable(Exception):
    """The trial process cannot be started, or does not know this tokenizer."""


class Guard:
    """Tries grammars in another process, one at a time; not to be used from two threads at once.

    Args:
        special: Ids of the tokens that a grammar may name.
        seconds: Time for one grammar.
    """

    def __init__(self, special: Mapping[str, int], seconds: float = SECONDS) -> None:
        self._tokenizer = miniature(list(special))
        self._ids = {str(id_): 256 + place for place, id_ in enumerate(special.values())}
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def normal_form(self, source: GrammarSource) -> str:
        """``source`` in llguidance's own notation, after it has proven harmless.

        Tokens named by their ids are those of the model in a ``lark`` source only.

        Raises:
            GrammarRefused: it is wrong, or compiling it took too long or ended the process.
            TrialUnavailable: there is no such process.
        """
        if self._process is None:
            self._start()
        text = source.text
        if source.kind == "lark":  # the other process numbers them differently; what a schema quotes may look alike
            text = _BY_ID.sub(lambda match: f"<[{self._ids.get(match[1], match[1])}]>", text)
        answer = self._ask({"kind": source.kind, "text": text}, self._seconds)
        if answer is None:
            self.close()
            raise GrammarRefused("it is too complex to compile", source.param)
        if "error" in answer:
            raise GrammarRefused(str(answer["error"]), source.param)
        return normal_form("lark", source.text) if source.kind == "lark" else str(answer["grammar"])

    def close(self) -> None:
        """Ends the process; the next grammar starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.communicate()

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "foveate.server.grammar.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**environment, "RAYON_NUM_THREADS": "1"},
        )
        if self._ask(self._tokenizer, _START_SECONDS) is None:
            self.close()
            raise TrialUnavailable("the process that tries grammars does not start")

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer, or ``None`` if there was none in time; the process is then of no use any more."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        clock = threading.Timer(seconds, process.kill)
        clock.daemon = True
        clock.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:  # it has ended
            return None
        finally:
            clock.cancel()
        return json.loads(line) if line.endswith("\n") else None
