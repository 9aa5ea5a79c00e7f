"""--config: TOML and YAML; a flag wins over a variable, that over the file, that over the default; one-line errors."""

from __future__ import annotations

import os

import pytest

from foveate.server.cli import build_parser, read_settings
from foveate.server.settings import Settings
from foveate.server.settings_operation import unknown_variables

TOML = """
model = "from-file"
port = 9000
max_context = 77
api_key = ["a", "b"]
cors_origin = ["https://a.example"]
audit_rate = 0.5
prefix_reuse = false

[attention]
scheme = "streaming"
budget_tokens = 64
"""
YAML = """
model: from-file
port: 9000
max_context: 77
api_key: [a, b]
cors_origin: [https://a.example]
audit_rate: 0.5
prefix_reuse: false
attention: {scheme: streaming, budget_tokens: 64}
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("FOVEATE_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file_of(tmp_path):
    def write(content, name="foveate.toml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def parse(*arguments):
    parser = build_parser()
    return read_settings(parser.parse_args(["serve", *arguments]), parser)


@pytest.mark.parametrize(("content", "name"), [(TOML, "f.toml"), (YAML, "f.yaml"), (YAML, "f.YML")])
def test_a_file_of_each_kind(file_of, content, name):
    settings = parse("--config", file_of(content, name))
    assert (settings.model, settings.port, settings.max_context) == ("from-file", 9000, 77)
    assert [key.get_secret_value() for key in settings.api_key] == ["a", "b"]
    assert settings.attention == {"scheme": "streaming", "budget_tokens": 64}
    assert (settings.cors_origin, settings.audit_rate, settings.prefix_reuse) == (("https://a.example",), 0.5, False)
    assert settings.max_running == Settings.model_fields["max_running"].default


def test_flag_over_variable_over_file_over_default(file_of, monkeypatch):
    path = file_of("port = 1\nmax_running = 1\nmax_messages = 1\n")
    monkeypatch.setenv("FOVEATE_PORT", "2")
    monkeypatch.setenv("FOVEATE_MAX_RUNNING", "2")
    settings = parse("m", "--config", path, "--port", "3")
    assert (settings.port, settings.max_running, settings.max_messages) == (3, 2, 1)
    assert settings.max_sequences == 64


def test_the_file_may_be_a_variable(file_of, monkeypatch):
    monkeypatch.setenv("FOVEATE_CONFIG", file_of(TOML))
    assert parse().max_context == 77
    assert parse("--config", file_of("model = 'other'", "g.toml")).max_context is None


@pytest.mark.parametrize("content", ["", "# nothing\n"])
def test_an_empty_file_says_nothing(file_of, content):
    assert parse("m", "--config", file_of(content)).port == 8000
    assert parse("m", "--config", file_of(content, "f.yaml")).port == 8000


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("nosuch = 1", "f.toml", "there is no setting 'nosuch'"),
        ("max-context = 1", "f.toml", "there is no setting 'max-context'; is it 'max_context'?"),
        ("max_contxt: 1", "f.yaml", "there is no setting 'max_contxt'; is it 'max_context'?"),
        ("config = 'x.toml'", "f.toml", "there is no setting 'config'"),
        ("[serve]\nport = 1", "f.toml", "there is no setting 'serve'"),
        ("port = ", "f.toml", "Invalid value"),
        ("port: [1", "f.yaml", "expected ',' or ']'"),
        ("- port\n- 1", "f.yaml", "f.yaml: "),
        ("just text", "f.yaml", "f.yaml: "),
        ("1: 2", "f.yaml", "f.yaml: "),
        (b"\xff\xfe", "f.toml", "can't decode"),
        (b"\xff\xfe\x00", "f.yaml", "f.yaml: "),
        ("!!python/object/apply:os.system ['echo']", "f.yaml", "could not determine a constructor"),
        ("port = 1", "f.json", "the name must end in .toml, .yaml, .yml"),
        ("port = 70000", "f.toml", "f.toml: port: "),
        ("port = 'x'", "f.toml", "f.toml: port: "),
        ("attention = 'nosuch'", "f.toml", "f.toml: attention: unknown attention scheme 'nosuch'"),
        ("port: null", "f.yaml", "f.yaml: port: "),
        (None, "f.toml", "cannot read"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(file_of, tmp_path, capsys, content, name, words):
    path = file_of(content, name) if content is not None else str(tmp_path / name)
    with pytest.raises(SystemExit) as end:
        parse("m", "--config", path)
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("foveate: error: ")
    assert words in line
    assert name in line


def test_a_directory_is_no_file(tmp_path, capsys):
    folder = tmp_path / "f.toml"
    folder.mkdir()
    with pytest.raises(SystemExit):
        parse("m", "--config", str(folder))
    assert "cannot read" in capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_variable_is_named(monkeypatch, capsys):
    """Kubernetes sets FOVEATE_PORT=tcp://... for a service called foveate."""
    monkeypatch.setenv("FOVEATE_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(SystemExit):
        parse("m")
    assert "error: FOVEATE_PORT: " in capsys.readouterr().err


def test_a_wrong_flag_is_named_beside_a_file(file_of, capsys):
    with pytest.raises(SystemExit):
        parse("m", "--config", file_of("port = 1"), "--port", "x")
    assert "error: --port: " in capsys.readouterr().err


def test_variables_that_are_no_settings(monkeypatch):
    monkeypatch.setenv("FOVEATE_MAX_CONTEXXT", "1")
    monkeypatch.setenv("FOVEATE_PORT", "1")
    monkeypatch.setenv("FOVEATE_CPU_ISA", "avx2")
    assert unknown_variables(set(Settings.model_fields)) == ["FOVEATE_MAX_CONTEXXT"]
