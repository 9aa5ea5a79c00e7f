"""A new scheme is one file and one line in the registry: nothing else has to know it, and everything finds it."""

from __future__ import annotations

import sys

import pytest
import torch

from foveate import LLM, SamplingParams
from foveate.server import cli
from foveate.server.engine import Engine
from foveate.server.options import EngineOptions
from foveate.server.settings import Settings
from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.protocol import Phase

from ..sparse_attn.test_schemes import World, close

FILE = '''
"""Every other page."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate.sparse_attn import budget
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.ops.topk import units_of
from foveate.sparse_attn.protocol import Phase, Scheme, SchemeOptions
from foveate.sparse_attn.selection import Selection


@dataclass(frozen=True, slots=True)
class ToyOptions(SchemeOptions):
    every: int = 2

    def __post_init__(self):
        SchemeOptions.__post_init__(self)
        if self.every < 1:
            raise SchemeConfigError(f"every must be at least 1, got {self.every}")


class Toy(Scheme):
    name: ClassVar[str] = "toy"
    source: ClassVar[str] = "a test"
    Options: ClassVar[type[SchemeOptions]] = ToyOptions
    same_in_decode: ClassVar[bool] = False
    tile = 16

    def _select(self, view, tiles, phase):
        first, end = budget.free_units(tiles, self, 16, phase)
        page = torch.arange(view.rows.block_tables.shape[1])
        chosen = (page >= first[:, None]) & (page < end[:, None]) & (page % self.options.every == 0)
        return Selection(*units_of(chosen[:, None].expand(-1, view.num_kv_heads, -1)), 16, tiles)

    def select_prefill(self, query, view, tiles, layer):
        return self._select(view, tiles, Phase.PREFILL)

    def select_decode(self, query, view, tiles, layer):
        return self._select(view, tiles, Phase.DECODE)
'''


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """The file, and its line."""
    (tmp_path / "toy_scheme_of_a_test.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._SCHEMES, "toy", "toy_scheme_of_a_test:Toy")
    yield
    sys.modules.pop("toy_scheme_of_a_test", None)


def test_registry():
    assert "toy" in registry.names()
    (entry,) = [entry for entry in registry.describe() if entry["name"] == "toy"]
    assert entry["options"]["every"] == 2
    assert registry.build("toy", every=3).options.every == 3
    with pytest.raises(SchemeConfigError, match="every must be"):
        registry.build("toy", every=0)


def test_attend_reads_what_it_chooses():
    world = World([100], registry.build("toy"))
    outputs, step = world.run([(0, 100)])
    # A query on page p reads pages 0, 2, .. below p, and its own page up to itself.
    read = sum((i // 16 + 1) // 2 * 16 + i % 16 + 1 for i in range(100))
    assert step.keys_read[0].tolist() == [4 * read, 4 * sum(range(1, 101))]
    dense = World([100]).whole()[0]
    close(outputs[0][:16], dense[:16])
    assert (outputs[0][32:] - dense[32:]).abs().max() > 0.01
    close(World([100], registry.build("toy", every=1)).whole()[0], dense)


def test_as_a_part_of_another():
    scheme = registry.build("composed", prefill="dense", decode={"scheme": "toy", "every": 4})
    world = World([150], scheme)
    world.run([(0, 149)])
    _, step = world.run([(149, 150)], phase=Phase.DECODE)
    assert step.keys_read[0].tolist() == [4 * (3 * 16 + 6), 4 * 150]  # pages 0, 4, 8, and six keys of page 9


def test_http(client, engine):
    schemes = client.get("/v1/models").json()["data"][0]["attention"]["schemes"]
    assert {"name": "toy", "source": "a test"}.items() <= next(s for s in schemes if s["name"] == "toy").items()
    body = {"prompt": "Hi", "max_tokens": 2, "attention": {"scheme": "toy", "every": 3}}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["attention"]["scheme"] == "toy"
    assert engine.requests[0].scheme.options.every == 3
    for wrong, said in [({"every": 0}, "every must be"), ({"other": 1}, "every, sink_tokens")]:
        refused = client.post("/v1/completions", json=body | {"attention": {"scheme": "toy", **wrong}})
        assert refused.status_code == 400
        assert said in refused.json()["error"]["message"]


@pytest.mark.parametrize("command", ["serve", "generate", "eval"])
def test_command_line(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "toy" in capsys.readouterr().out.split("attention schemes:")[1]
    assert Settings(model="m", attention='{"scheme": "toy", "every": 3}').attention == {"scheme": "toy", "every": 3}


def test_engine(model_dir):
    options = EngineOptions(model_dir, dtype="float32", page_size=16, kv_cache_gib=0.02)
    prompt = torch.randint(256, (200,)).tolist()
    with LLM.over(Engine.load(options)) as llm:
        answers = {}
        for every in (1, 2):
            policy = {"scheme": "toy", "every": every}
            (answers[every],) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8), policy)
        (dense,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8))
    assert answers[1].token_ids == dense.token_ids
    assert answers[1].usage.keys_read_fraction == 1
    assert 0.5 < answers[2].usage.keys_read_fraction < 0.6
    assert answers[2].usage.scheme == "toy"


def test_eval(model_dir, tmp_path, capsys):
    command = ["eval", model_dir, "--dtype", "float32", "--tasks", "agreement", "--lengths", "256", "--samples", "1"]
    text = tmp_path / "text"
    text.write_text("A text of some length. " * 40)
    assert cli.main([*command, "--text", str(text), "--scheme", "toy", "-o", str(tmp_path / "out")]) == 0
    assert "toy" in capsys.readouterr().out
