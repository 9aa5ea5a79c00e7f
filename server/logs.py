"""The log: text or one JSON object per line, with the id of the request that a line is about, and never a prompt.

What a client sends may appear in a line (a path, its request id); control characters in it are escaped, so that it
can neither begin a line of its own nor command a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from types import TracebackType
from typing import Any, Literal, TextIO

from .current_request import CURRENT

LogFormat = Literal["text", "json"]

FIELDS = "fields"  # `log.info(..., extra={FIELDS: {...}})`: members of the JSON object, words after the text

_log = logging.getLogger(__name__)

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_PLAIN = re.compile(r"[\w.:/-]+", re.ASCII)
# Libraries that bring handlers of their own, which would write text between the JSON.
_LIBRARIES = ("transformers", "huggingface_hub", "torch")


def configure(level: str, form: LogFormat, stream: TextIO | None = None) -> None:
    """Sends the whole process's log to ``stream`` (stderr) in the given form.

    Args:
        level: The least level that is shown, such as ``info``.
        form: ``text`` for people, ``json`` for machines: then warnings, other libraries and what ends a thread or
            the process speak JSON too.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    if form == "json":
        logging.captureWarnings(True)
        adopt_libraries()
        sys.excepthook = _log_end_of_process
        threading.excepthook = _log_end_of_thread


def adopt_libraries() -> None:
    """Takes away the handlers of libraries that have their own; called again after one was imported."""
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


def _log_end_of_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _log.critical("an exception ended the process", exc_info=(kind, error, trace))


def _log_end_of_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is None or isinstance(args.exc_value, SystemExit):
        return
    name = args.thread.name if args.thread else "unknown"
    _log.error("an exception ended thread %s", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ``time``, ``level``, ``logger``, ``message``, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _fields(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        # ASCII: escapes every control character and line end that Unicode has.
        return json.dumps(entry, default=str, separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """``LEVEL logger: message name=value ...``, and below it, indented, what an exception has to say."""

    def format(self, record: logging.LogRecord) -> str:
        words = [f"{name}={_word(value)}" for name, value in _fields(record).items()]
        line = " ".join([f"{record.levelname} {record.name}: {escape(record.getMessage())}", *words])
        if record.exc_info:
            line += "\n" + _indented(self.formatException(record.exc_info))
        if record.stack_info:
            line += "\n" + _indented(self.formatStack(record.stack_info))
        return line


def escape(text: str) -> str:
    """``text`` on one line, with nothing in it that a terminal obeys."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    current = CURRENT.get()
    fields: dict[str, Any] = {} if current is None else {"request_id": current.label}
    return fields | getattr(record, FIELDS, {})


def _word(value: object) -> str:
    """A value that cannot pass for two: quoted unless it is one plain word."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _indented(text: str) -> str:
    # Lines of ours never begin with a blank, so a line inside an exception's text cannot pass for one.
    return "\n".join("    " + escape(line) for line in text.splitlines())


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
