"""Lets processes take turns on one machine, so that whatever else runs there slows all of them alike.

A long prompt takes minutes, and a shared machine changes its speed from one minute to the next. So only one process
runs at any time, for some seconds; the others are stopped (SIGSTOP). Its times are the seconds in which it ran. Over a
whole run that is fair; of two answers that took different minutes of it, it is not.

A process, here a side, answers prompts: it writes ``{"event": "ready"}`` when its model is loaded; reads a line with
the path of a JSON file, ``{"ids": [...], "new_tokens": n}``; and writes ``{"event": "first"}`` with the first token and
``{"event": "last", "ids": [...]}`` with the last, ``ids`` being those of the answer (and ``"tokens": n`` beside them if
it cannot name all of its n). Other lines are its own affair.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1

# Lines of a dead side's standard error that are shown.
_SHOWN = 15


class SideFailed(Exception):
    """A process ended before it answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """
    Attributes:
        first_seconds: From the prompt to the first token, while it ran.
        token_seconds: Per token after that.
        ids: Of the answer.
    """

    first_seconds: float
    token_seconds: float
    ids: tuple[int, ...]


def die_with_parent() -> None:
    """In a child: no stopped process is left behind, however this one ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Side:
    """A process that runs when it is its turn.

    Args:
        name: For people.
        command: Program and arguments.

    Attributes:
        answers: So far.
        pid: Of the process, which leads a group of its own.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self.answers: list[Answer] = []
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.pid = self._process.pid
        self._events: queue.SimpleQueue[tuple[float, dict[str, Any] | None]] = queue.SimpleQueue()
        self._errors: deque[str] = deque(maxlen=_SHOWN)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()
        self._ran = 0.0  # Seconds, since the prompt was sent.
        self._first: float | None = None
        self._asked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGKILL)
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a prompt that a dead side did not take
                pipe.close()
        self._process.wait()

    def load(self, warm_up: Path) -> None:
        """Waits for the model and for an answer, which is forgotten.

        Raises:
            SideFailed: it is gone.
        """
        while self._next(None)[1]["event"] != "ready":
            pass
        while not self.answers:
            self.turn(warm_up, 1)
        self.answers.clear()

    def turn(self, prompt: Path, seconds: float) -> None:
        """Lets it run for so long, or until an answer is whole; asks for one if it has nothing to do.

        Raises:
            SideFailed: it is gone.
        """
        start = time.monotonic()
        self._signal(signal.SIGCONT)
        try:
            if not self._asked:
                self._ask(prompt)
            while self._asked and (left := start + seconds - time.monotonic()) > 0:
                try:
                    at, event = self._next(left)
                except queue.Empty:
                    break
                ran = self._ran + max(at - start, 0)
                if event["event"] == "first":
                    self._first = ran
                elif event["event"] == "last":
                    self._finish(ran, event["ids"], event.get("tokens", len(event["ids"])))
        finally:
            self._signal(signal.SIGSTOP)
            with suppress(ChildProcessError):  # until its last thread has stopped
                os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            self._ran += time.monotonic() - start

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _ask(self, prompt: Path) -> None:
        self._ran, self._first, self._asked = 0.0, None, True
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone, which `_next` says
            self._process.stdin.write(f"{prompt}\n")
            self._process.stdin.flush()

    def _finish(self, ran: float, ids: Sequence[int], tokens: int) -> None:
        if self._first is None or tokens < 2:
            raise SideFailed(f"{self.name} answered {tokens} tokens, without a first and a last")
        self.answers.append(Answer(self._first, (ran - self._first) / (tokens - 1), tuple(ids)))
        self._asked = False

    def _next(self, timeout: float | None) -> tuple[float, dict[str, Any]]:
        at, event = self._events.get(timeout=timeout)
        if event is None:
            code = self._process.wait()
            self._threads[1].join()
            raise SideFailed(f"{self.name} ended with {code}:\n" + "".join(self._errors))
        return at, event

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            at = time.monotonic()
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                self._events.put((at, event))
        self._events.put((time.monotonic(), None))  # it is gone

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors.extend(self._process.stderr)


def take_turns(
    commands: Mapping[str, Sequence[str]],
    prompts: Sequence[Path],
    warm_up: Path,
    turn_seconds: Mapping[str, float],
    on_turn: Callable[[Sequence[Side]], Any] = lambda sides: None,
) -> dict[str, list[Answer]]:
    """Each side answers each prompt; who is done begins again at the first, until the slowest is done.

    Args:
        commands: By name, what to start. One after the other is loaded and answers ``warm_up``, the rest being stopped.
        prompts: Files, in the order in which a side is asked them.
        turn_seconds: By name, of a turn; an answer ends it sooner. A quick side may take shorter ones: its few answers
            then still span the whole run.
        on_turn: Called after every round.

    Returns:
        By name, the answers in order, at least one for each prompt: the i-th is that of prompt ``i % len(prompts)``.

    Raises:
        SideFailed: one of them ended.
    """
    with ExitStack() as stack:
        sides: list[Side] = []
        for name, command in commands.items():
            sides.append(stack.enter_context(Side(name, command)))
            sides[-1].load(warm_up)
        while any(len(side.answers) < len(prompts) for side in sides):
            for side in sides:
                side.turn(prompts[len(side.answers) % len(prompts)], turn_seconds[side.name])
            on_turn(sides)
        return {side.name: side.answers for side in sides}
