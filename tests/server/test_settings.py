"""Settings from flags, variables and code; flags come from the fields."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from foveate.server.cli import build_parser, main, read_settings
from foveate.server.options import EngineOptions
from foveate.server.settings import ENGINE_FIELDS, Settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith("FOVEATE_"):
            monkeypatch.delenv(name)


def parse(*arguments):
    parser = build_parser()
    return read_settings(parser.parse_args(["serve", *arguments]), parser)


def test_defaults():
    settings = parse("m")
    assert settings.model == "m"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.max_body_bytes, settings.max_header_bytes) == (16 * 2**20, 32 * 2**10)
    assert (settings.max_sequences, settings.max_messages, settings.drain_seconds) == (64, 2048, 30)
    assert (settings.trust_remote_code, settings.prefix_reuse, settings.attention) == (False, True, None)


def test_every_field_is_a_documented_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["serve", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert name == "model" or f"--{name.replace('_', '-')}" in text
        assert " ".join(field.description.split()) in text


def test_flags():
    settings = parse("m", "--port", "0", "--no-prefix-reuse", "--dtype", "float32", "--kv-cache-gib", "0.5")
    assert (settings.port, settings.prefix_reuse, settings.dtype, settings.kv_cache_gib) == (0, False, "float32", 0.5)
    assert settings.page_size is None


def test_a_flag_wins_over_a_variable(monkeypatch):
    monkeypatch.setenv("FOVEATE_PORT", "9000")
    monkeypatch.setenv("FOVEATE_MODEL", "from-variable")
    monkeypatch.setenv("FOVEATE_MAX_CONTEXT", "77")
    assert (parse().port, parse().model, parse().max_context) == (9000, "from-variable", 77)
    assert (parse("m", "--port", "1").port, parse("m").model) == (1, "m")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("streaming", {"scheme": "streaming"}),
        ('{"scheme": "streaming", "budget_tokens": 64}', {"scheme": "streaming", "budget_tokens": 64}),
        (
            '{"scheme": "composed", "prefill": {"scheme": "xattention", "tau": 0.8}, "decode": "quest"}',
            {"scheme": "composed", "prefill": {"scheme": "xattention", "tau": 0.8}, "decode": "quest"},
        ),
    ],
)
def test_attention_by_name_or_json(monkeypatch, text, expected):
    assert parse("m", "--attention", text).attention == expected
    monkeypatch.setenv("FOVEATE_ATTENTION", text)
    assert parse("m").attention == expected


def test_keys(monkeypatch):
    def keys(settings):
        return [key.get_secret_value() for key in settings.api_key]

    assert keys(parse("m", "--api-key", "a", "--api-key", "b")) == ["a", "b"]
    monkeypatch.setenv("FOVEATE_API_KEY", "c, d")
    settings = parse("m")
    assert keys(settings) == ["c", "d"]
    assert "'c'" not in repr(settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m", "--port", "70000"], "--port: "),
        (["m", "--port", "x"], "--port: "),
        (["m", "--page-size", "48"], "--page-size: must be 16, 32, 64 or 128"),
        (["m", "--kv-cache-gib", "nan"], "--kv-cache-gib: "),
        (["m", "--attention", "{bad"], "--attention: not a scheme's name and not valid JSON"),
        (["m", "--attention", '{"a": 1} x'], "--attention: "),
        (["m", "--attention", "nosuch"], "--attention: unknown attention scheme 'nosuch'; there are: dense, "),
        (["m", "--attention", '{"scheme": [1]}'], "--attention: unknown attention scheme [1]"),
        (
            ["m", "--attention", '{"scheme": "streaming", "budget": 3}'],
            "--attention: unknown option budget; there are: ",
        ),
        (["m", "--attention", '{"sink_tokens": -1}'], "--attention: sink_tokens must be a whole number >= 0, got -1"),
        (["m", "--profile", "/nope"], "--profile: there is no file /nope"),
        (["m", "--api-key", ""], "--api-key: an API key must not be empty"),
        (["m", "--api-key", "a", "--api-key", "\udcff"], "--api-key: an API key must be UTF-8 text"),
        (["m", "--admin-key", "\udcff"], "--admin-key: an API key must be UTF-8 text"),
        (["m", "--host", "a..b"], "--host: 'a..b' is no name of a host"),
        (["m", "--host", "\udcff"], "--host: '\\udcff' is no name of a host"),
        (["m", "--host", "a" * 64], "is no name of a host"),
        (["m", "--max-batch-tokens", "0"], "--max-batch-tokens: "),
        (["m", "--stall-seconds", "1"], "--stall-seconds: "),  # an idle engine gives a sign of life once a second
        (["m", "--dtype", "int8"], "invalid choice"),
        ([], "name a MODEL"),
        (["--page-size", "48"], "--page-size: must be"),
        (["m", "--nosuch"], "unrecognized arguments"),
    ],
)
def test_wrong_flags_are_named(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        parse(*arguments)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError, match="nosuch"):
        Settings(model="m", nosuch=1)


def test_settings_make_engine_options():
    options = EngineOptions.of(Settings(model="m", attention="streaming", page_size=16))
    assert (options.model, options.attention, options.page_size) == ("m", {"scheme": "streaming"}, 16)
    for name in ENGINE_FIELDS:
        assert getattr(EngineOptions("m"), name) == Settings.model_fields[name].default


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("calibrate", ["calibrate", "m", "--scheme", "kascade", "-o", "profile"]),
        ("evaluation.run", ["eval", "m", "-o", "results"]),
        ("bench.latency", ["bench", "latency", "m"]),
        ("bench.throughput", ["bench", "throughput", "m"]),
    ],
)
def test_what_a_command_has_no_flag_for_is_not_taken_from_elsewhere(module, arguments, monkeypatch, tmp_path):
    told = {"max_context": 16, "attention": "streaming", "cache_dir": "/x", "max_queued_tokens": 1, "step_seconds": 9}
    file = tmp_path / "settings.toml"
    file.write_text('max_sequences = 1\ndevice = "cuda:7"\n')
    monkeypatch.setenv("FOVEATE_CONFIG", str(file))
    monkeypatch.setenv("FOVEATE_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("FOVEATE_DTYPE", "float16")
    for name, value in told.items():
        monkeypatch.setenv(f"FOVEATE_{name.upper()}", str(value))
    seen = []
    monkeypatch.setattr(f"foveate.server.{module}.run", lambda given, settings: seen.append(settings) or 0)
    assert main(arguments) == 0
    [settings] = seen
    for name in [*told, "port", "max_sequences", "kv_cache_gib"]:
        assert getattr(settings, name) == Settings.model_fields[name].default
    assert (settings.dtype, settings.device) == ("float16", "cuda:7"), "these are flags of it"


def test_profiles_add_up(tmp_path):
    files = [str(tmp_path / name) for name in "ab"]
    for file in files:
        open(file, "w").close()
    assert parse("m", "--profile", files[0], "--profile", files[1]).profile == tuple(files)
