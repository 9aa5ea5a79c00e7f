"""Every verified family gives the logits of its stock attention."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

import foveate
from foveate.kv_cache.table import BlockTable
from foveate.patches.attach import attach_engine
from foveate.patches.errors import UnsupportedModel
from foveate.patches.families import LEARNED_SINKS, ROTATE_SLIDING_ONLY, VERIFIED, facts
from foveate.patches.interface import PackedStep, no_mask
from foveate.patches.step import build_step
from foveate.sparse_attn.registry import build

ALL = sorted(VERIFIED - {"gemma3"})
TOLERANCE = 2e-5


@pytest.fixture(params=ALL)
def family(request):
    return request.param


class Packed:
    """Runs steps as the engine does: one packed row, no mask, no cache object."""

    def __init__(self, model, manager):
        self.model, self.manager = model, manager

    def open(self) -> BlockTable:
        return self.manager.open([], b"")

    def __call__(self, *chunks: tuple[BlockTable, torch.Tensor], keep=None) -> torch.Tensor:
        """Logits ``[T or kept, V]`` of the next tokens of each table."""
        step = build_step(self.manager, [(table, len(ids)) for table, ids in chunks], build("dense"))
        row = torch.cat([ids for _, ids in chunks])
        out = self.model(
            input_ids=row[None],
            position_ids=step.positions[None],
            use_cache=False,
            past_key_values=None,
            attention_mask=None,
            logits_to_keep=torch.arange(len(row)) if keep is None else keep,
            foveate_step=PackedStep(step),
        )
        for table, ids in chunks:
            self.manager.commit(table, range(table.num_tokens + len(ids)))
        return out.logits[0]


def stock(model, ids: torch.Tensor) -> torch.Tensor:
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        return model(ids[None]).logits[0]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    worst = (ours - theirs).abs().max() / theirs.abs().max()
    assert worst < TOLERANCE, f"largest relative difference {worst:.2e}"


@torch.no_grad()
def test_logits_equal_stock_attention(family, tiny, manager_for, tokens):
    model = tiny(family)
    first, second = tokens(1, 73)[0], tokens(1, 41, seed=1)[0]
    want_first, want_second = stock(model, first), stock(model, second)
    with attach_engine(model):
        run = Packed(model, manager_for(model))

        table = run.open()
        assert_same(run((table, first)), want_first)
        run.manager.free(table)

        table = run.open()
        chunks = [run((table, part)) for part in first.split([33, 37, 1, 1, 1])]
        assert_same(torch.cat(chunks), want_first)

        # A prompt beside a sequence that is under way, then both decode; only some logits are wanted.
        other = run.open()
        run.manager.free(table)
        run((table, first[:50]))
        keep = torch.tensor([1, 2, 40])
        mixed = run((table, first[50:52]), (other, second[:39]), keep=keep)
        assert_same(mixed, torch.cat([want_first[51:52], want_second[[0, 38]]]))
        assert_same(run((table, first[52:53]), (other, second[39:40])), torch.stack([want_first[52], want_second[39]]))
        assert_same(run((table, first[53:54]), (other, second[40:41])), torch.stack([want_first[53], want_second[40]]))
        run.manager.free(table)
        run.manager.free(other)
        assert run.manager.num_pages_in_use == 0


@torch.no_grad()
@pytest.mark.parametrize("left_out", ["sliding_window", "softcap", "s_aux", "scaling"])
def test_each_fact_of_a_layer_is_felt(left_out, tiny, manager_for, tokens, monkeypatch):
    """The comparison above could tell if a fact did not come through."""
    import foveate.patches.interface as interface

    family = {"sliding_window": "phi3", "softcap": "gemma2", "s_aux": "gpt_oss", "scaling": "gemma2"}[left_out]
    model = tiny(family)
    ids = tokens(1, 60)[0]
    want = stock(model, ids)
    real = interface.paged_attention
    monkeypatch.setattr(interface, "paged_attention", lambda *args, **kw: real(*args, **{**kw, left_out: None}))
    monkeypatch.setattr(interface, "check_window", lambda *_: None)
    with attach_engine(model):
        run = Packed(model, manager_for(model))
        got = run((run.open(), ids))
    monkeypatch.undo()
    interface.register()
    assert (got - want).abs().max() / want.abs().max() > 1e-3


def test_multimodal_gemma3_text_part(tokens, manager_for, config):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from_text = config("gemma3_text")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    torch.manual_seed(0)
    whole = Gemma3Config(text_config=from_text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    whole.image_token_index = 100
    model = Gemma3ForConditionalGeneration(whole).eval()
    model.set_attn_implementation("eager")
    ids = tokens(1, 40)[0].clamp(max=99)
    with torch.no_grad():
        want = stock(model, ids)
        with attach_engine(model):
            assert model.config.vision_config._attn_implementation == "eager"
            run = Packed(model, manager_for(model))
            assert_same(run((run.open(), ids)), want)
        assert model.config.text_config._attn_implementation == "eager"


def test_facts_of_each_family(config):
    window = 24
    assert facts(config("llama")).windows == (None, None, None)
    assert facts(config("mistral")).windows == (window,) * 3
    assert facts(config("mistral", sliding_window=None)).windows == (None,) * 3
    assert facts(config("qwen2")).windows == (None, window, window)
    assert facts(config("qwen2", use_sliding_window=False)).windows == (None,) * 3
    assert facts(config("smollm3")).windows == (window, None, window)
    assert facts(config("smollm3")).rotates == (True, False, True)
    assert facts(config("gemma2")).softcap == 0.4
    assert facts(config("gpt_oss")).learned_sinks
    assert not facts(config("gemma3_text")).learned_sinks
    sizes = facts(config("qwen3"))
    assert (sizes.num_layers, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.vocab_size) == (
        3,
        4,
        2,
        32,
        101,
    )
    assert facts(config("olmo2")).head_dim == 16


_MIXED = ["full_attention", "sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_EXAONE_MOE = {**_EXPERTS, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_shared_experts": 1}
# Families with layers that do not rotate, what their configs add, and the layers that do.
NOPE = {
    "afmoe": ({**_EXPERTS, "num_dense_layers": 1}, (False, True, False)),
    "cohere2": ({}, (False, True, False)),
    "cohere2, no windows": ({"layer_types": ["full_attention"] * 3}, (False, False, False)),
    "cohere2_moe": (_EXPERTS, (False, True, False)),
    "cohere2_moe, dense first": ({**_EXPERTS, "first_k_dense_replace": 1}, (True, True, False)),
    "exaone4": ({}, (False, True, False)),
    "exaone4, no window": ({"sliding_window": None, "layer_types": ["full_attention"] * 3}, (True, True, True)),
    "exaone_moe": (_EXAONE_MOE, (False, True, False)),
    "flint": ({}, (False, True, False)),
    "granite_swa": ({"layer_rope_theta": [1e4, 0, 1e4]}, (True, False, True)),
    "kolibri1": (_EXPERTS, (False, True, False)),
    "smollm3": ({"no_rope_layers": [1, 1, 0]}, (True, True, False)),
}


@pytest.fixture
def tiny_nope():
    def make(name: str) -> transformers.PreTrainedModel:
        sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        given = {"sliding_window": 16, "layer_types": _MIXED, **NOPE[name][0]}
        torch.manual_seed(0)
        config = AutoConfig.for_model(name.partition(",")[0], **sizes, **heads, **ids, **given)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
        for layer in model.model.layers:
            for product in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                product.weight.mul_(20)  # far from uniform attention
        return model

    return make


@pytest.mark.parametrize("name", NOPE)
def test_which_layers_rotate(name, tiny_nope):
    """One token at two positions has two queries where its layer rotates, attention left out."""
    model, seen = tiny_nope(name), {}

    def look(module, query, key, value, attention_mask=None, **more):
        seen[module.layer_idx] = bool((query[:, :, 0] - query[:, :, 1]).norm() > 0.05 * query.norm())
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("look", look)
    AttentionMaskInterface.register("look", no_mask)
    model.set_attn_implementation("look")
    model(input_ids=torch.tensor([[5, 5]]), position_ids=torch.tensor([[0, 300]]), use_cache=False)
    assert facts(model.config).rotates == NOPE[name][1] == tuple(seen[layer] for layer in range(3))


def test_layer_types_without_rotary_parameters_do_not_rotate():
    assert facts(AutoConfig.for_model("beam", layer_types=_MIXED, num_hidden_layers=3)).rotates == (False, True, False)


@pytest.mark.parametrize("name", ["afmoe", "exaone4", "exaone_moe", "flint", "kolibri1"])
def test_queries_that_were_not_rotated_are_not_moved(name, tiny_nope, tokens):
    """Layers that rotate read their own window here, whose queries and keys no policy moves apart."""
    model, ids = tiny_nope(name), tokens(1, 150)
    policy = {"scheme": "streaming", "budget_tokens": 64, "sink_tokens": 16}
    logits = {}
    for positions in ("cache", "text"):
        with foveate.attach(model, {**policy, "positions": positions}):
            logits[positions] = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits["cache"], logits["text"], rtol=1e-5, atol=1e-6)
    with foveate.attach(model):
        assert (model(ids, use_cache=False).logits - logits["text"]).norm() > 0.01 * logits["text"].norm()


def test_every_family_that_rotates_by_its_windows_is_known():
    """Their code says ``if`` before it rotates; of Exaone 4.5 the text part is Exaone 4."""
    rotates = re.compile(
        r"if [^\n]*(sliding|local)[^\n]*:\n(\s+cos, sin = position_embeddings\n)?[^\n]* = apply_rotary_pos_emb\("
    )
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = {file.parent.name for file in files if rotates.search(file.read_text(encoding="utf-8"))}
    assert found - {"exaone4_5"} == ROTATE_SLIDING_ONLY


def test_every_family_with_learned_sinks_is_known():
    """Their attention says ``s_aux``. Others are refused for something else, or are no causal language models."""
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = {file.parent.name for file in files if "s_aux=self.sinks" in file.read_text(encoding="utf-8")}
    assert found >= LEARNED_SINKS
    for family in found - LEARNED_SINKS - {"openai_privacy_filter"}:
        with pytest.raises(UnsupportedModel):
            facts(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_position_bias_that_code_alone_says_is_named(family):
    with pytest.raises(UnsupportedModel, match="position bias"):
        facts(AutoConfig.for_model(family))


def test_several_text_parts_are_refused():
    with pytest.raises(UnsupportedModel, match="musicgen cannot run on paged attention: it has several text parts"):
        facts(AutoConfig.for_model("musicgen"))


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4"])
def test_layers_of_several_sizes_are_refused(family):
    with pytest.raises(UnsupportedModel, match=r"gemma4_text .* its layers differ in head dim or KV heads"):
        facts(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        pytest.param({"rope_type": "default"}, 256, id="default"),
        pytest.param(
            {"rope_type": "linear", "factor": 2.0}, 256, id="linear: max_position_embeddings is the extended length"
        ),
        pytest.param({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, 512, id="yarn"),
        pytest.param(
            {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}, 256, id="yarn without factor"
        ),
        pytest.param({"rope_type": "yarn", "factor": 4.0}, 1024, id="yarn with the original length in max_position"),
        pytest.param({"rope_type": "dynamic", "factor": 4.0}, 256, id="dynamic"),
        pytest.param(
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            256,
            id="llama3",
        ),
        pytest.param(
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
                "factor": 4.0,
            },
            64,
            id="longrope",
        ),
    ],
)
def test_context_length_under_rope_scaling(rope, length, config):
    assert facts(config("llama", rope_parameters={"rope_theta": 1e4, **rope})).context_length == length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"attention_chunk_size": 32}, "chunked", id="chunked"),
        pytest.param({"use_bidirectional_attention": True}, "bidirectional", id="bidirectional"),
        pytest.param({"is_causal": False}, "bidirectional", id="not causal"),
        pytest.param({"num_kv_shared_layers": 1}, "share keys", id="shared kv"),
        pytest.param({"kv_lora_rank": 8}, "compressed", id="mla"),
        pytest.param({"head_dim": 16, "v_head_dim": 8}, "values have another head dim", id="value dim"),
        pytest.param({"alibi": True}, "position bias", id="alibi"),
        pytest.param({"is_encoder_decoder": True}, "encoder-decoder", id="encoder-decoder"),
        pytest.param({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention", id="linear layers"),
        pytest.param({"num_hidden_layers": None}, "num_hidden_layers", id="no layers"),
    ],
)
def test_unsupported_configs_are_named(change, message, config):
    unusual = config("llama")
    for name, value in change.items():
        object.__setattr__(unusual, name, value)
    with pytest.raises(UnsupportedModel, match=message):
        facts(unusual)
