"""The ledger: whatever ends a run, each line's record is in the files once or not at all, and whole."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.server.batch import ledger as ledger_module
from foveate.server.batch.entry import LineError
from foveate.server.batch.errors import BatchError, CannotResume, Damaged, InUse
from foveate.server.batch.ledger import Ledger
from foveate.server.batch.records import answered, unreadable
from foveate.sparse_attn import registry

from .files import read_records

FACTS = {"input": "sha256 0"}


class Killed(BaseException):
    """Stands for the end of the process."""


def opened(folder: Path, **options) -> Ledger:
    options = {"facts": FACTS, "errors": folder / "errors", **options}
    return Ledger(folder / "state", folder / "output", **options)


def result(number):
    if number % 3 == 0:
        return unreadable(number, LineError("code", "message", custom_id=str(number)))
    return answered(number, str(number), {"text": "x" * number})


def kill(ledger):
    """Drops what the process held; the operating system closes the files."""
    ledger._connection.close()
    for file in ledger._files:
        file._file.close()


@contextlib.contextmanager
def killed_at(step: int):
    """The process ends at the ``step``-th of: a write (half of it is done), a sync, the transaction."""
    left = [step]
    write = ledger_module._Appended.write

    def count():
        left[0] -= 1
        return left[0] < 0

    def writing(self, data):
        if data and count():
            self._file.write(data[: len(data) // 2])
            raise Killed
        write(self, data)

    def syncing(descriptor):
        if count():
            raise Killed

    class Transaction(ledger_module._Transaction):
        def __enter__(self):
            if count():
                raise Killed
            super().__enter__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module._Appended, "write", writing)
        patch.setattr(os, "fsync", syncing)
        patch.setattr(ledger_module, "_Transaction", Transaction)
        with contextlib.suppress(Killed):
            yield


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), max_size=8), st.booleans())
def test_a_kill_at_any_step_loses_and_doubles_nothing(groups, split):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        errors = folder / "errors" if split else None
        ledger = opened(folder, errors=errors)
        left = list(range(1, 1 + sum(size for size, _ in groups)))
        for size, step in groups:
            taken = [number for number in left if not ledger.is_done(number)][:size]
            with killed_at(step):
                ledger.add([result(number) for number in taken])
            kill(ledger)
            ledger = opened(folder, errors=errors)
        for number in left:
            assert ledger.has_id(str(number)) == ledger.is_done(number)
            if not ledger.is_done(number):
                ledger.add([result(number)])
        assert ledger.done == len(left)
        ledger.close()
        good, bad = read_records(folder / "output"), read_records(folder / "errors") if split else []
        assert sorted(int(record["custom_id"]) for record in good + bad) == left
        if split:
            assert all(record["error"] is None for record in good)
            assert all(record["error"] for record in bad)


def test_a_full_disk_keeps_what_was_done(tmp_path, monkeypatch):
    ledger = opened(tmp_path)
    ledger.add([result(1)])

    def full(self, data):
        self._file.write(data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module._Appended, "write", full)
        with pytest.raises(BatchError, match=r"No space left on device\. The 1 lines done are safe"):
            ledger.add([result(2)])
    assert len(read_records(tmp_path / "output")) == 1
    ledger.add([result(2)])
    ledger.close()
    assert len(read_records(tmp_path / "output")) == 2


def test_a_failed_transaction_takes_its_records_back(tmp_path):
    ledger = opened(tmp_path)
    ledger.add([result(1)])
    with pytest.raises(BatchError, match="UNIQUE"):
        ledger.add([result(2), result(1)])
    assert ledger.done == 1
    assert not ledger.is_done(2)
    ledger.close()
    assert [record["custom_id"] for record in read_records(tmp_path / "output")] == ["1"]


def test_an_id_has_one_record_on_whatever_lines_it_stands(tmp_path):
    ledger = opened(tmp_path)
    ledger.add([result(1)])
    with pytest.raises(BatchError, match="UNIQUE"):
        ledger.add([answered(2, "1", {"text": "again"})])
    # A line without an id of its own, or with an earlier line's, is a record all the same.
    ledger.add([unreadable(number, LineError("code", "message", custom_id=None)) for number in (2, 3)])
    assert (ledger.done, ledger.has_id("1")) == (3, True)
    ledger.close()
    assert [record["custom_id"] for record in read_records(tmp_path / "output")] == ["1"]
    assert len(read_records(tmp_path / "errors")) == 2


def test_one_process_at_a_time(tmp_path):
    ledger = opened(tmp_path)
    with pytest.raises(InUse, match="in use by another process"):
        opened(tmp_path)
    ledger.close()
    opened(tmp_path).close()


def test_changed_facts_are_named(tmp_path):
    opened(tmp_path, facts={"input": "sha256 1"}).close()
    ledger = opened(tmp_path)  # nothing was done yet
    ledger.require({"weights": "a"})
    ledger.add([result(1)])
    ledger.close()
    with pytest.raises(CannotResume, match=r"the input has changed .* had sha256 0; now it is sha256 1\. 1 lines are"):
        opened(tmp_path, facts={"input": "sha256 1"})
    ledger = opened(tmp_path)
    with pytest.raises(CannotResume, match="the weights has changed"):
        ledger.require({"weights": "b"})
    ledger.close()


def test_identities_are_told_as_people_read_them(tmp_path):
    ledger = opened(tmp_path)
    dense, streaming = registry.build("dense"), registry.build("streaming", budget_tokens=7)
    ledger.require({"attention": dense.identity})
    ledger.add([result(1)])
    with pytest.raises(CannotResume) as refused:
        ledger.require({"attention": streaming.identity})
    ledger.close()
    told = str(refused.value)
    assert told.isprintable()
    assert "Options" not in told
    assert "which had dense (sink_tokens=0, " in told
    assert "now it is streaming (sink_tokens=4, " in told
    assert "--restart" not in told, "a server has none"


@pytest.mark.parametrize(
    "damage",
    [lambda data: bytes(len(data)), lambda data: b"x" * 4096, lambda data: data[:4096] + b"x" * (len(data) - 4096)],
    ids=["zeroed", "text", "torn"],
)
def test_a_damaged_state_file_is_told_as_such(tmp_path, damage):
    ledger = opened(tmp_path)
    ledger.add([result(1)])
    ledger.close()
    state = tmp_path / "state"
    content = damage(state.read_bytes())
    state.write_bytes(content)
    for restart in (False, True):
        with pytest.raises(Damaged, match=r"cannot use .*state: "):
            opened(tmp_path, restart=restart)
    assert state.read_bytes() == content


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-3], lambda data: b"x" * len(data)])
def test_a_changed_output_is_refused_until_restart(tmp_path, damage):
    ledger = opened(tmp_path)
    ledger.add([result(1)])
    ledger.close()
    output = tmp_path / "output"
    output.write_bytes(damage(output.read_bytes()))
    with pytest.raises(CannotResume, match="has changed since the last run"):
        opened(tmp_path)
    ledger = opened(tmp_path, restart=True)
    assert (ledger.done, output.read_bytes()) == (0, b"")
    assert not ledger.is_done(1)
    ledger.close()


@pytest.mark.parametrize("begun", [False, True], ids=["at-first", "after-a-run-that-did-nothing"])
def test_a_file_of_someone_else_is_not_overwritten(tmp_path, begun):
    if begun:
        opened(tmp_path).close()
    (tmp_path / "output").write_text("mine")
    with pytest.raises(CannotResume, match="no batch that could go on left it"):
        opened(tmp_path)
    assert (tmp_path / "output").read_text() == "mine"
    opened(tmp_path, restart=True).close()
    assert (tmp_path / "output").read_text() == ""


def test_places_that_cannot_be_used(tmp_path):
    with pytest.raises(BatchError, match="cannot open"):
        Ledger(tmp_path / "none" / "state", tmp_path / "none" / "output", None, {})
    with pytest.raises(BatchError, match="not a plain file"):
        Ledger(tmp_path / "state", Path("/dev/null"), None, {})
    with pytest.raises(BatchError, match="the same file"):
        Ledger(tmp_path / "state", tmp_path / "output", tmp_path / "." / "output", {})
    (tmp_path / "state").write_text("no database, and longer than one hundred bytes" * 9)
    with pytest.raises(BatchError, match="not a database"):
        opened(tmp_path)


def test_the_state_is_for_its_owner_only(tmp_path):
    opened(tmp_path).close()
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0
    assert sqlite3.connect(tmp_path / "state").execute("PRAGMA integrity_check").fetchone() == ("ok",)
