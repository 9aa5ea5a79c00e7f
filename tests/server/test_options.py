"""What an engine is made from is checked before anything is loaded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from foveate.server.options import EngineOptions
from foveate.server.settings import Settings

WRONG = [
    ({"kv_dtype": "int4"}, "kv_dtype: .*'auto' or 'int8', got 'int4'"),
    ({"kv_dtype": "float16"}, "kv_dtype: .*'auto' or 'int8', got 'float16'"),
    ({"dtype": "foo"}, "dtype: .*'float32', 'bfloat16' or 'float16', got 'foo'"),
    ({"dtype": torch.float32}, r"dtype: .*, got torch\.float32"),
    ({"quantization": None}, "quantization: .*'none', "),
    ({"page_size": 0}, "page_size: must be 16, 32, 64 or 128"),
    ({"max_context": 0}, "max_context: .*greater than or equal to 1, got 0"),
    ({"max_batch_tokens": 0}, "max_batch_tokens: .*greater than or equal to 1, got 0"),
    ({"max_running": 0}, "max_running: .*greater than or equal to 1, got 0"),
    ({"step_seconds": 0}, "step_seconds: .*greater than 0"),
    ({"kv_cache_gib": float("nan")}, "kv_cache_gib: .*finite"),
    ({"audit_rate": 2}, "audit_rate: .*less than or equal to 1, got 2"),
    ({"attention": "nosuch"}, "attention: unknown attention scheme 'nosuch'; there are: dense, "),
    ({"profile": "/nowhere"}, "profile: there is no file /nowhere"),
    ({"profile": [Path("/nowhere")]}, "profile: there is no file /nowhere"),
    ({"cache_dir": ""}, "cache_dir: "),
    ({"max_running": 0, "dtype": "foo"}, "dtype: .*; max_running: "),
]


@pytest.mark.parametrize(
    ("options", "words"),
    WRONG,
    ids=[", ".join(f"{name}={value}" for name, value in options.items()) for options, _ in WRONG],
)
def test_wrong_values_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        EngineOptions("no-such-model", **options)


def test_a_model_has_a_name():
    with pytest.raises(ValueError, match="model: "):
        EngineOptions("")


def test_names_and_paths_stand_for_lists(tmp_path):
    profile = tmp_path / "a,b.safetensors"
    profile.touch()
    for given in (profile, str(profile), [profile], (str(profile),)):
        options = EngineOptions("m", profile=given, attention="streaming", cache_dir=tmp_path)
        assert options.profile == (str(profile),)
        assert options.attention == {"scheme": "streaming"}
        assert options.cache_dir == str(tmp_path)


def test_variables_are_the_servers(monkeypatch):
    monkeypatch.setenv("FOVEATE_MAX_RUNNING", "3")
    monkeypatch.setenv("FOVEATE_CONFIG", "/nowhere.toml")
    assert EngineOptions("m").max_running == 256


def test_every_option_is_a_setting_of_the_same_default():
    for item in fields(EngineOptions):
        assert (
            item.name == "model" or getattr(EngineOptions("m"), item.name) == Settings.model_fields[item.name].default
        )
