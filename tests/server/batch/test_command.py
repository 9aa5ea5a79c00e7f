"""``foveate batch``: exit status, messages, resuming; kills and signals against the real process and a tiny model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from foveate.server import engine as engine_module
from foveate.server.cli import main

from ...bench import kill_batch
from .files import completion_line, read_records, write_lines


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FOVEATE_MODEL", raising=False)
    return tmp_path


@pytest.fixture
def loaded(engine, monkeypatch):
    """Settings of every engine that was loaded; the fake engine stands for them all."""
    seen = []

    def load(options):
        seen.append(options)
        engine.model_name = options.served_model_name or options.model
        return engine

    monkeypatch.setattr(engine_module.Engine, "load", staticmethod(load))
    monkeypatch.setattr(engine, "shutdown", lambda seconds: None)
    yield seen
    monkeypatch.undo()


def test_the_model_is_what_the_lines_name(folder, loaded, capsys):
    write_lines(folder / "in", [b"{", completion_line("a"), completion_line("b", model="other")])
    assert main(["batch", "in", "-o", "out"]) == 0
    assert [(options.model, options.served_model_name) for options in loaded] == [("fake-model", "fake-model")]
    by_id = {record["custom_id"]: record for record in read_records(folder / "out")}
    assert by_id["a"]["response"]["status_code"] == 200
    assert by_id["b"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert by_id[None]["error"]["code"] == "invalid_json"
    assert "3 lines are done, 2 of them with an error: see out. Answers: out" in capsys.readouterr().err


def test_error_records_in_a_file_of_their_own(folder, loaded):
    write_lines(folder / "in", [completion_line("a"), completion_line("b", temperature=9)])
    assert main(["batch", "in", "-o", "out", "--errors", "err", "--model", "fake-model"]) == 0
    assert [record["custom_id"] for record in read_records(folder / "out")] == ["a"]
    assert [record["custom_id"] for record in read_records(folder / "err")] == ["b"]


def test_a_second_run_loads_no_model(folder, loaded, capsys):
    write_lines(folder / "in", [completion_line("a")])
    for _ in range(2):
        assert main(["batch", "in", "-o", "out", "--model", "fake-model"]) == 0
    assert len(loaded) == 1
    assert len(read_records(folder / "out")) == 1


def test_no_model_anywhere(folder, loaded, capsys):
    write_lines(folder / "in", [completion_line("a", model=None)])
    with pytest.raises(SystemExit) as ended:
        main(["batch", "in", "-o", "out"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        "foveate batch: error: none of the first 1000 lines names a model: give --model (or set FOVEATE_MODEL)"
    )


@pytest.fixture
def begun(folder, loaded, engine, capsys):
    """A run that ended after its first lines, because the engine did."""
    write_lines(folder / "in", [completion_line(str(number)) for number in range(9)])
    engine.script = "xy"

    def submit(*requests, take=engine.submit):
        if len(engine.requests) == 4:
            engine.state = "dead"
        take(*requests)

    engine.submit = submit
    assert main(["batch", "in", "-o", "out", "--model", "fake-model", "--batch-in-flight", "2"]) == 1
    assert "the engine has stopped; the same command goes on" in capsys.readouterr().err
    engine.state = "ready"
    assert 0 < len(read_records(folder / "out")) < 9
    return folder


def test_the_next_run_goes_on(begun):
    assert main(["batch", "in", "-o", "out", "--model", "fake-model"]) == 0
    assert sorted(record["custom_id"] for record in read_records(begun / "out")) == list("012345678")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder, engine: write_lines(folder / "in", [completion_line("x")] * 9), "the input has changed"),
        (lambda folder, engine: engine.identity.update(weights="4567"), "the weights has changed"),
        (lambda folder, engine: (folder / "out").write_bytes(b""), "out has changed"),
        (lambda folder, engine: (folder / "out").unlink(), "out has changed"),
    ],
    ids=["input", "weights", "output", "no-output"],
)
def test_what_has_changed_is_refused(begun, engine, capsys, change, said):
    engine.identity = dict(engine.identity)
    change(begun, engine)
    before = (begun / "out").read_bytes() if (begun / "out").exists() else None
    assert main(["batch", "in", "-o", "out", "--model", "fake-model"]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "--restart" in told
    if before is not None:
        assert (begun / "out").read_bytes() == before
    assert main(["batch", "in", "-o", "out", "--model", "fake-model", "--restart"]) == 0
    assert len(read_records(begun / "out")) == 9


def test_a_damaged_state_file_is_told_with_the_way_out(begun, capsys):
    state = begun / "out.state"
    state.write_bytes(bytes(4096))
    command = ["batch", "in", "-o", "out", "--model", "fake-model", "--restart"]
    assert main(command) == 1
    assert "file is not a database. Delete it, and begin anew with --restart" in capsys.readouterr().err
    state.unlink()
    assert main(command) == 0
    assert len(read_records(begun / "out")) == 9


def test_another_model_or_place_is_refused(begun, capsys):
    assert main(["batch", "in", "-o", "out", "--model", "other"]) == 1
    assert "the model has changed since the last run, which had fake-model; now it is other" in capsys.readouterr().err
    assert main(["batch", "in", "-o", "out", "--model", "fake-model", "--errors", "err"]) == 1
    assert "the place of error records has changed" in capsys.readouterr().err
    assert not (begun / "err").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none", "-o", "out"], "cannot read none: No such file"),
        ([".", "-o", "out"], "not a plain file"),
        (["in", "-o", "in"], "another file than the input"),
        (["in", "-o", "none/out"], "cannot open none/out.state: No such file"),
        (["in", "-o", "out", "--errors", "out"], "the same file"),
        (["in", "-o", "/dev/null"], "not a plain file"),
        (["in", "-o", "."], "not a plain file"),
        (["in", "-o", "taken"], "taken exists"),
    ],
    ids=["no-input", "folder", "input-is-output", "no-folder", "errors-are-output", "device", "output-folder", "taken"],
)
def test_places_that_cannot_be_used(folder, loaded, capsys, arguments, said):
    write_lines(folder / "in", [completion_line("a")])
    (folder / "taken").write_text("mine")
    assert main(["batch", *arguments, "--model", "fake-model"]) == 1
    assert said in capsys.readouterr().err
    assert loaded == []
    assert (folder / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "link"],
        ["-o", "out", "--errors", "in"],
        ["-o", "out", "--errors", "link"],
        ["-o", "out", "--errors", "./out"],
        ["-o", "old", "--errors", "same"],
        ["-o", "old", "--errors", "old.state"],
        ["-o", "old", "--errors", "state"],
    ],
    ids=" ".join,
)
def test_a_restart_empties_no_file_that_has_another_use(folder, loaded, capsys, arguments):
    write_lines(folder / "in", [completion_line("a")])
    assert main(["batch", "in", "-o", "old", "--model", "fake-model"]) == 0
    for name, file in (("link", "in"), ("same", "old"), ("state", "old.state")):
        (folder / name).hardlink_to(folder / file)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["batch", "in", *arguments, "--model", "fake-model", "--restart"]) == 1
    assert re.search("another file than|the same file|the state file", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_input_that_is_missing_is_said_where_it_would_name_the_model(folder, loaded, capsys):
    assert main(["batch", "none", "-o", "out"]) == 1
    assert capsys.readouterr().err == "foveate: cannot read none: No such file or directory\n"


def test_a_wrong_file_of_settings_is_said_in_one_line(folder, loaded, capsys, monkeypatch):
    write_lines(folder / "in", [completion_line("a")])
    monkeypatch.setenv("FOVEATE_CONFIG", "/nope.toml")
    with pytest.raises(SystemExit) as ended:
        main(["batch", "in", "-o", "out"])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "foveate batch: error: cannot read /nope.toml: No such file or directory"


def test_an_empty_input_is_done(folder, loaded, capsys):
    (folder / "in").write_bytes(b"\n\n")
    assert main(["batch", "in", "-o", "out", "--model", "fake-model"]) == 0
    assert "0 lines are done" in capsys.readouterr().err


def test_a_model_that_does_not_load_can_be_named_rightly_next(folder, monkeypatch, capsys, loaded, engine):
    write_lines(folder / "in", [completion_line("a", model="right")])

    def fail(options):
        raise OSError("no such model")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module.Engine, "load", staticmethod(fail))
        assert main(["batch", "in", "-o", "out", "--model", "wrong"]) == 1
    assert "cannot load wrong: no such model" in capsys.readouterr().err
    assert main(["batch", "in", "-o", "out", "--model", "right"]) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"])
def test_a_signal_ends_it_cleanly(folder, loaded, engine, capsys, number, status):
    write_lines(folder / "in", [completion_line(str(number)) for number in range(20)])
    engine.script = "xy"

    def submit(*requests, take=engine.submit):
        if len(engine.requests) == 9:
            os.kill(os.getpid(), number)
            engine.gate.clear()
        take(*requests)

    command = ["batch", "in", "-o", "out", "--model", "fake-model", "--batch-in-flight", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "submit", submit)
        handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
        assert main([*command, "--restart"]) == status
        assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    assert f"To go on, run again: foveate {' '.join(command)}\n" in capsys.readouterr().err
    assert engine.pages_used == 0
    done = len(read_records(folder / "out"))
    assert 0 < done < 20
    engine.gate.set()
    assert main(command) == 0
    assert len(read_records(folder / "out")) == 20


def test_kills_lose_and_double_nothing(model_dir):
    """The smaller version of what CONTRIBUTING.md names; in a process of its own, since it forks."""
    command = [sys.executable, kill_batch.__file__, "--fork", "--model", model_dir, "--lines", "150", "--kills", "3"]
    done = subprocess.run(
        [*command, "--seconds", "0.05", "--in-flight", "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 records, 0 lost, 0 duplicated" in done.stdout


def test_ctrl_c_while_the_model_is_loaded(folder, model_dir):
    write_lines(folder / "in", [completion_line("a")])
    command = [sys.executable, "-m", "foveate.server", "batch", "in", "-o", "out", "--model", model_dir]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "out").exists():
            time.sleep(0.005)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "To go on" in said
    assert "Traceback" not in said
