"""What loading looks at before a model is served."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ViTConfig,
)

from foveate import LLM, SamplingParams
from foveate.patches.errors import UnsupportedModel
from foveate.patches.families import VERIFIED
from foveate.patches.quantize import QuantizedLinear
from foveate.patches.verify import verify
from foveate.server import cli, loader
from foveate.server.exceptions import InvalidRequest, ModelNotLoaded
from foveate.server.options import EngineOptions
from foveate.sparse_attn.errors import ProfileError


@pytest.fixture
def granite():
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2)).eval()
    assert model.config.model_type not in VERIFIED
    return model.requires_grad_(False)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_is_tuned_once(granite, tokenizer, quantization, monkeypatch):
    tuned = []
    monkeypatch.setattr(loader, "tune", lambda model: tuned.append(is_quantized(model)))
    loader.ready(granite, tokenizer, EngineOptions("granite", quantization=quantization)).attached.detach()
    assert tuned == [quantization != "none"], "behind quantisation, if any"


def is_quantized(model):
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_what_tuning_makes_of_an_unverified_family_is_compared(granite, tokenizer, monkeypatch):
    def wrongly(model):
        model.model.layers[0].mlp.up_proj.weight *= 1.1

    monkeypatch.setattr(loader, "tune", wrongly)
    with pytest.raises(UnsupportedModel, match="does not give the same logits"):
        loader.ready(granite, tokenizer, EngineOptions("granite"))


SIZES = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def llava():
    """Sees, in a class of its own, and hands text to a llama."""
    vision = CLIPVisionConfig(**VISION, image_size=28, patch_size=14)
    config = LlavaConfig(text_config=LlamaConfig(**SIZES, **HEADS), vision_config=vision, image_token_index=259)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture
def gemma():
    text = SIZES | HEADS | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = VISION | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=259)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.mark.parametrize(("model", "compared"), [("llava", True), ("gemma", False)])
def test_what_is_around_a_verified_text_part_is_compared_too(model, compared, request, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(loader, "verify", lambda *given: (seen.append(given[0]), verify(*given))[1])
    model = request.getfixturevalue(model)
    assert model.config.get_text_config().model_type in VERIFIED
    loader.ready(model, tokenizer, EngineOptions("model")).attached.detach()
    assert seen == [model] * compared


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_text_part_of_a_model_that_sees_is_served(llava, tokenizer, tmp_path, quantization):
    llava.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with LLM(str(tmp_path), dtype="float32", quantization=quantization, kv_cache_gib=0.01) as llm:
        got = llm.generate([list(range(5, 25))], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert len(got[0].token_ids) == 4
    if quantization == "none":
        want = llava.generate(torch.arange(5, 25)[None], max_new_tokens=4, do_sample=False)
        assert list(got[0].token_ids) == want[0, 20:].tolist()


def test_what_is_no_language_model_is_told_in_one_sentence(tmp_path):
    ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"^transformers reads vit \(ViTForImageClassification\) neither as"):
        loader.load(EngineOptions(str(tmp_path)))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_that_only_fails_when_it_is_served_is_refused_at_load(gemma, tokenizer, quantization, monkeypatch):
    """Its family is verified, or its weights are rounded: nothing is compared that would tell."""

    def wrongly(model):
        model.model.language_model.norm = torch.nn.LayerNorm(3)

    monkeypatch.setattr(loader, "tune", wrongly)
    with pytest.raises(UnsupportedModel, match=r"gemma3.* does not run on paged attention: RuntimeError"):
        loader.ready(gemma, tokenizer, EngineOptions("gemma", quantization=quantization))


def damaged(model_dir, path, change):
    """A copy of the checkpoint, its tensors changed."""
    shutil.copytree(model_dir, path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.mark.parametrize("told", [1, 3], ids=["one", "more-than-are-named"])
def test_a_checkpoint_that_lacks_weights_is_refused(model_dir, tmp_path, told):
    def change(tensors):
        for name in [name for name in tensors if "mlp" in name][: 1 if told == 1 else 5]:
            del tensors[name]

    with pytest.raises(ModelNotLoaded, match=r"does not hold every weight.*: model\.layers\.0\.mlp\.") as refused:
        loader.load(EngineOptions(damaged(model_dir, tmp_path / "m", change)))
    assert str(refused.value).count("mlp") == told
    assert ("and 2 more" in str(refused.value)) == (told == 3)


def test_a_weight_of_another_shape_is_refused_by_name(model_dir, tmp_path):
    def change(tensors):
        tensors["model.norm.weight"] = torch.zeros(3)

    with pytest.raises(ModelNotLoaded, match=r"in another shape.*: model\.norm\.weight$"):
        loader.load(EngineOptions(damaged(model_dir, tmp_path / "m", change)))


def test_a_tied_weight_is_not_missed(tmp_path, tokenizer):
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loader.load(EngineOptions(str(tmp_path))).attached.detach()


@pytest.mark.parametrize(
    "command",
    [
        ["doctor", "MODEL"],
        ["generate", "MODEL", "-p", "Hi"],
        ["calibrate", "MODEL", "--scheme", "kascade", "-o", "DIRECTORY/profile"],
        ["eval", "MODEL", "--scheme", "streaming", "-o", "DIRECTORY/report"],
        ["bench", "latency", "MODEL", "--scheme", "streaming", "-o", "DIRECTORY/report"],
    ],
    ids=lambda command: command[0],
)
def test_a_checkpoint_that_is_cut_off_is_said_in_one_line(command, model_dir, tmp_path, capfd):
    model = tmp_path / "m"
    shutil.copytree(model_dir, model)
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    words = [word.replace("MODEL", str(model)).replace("DIRECTORY", str(tmp_path)) for word in command]
    assert cli.main(words) == 1
    said = capfd.readouterr()
    told = (said.out + said.err).splitlines()
    assert [line for line in told if "the model cannot be read: " in line] == told[-1:]
    assert "Traceback" not in said.err


def alibi(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"alibi": True}))


def no_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "options", "error", "said"),
    [
        (alibi, {}, UnsupportedModel, "ALiBi"),
        (no_tokenizer, {}, ModelNotLoaded, "tokenizer"),
        (None, {"max_context": 513}, InvalidRequest, "513 exceeds the model's context of 512"),
        (None, {"profile": (__file__,)}, ProfileError, "cannot be read as a profile"),
    ],
    ids=["attention", "tokenizer", "context", "profile"],
)
def test_what_needs_no_weights_is_told_before_they_are_read(change, options, error, said, model_dir, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model_dir, copy)
    if change:
        change(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(error, match=said):
        loader.load(EngineOptions(str(copy), **options))
