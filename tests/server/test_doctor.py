"""The doctor's report and exit code."""

from __future__ import annotations

import pytest
import torch

from foveate.patches import verify as verify_module
from foveate.server import doctor


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(doctor, "GEMM_SIZE", 32)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from tokenizers import Tokenizer, models
    from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("granite")
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    GraniteForCausalLM(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(number): number for number in range(50)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="1").save_pretrained(path)
    return str(path)


def test_machine_report(small, capsys):
    assert doctor.run(None) == 0
    printed = capsys.readouterr().out
    for name in ("python:", "torch:", "transformers:", "triton:", "flashinfer-python:", "cores:", "memory:", "cpu:"):
        assert name in printed
    assert "GFLOP/s" in printed
    assert "GOPS on cpu" in printed


def test_an_instruction_set_that_this_machine_lacks_is_told(monkeypatch, capsys):
    def library():
        raise ValueError("FOVEATE_CPU_ISA=nosuch: this machine has avx2")

    monkeypatch.setattr(doctor.native, "library", library)
    assert doctor.run(None) == 1
    assert capsys.readouterr().out == "FOVEATE_CPU_ISA=nosuch: this machine has avx2\n"


def test_sound_model(small, model_dir, capsys):
    assert doctor.run(model_dir) == 0
    printed = capsys.readouterr().out
    assert "2 heads over 1 KV heads of 16" in printed
    assert "granite in float32: passed" in printed


def test_model_that_differs(small, model_dir, capsys, monkeypatch):
    loaded = doctor.load(doctor.EngineOptions(model=model_dir, dtype="float32"))
    monkeypatch.setattr(doctor, "load", lambda options: loaded)
    monkeypatch.setattr(verify_module, "_difference", lambda ours, stock: float("inf"))
    assert doctor.run(model_dir) == 1
    assert "FAILED" in capsys.readouterr().out


def test_model_that_cannot_be_loaded(small, tmp_path, capsys):
    assert doctor.run(str(tmp_path)) == 1
    assert "cannot be served" in capsys.readouterr().out


def test_a_directory_that_is_missing_is_said(small, tmp_path, capsys):
    missing = tmp_path / "nope"
    assert doctor.run(str(missing)) == 1
    assert f"{missing} cannot be served: there is no directory {missing}; " in capsys.readouterr().out
