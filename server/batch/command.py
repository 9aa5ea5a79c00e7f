"""``foveate batch``: the requests of a file, answered into another file."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from pydantic import ValidationError
from tqdm import tqdm

from ..config_file import ConfigFileError
from ..engine_protocol import EngineLike
from ..options import EngineOptions
from ..settings import Settings
from ..state import ServerState
from .endpoints import ENDPOINTS
from .entry import LineError, parse_line
from .errors import BatchError, CannotResume, Damaged, EngineStopped
from .ledger import Ledger, same_file
from .lines import read_lines, scan
from .runner import BatchRunner, Source, open_input

STATE_SUFFIX = ".state"  # of the file beside the output
_LOOKED_AT = 1000  # lines in which a model's name is looked for
NO_MODEL = f"none of the first {_LOOKED_AT} lines names a model: give --model (or set FOVEATE_MODEL)"


def name_model(given: Namespace) -> None:
    """Takes the model from the lines where no flag, variable or file of settings names it.

    The first line that names one counts. It is clients' name for the model then, too.

    Raises:
        BatchError: the lines cannot be read.
    """
    values = {name: value for name, value in vars(given).items() if name in Settings.model_fields}
    try:
        settings = Settings(**values)
        chosen, named = settings.model, settings.served_model_name
    except ConfigFileError:
        return  # told by whoever reads the settings next
    except ValidationError as error:
        if any(item["loc"] != ("model",) or item["type"] != "missing" for item in error.errors()):
            return  # told likewise
        chosen, named = None, getattr(given, "served_model_name", None)
    with open_input(given.input) as file:
        found = _first_model(file, Settings.model_fields["max_body_bytes"].default)
    if found is None or chosen not in (None, found):
        return
    given.model = found
    if named is None:
        given.served_model_name = found


def run(given: Namespace, settings: Settings) -> int:
    """Answers the lines of ``given.input`` and returns the exit status: 0 when every line has its record.

    130 and 143 tell that Ctrl-C or SIGTERM ended it, 1 that it could not go on.
    """
    signals = Signals()
    try:
        with signals:
            lines, ledger = _open(given, settings)
            try:
                if ledger.done < lines:
                    _answer(given, settings, lines, ledger, signals)
            finally:
                ledger.close()
    except EngineStopped as error:
        print(f"foveate: {error}; the same command goes on where it was", file=sys.stderr)
        return 1
    except Damaged as error:
        print(f"foveate: {error}. Delete it, and begin anew with --restart", file=sys.stderr)
        return 1
    except CannotResume as error:
        print(f"foveate: {error}. --restart begins anew and throws away what is done", file=sys.stderr)
        return 1
    except BatchError as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped; what is done is kept. To go on, run again: {_again(given)}", file=sys.stderr)
        return signals.status
    where = given.output if given.errors is None else given.errors
    failed = f", {ledger.failed} of them with an error: see {where}" if ledger.failed else ""
    print(f"{lines} lines are done{failed}. Answers: {given.output}", file=sys.stderr)
    return 0


class Signals:
    """Ctrl-C and SIGTERM as ``KeyboardInterrupt``, and, while an event loop runs, as an event.

    Attributes:
        status: Exit status for the signal that came.
    """

    _CAUGHT = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.status = 0

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._interrupt) for number in self._CAUGHT}

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def stopping(self, stop: asyncio.Event) -> Iterator[None]:
        """The first signal sets ``stop``; the next interrupts."""
        loop = asyncio.get_running_loop()

        def first(number: int) -> None:
            self.status = 128 + number
            for caught in self._CAUGHT:
                signal.signal(caught, self._interrupt)
            stop.set()

        try:
            for caught in self._CAUGHT:
                loop.add_signal_handler(caught, first, caught)
            yield
        finally:
            for caught in self._CAUGHT:
                loop.remove_signal_handler(caught)
                signal.signal(caught, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.status = 128 + number
        raise KeyboardInterrupt


def _open(given: Namespace, settings: Settings) -> tuple[int, Ledger]:
    """Number of lines, and the ledger of this batch.

    Raises:
        BatchError: a file cannot be used, or the last run had another input or model.
    """
    output: Path = given.output
    state = output.parent / (output.name + STATE_SUFFIX)
    with open_input(given.input):
        pass
    written = {"output": output, "file of errors": given.errors, "state file beside the output": state}
    for what, path in written.items():
        if path is not None and same_file(path, given.input):
            raise BatchError(f"the {what} must be another file than the input")
    try:
        found = scan(given.input, settings.max_body_bytes)
    except OSError as error:
        raise BatchError(f"cannot read {given.input}: {error.strerror}") from None
    errors = "among the answers" if given.errors is None else os.path.relpath(given.errors, output.parent)
    name = settings.served_model_name or os.path.basename(os.path.normpath(settings.model))
    facts = {"input": f"sha256 {found.sha256}", "model": name, "place of error records": errors}
    return found.lines, Ledger(state, output, given.errors, facts, given.restart)


def _answer(given: Namespace, settings: Settings, lines: int, ledger: Ledger, signals: Signals) -> None:
    """Answers what is not done.

    Raises:
        BatchError: it cannot go on.
        KeyboardInterrupt: it was told to stop.
    """
    from ..engine import Engine

    try:
        engine = Engine.load(EngineOptions.of(settings))
    except Exception as error:  # whatever is wrong with a model, its loader says it best
        raise BatchError(f"cannot load {settings.model}: {error}") from error
    try:
        ledger.require(engine.identity)
        asyncio.run(_run(given, settings, engine, lines, ledger, signals))
    finally:
        engine.shutdown(0)


async def _run(
    given: Namespace, settings: Settings, engine: EngineLike, lines: int, ledger: Ledger, signals: Signals
) -> None:
    state = ServerState(settings)
    state.serve(engine)
    stop = asyncio.Event()
    with (
        signals.stopping(stop),
        open_input(given.input) as file,
        ThreadPoolExecutor(1, thread_name_prefix="foveate-batch") as threads,
        tqdm(total=lines, initial=ledger.done, desc=given.input.name, unit=" lines", mininterval=0.5) as bar,
    ):
        before = os.fstat(file.fileno())

        def show(count: int) -> None:
            bar.set_postfix_str(f"{ledger.failed} errors", refresh=False)
            bar.update(count)

        source = Source(file, ledger, ENDPOINTS.keys(), settings.max_body_bytes)
        runner = BatchRunner(state, source, ledger, "", threads, lambda: settings.batch_in_flight, show)
        try:
            finished = await runner.run(stop)
        finally:
            state.text.close()
        after = os.fstat(file.fileno())
    if not finished:
        raise KeyboardInterrupt
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or ledger.done != lines:
        raise BatchError("the input was changed while it was read; run again with --restart")


def _first_model(file: BinaryIO, max_bytes: int) -> str | None:
    for line in islice(read_lines(file, max_bytes), _LOOKED_AT):
        try:
            model = parse_line(line, ENDPOINTS.keys()).body.get("model")
        except LineError:
            continue
        if isinstance(model, str) and model:
            return model
    return None


def _again(given: Namespace) -> str:
    """The command that was given, but for ``--restart``, which would not go on."""
    return shlex.join(["foveate", *(argument for argument in given.command_line if argument != "--restart")])
