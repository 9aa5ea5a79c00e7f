"""The public names: few, listed, and free until they are used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import foveate

PUBLIC = ["LLM", "SamplingParams", "__version__", "attach"]


def test_all_lists_the_public_names():
    assert sorted(foveate.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(foveate))


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("LLM", "foveate.server.llm"),
        ("SamplingParams", "foveate.server.request"),
        ("attach", "foveate.patches.attach"),
    ],
)
def test_public_name_is_the_one_at_its_home(name, home):
    assert getattr(foveate, name).__module__ == home
    assert getattr(foveate, name) is getattr(sys.modules[home], name)


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="has no attribute 'Llm'"):
        _ = foveate.Llm


def test_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert foveate.__version__ == version("foveate")


def test_import_loads_nothing_heavy():
    code = "import sys, json; before = set(sys.modules); import foveate; dir(foveate); foveate.__version__; "
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "foveate" in loaded
    assert loaded <= {"foveate", *sys.stdlib_module_names}
