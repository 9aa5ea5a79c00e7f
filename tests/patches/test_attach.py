"""A patched model generates as before, and is itself again afterwards."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from foveate.kv_cache.errors import CacheConfigError, OutOfPages
from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.patches.attach import attach, attach_engine
from foveate.patches.cache import PagedGenerateCache
from foveate.patches.errors import AttachError, CacheExhausted, UnsupportedCall, UnsupportedModel
from foveate.sparse_attn.errors import ProfileError, SchemeError
from foveate.sparse_attn.registry import build

GENERATE_FAMILIES = ["llama", "gemma3_text", "gpt_oss"]
NEW = 12


@pytest.fixture
def llama(tiny):
    return tiny("llama")


def left_padded(tokens, lengths):
    ids = tokens(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : ids.shape[1] - length] = 0
    return ids.masked_fill(mask == 0, 0), mask


WAYS = {
    "single": ([50], {}),
    "left-padded batch": ([50, 1, 31], {}),
    "beams": ([37], {"num_beams": 2}),
    "padded beams": ([40, 17], {"num_beams": 3}),
    "sampling": ([20, 33], {"do_sample": True, "temperature": 0.8}),
    "chunked prefill": ([45, 9], {"prefill_chunk_size": 16}),
    "no cache": ([20], {"use_cache": False}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", GENERATE_FAMILIES)
def test_generate_gives_the_tokens_of_stock_attention(family, way, tiny, tokens, manager_for):
    model = tiny(family)
    lengths, options = WAYS[way]
    ids, mask = left_padded(tokens, lengths)

    def generate():
        torch.manual_seed(5)
        options_of = {"max_new_tokens": NEW, "do_sample": False, **options}
        return model.generate(ids, attention_mask=mask, **options_of)

    want = generate()
    manager = manager_for(model)
    with attach(model, cache=manager) as attached:
        got = generate()
        gc.collect()
        assert manager.num_pages_in_use == 0
        assert attached.keys_read_fraction == 1.0
    assert torch.equal(got, want)


@torch.no_grad()
def test_plain_forward_gives_the_logits_of_stock_attention(llama, tokens):
    ids, mask = left_padded(tokens, [40, 23])
    want = llama(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    with attach(llama) as attached:
        out = llama(ids, mask)
        assert isinstance(out.past_key_values, PagedGenerateCache)
        assert torch.allclose(out.logits[mask.bool()], want[mask.bool()], atol=1e-4)
        assert attached.manager.num_pages_in_use == 2
        del out
        assert attached.manager.num_pages_in_use == 0
        assert llama(ids, use_cache=False, labels=ids).past_key_values is None
        assert attached.manager.num_pages_in_use == 0


@torch.no_grad()
def test_a_returned_cache_goes_on_and_can_be_reset(llama, tokens):
    ids = tokens(2, 30)
    want = llama(ids).logits[:, 25:]
    with attach(llama) as attached:
        past = llama(ids[:, :25]).past_key_values
        assert (past.get_seq_length(), past.get_mask_sizes(5, 0), len(past)) == (25, (30, 0), 3)
        out = llama(ids[:, 25:], past_key_values=past)
        assert out.past_key_values is past
        assert torch.allclose(out.logits, want, atol=1e-4)
        past.reset()
        assert (past.get_seq_length(), attached.manager.num_pages_in_use) == (0, 0)
        assert torch.allclose(llama(ids, past_key_values=past).logits[:, 25:], want, atol=1e-4)
        past.batch_repeat_interleave(2)
        assert past.batch_size == 4
        with pytest.raises(UnsupportedCall, match="cropped"):
            past.crop(1)
        assert "length=30" in repr(past)
        with pytest.raises(UnsupportedCall, match="4 rows, the batch has 2"):
            llama(ids, past_key_values=past)
    assert attached.manager.num_pages_in_use == 0


@torch.no_grad()
def test_sparse_policy_reads_fewer_keys(llama, tokens):
    ids = tokens(1, 150)
    policy = {"scheme": "streaming", "budget_tokens": 40, "sink_tokens": 4}
    want = llama(ids).logits
    with attach(llama, policy) as attached:
        sparse = llama.generate(ids, max_new_tokens=4, do_sample=False)
        assert sparse.shape == (1, 154)
        assert attached.keys_read_fraction < 0.6
        got = llama(ids).logits
        within = attached.keys_read_fraction
    assert attached.keys_read_fraction == within
    # Queries that the budget covers read everything; later ones do not.
    assert torch.allclose(got[:, :36], want[:, :36], atol=1e-4)
    assert not torch.allclose(got[:, 100:], want[:, 100:], atol=1e-2)


@torch.no_grad()
def test_pages_of_eight_bits_serve_a_model_of_floats(llama, tokens):
    ids = tokens(1, 40)
    want = llama(ids).logits
    with attach(llama, cache=cache_of(3, 2, 16, 16, 4, torch.int8)):
        got = llama(ids).logits
    assert not torch.equal(got, want)
    assert float((got - want).norm() / want.norm()) < 0.1


@torch.no_grad()
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_part_that_moves_positions_is_served(phase, llama, tokens):
    """Though the composed scheme itself moves none."""
    ids = tokens(1, 60)
    part = {"scheme": "streaming", "budget_tokens": 24}
    dense = {"prefill": "dense", "decode": "dense"}
    keys = {}
    for name, policy in (("dense", dense), ("part", dense | {phase: part})):
        with attach(llama, {"scheme": "composed", **policy}) as attached:
            past = llama(ids).past_key_values
            logits = llama(tokens(1, 1, seed=1), past_key_values=past).logits
            keys[name] = attached.keys_read_fraction
        assert bool(logits.isfinite().all())
    assert keys["part"] < keys["dense"] == 1.0


@torch.no_grad()
def test_dense_tail_of_the_prompt_reads_every_key(tiny, tokens):
    # One layer: behind a second, keys differ between the policies.
    model = tiny("llama", num_hidden_layers=1)
    ids, mask = left_padded(tokens, [150, 90])
    want = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    got = {}
    for tail in (0, 20):
        with attach(model, {"scheme": "streaming", "budget_tokens": 40, "dense_tail_tokens": tail}) as attached:
            got[tail] = model(ids, mask).logits
            assert attached.keys_read_fraction < 0.9
    assert torch.allclose(got[20][:, -20:], want[:, -20:], atol=1e-4)
    assert not torch.allclose(got[0][:, -20:], want[:, -20:], atol=1e-2)
    assert torch.allclose(got[20][:, :-20], got[0][:, :-20], atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_model_is_itself_again_even_after_an_exception(family, tiny, tokens):
    model = tiny(family)
    before = model.config._attn_implementation
    attached = attach(model)
    kept = model(tokens(1, 20)).past_key_values

    def fail_inside():
        with attached:
            raise KeyError("from the caller")

    with pytest.raises(KeyError, match="from the caller"):
        fail_inside()
    assert model.config._attn_implementation == model.model.config._attn_implementation == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert attached.manager.num_pages_in_use == 0
    attached.detach()
    assert model.config._attn_implementation == before
    with pytest.raises(AttachError, match="only works with the model"):
        model(tokens(1, 1), past_key_values=kept)


def test_a_failed_pass_leaves_the_cache_as_it_was(llama, tokens):
    ids = tokens(1, 30)

    def fail(*args):
        raise RuntimeError("in the last layer")

    with attach(llama) as attached, torch.no_grad():
        past = llama(ids[:, :20]).past_key_values
        handle = llama.model.layers[-1].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the last layer"):
            llama(ids[:, 20:], past_key_values=past)
        with pytest.raises(RuntimeError, match="in the last layer"):
            llama(ids, use_cache=False)
        handle.remove()
        assert past.get_seq_length() == 20
        assert attached.manager.num_pages_in_use == len(past.tables[0].pages)
        got = llama(ids[:, 20:], past_key_values=past).logits
    assert torch.allclose(got, llama(ids).logits[:, 20:], atol=1e-4)


def test_attaching_twice_is_refused(llama):
    with attach(llama):
        with pytest.raises(AttachError, match="attached already"):
            attach(llama)
        with pytest.raises(AttachError, match="attached already"):
            attach_engine(llama)
        assert llama.config._attn_implementation == "foveate"
    assert llama.config._attn_implementation == "eager"


def test_an_attachment_is_not_entered_again(llama):
    attached = attach(llama)
    with attached:
        pass
    with pytest.raises(AttachError, match="was detached"):
        attached.__enter__()


def test_what_was_compiled_is_attached_inside(llama, tokens):
    want = llama.generate(tokens(1, 10), max_new_tokens=3, do_sample=False)
    compiled = torch.compile(llama, backend="eager")
    with attach(compiled) as attached:
        assert attached.model is llama
        assert torch.equal(compiled.generate(tokens(1, 10), max_new_tokens=3, do_sample=False), want)
        assert attached.manager is not None
    assert not llama._forward_hooks


def test_what_an_adapter_wraps_is_attached_inside(llama, tokens):
    class Adapter(torch.nn.Module):
        """As PEFT's models are."""

        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def forward(self, *args, **kwargs):
            return self.base_model(*args, **kwargs)

        def get_base_model(self):
            return self.base_model

    adapter = Adapter(llama)
    with torch.no_grad():
        want = adapter(tokens(1, 10)).logits
        with attach(adapter) as attached:
            assert attached.model is llama
            assert torch.allclose(adapter(tokens(1, 10)).logits, want, atol=1e-4)


@pytest.mark.parametrize("model", [None, "smollm2-135m", torch.nn.Linear(2, 2)], ids=lambda model: type(model).__name__)
def test_what_is_no_model_of_transformers_is_refused(model):
    with pytest.raises(UnsupportedModel, match=f"{type(model).__name__} is no model of transformers"):
        attach(model)


@torch.no_grad()
def test_a_model_of_another_element_type_gets_other_pages(config, tokens):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config("llama")).eval()
    with attach(model) as attached:
        past = model(tokens(1, 8)).past_key_values
        model.to(torch.bfloat16)
        with pytest.raises(UnsupportedCall, match=r"bfloat16 on cpu now, and the pages that caches hold are .*float32"):
            model(tokens(1, 1), past_key_values=past)
        with pytest.raises(UnsupportedCall, match="attach it anew"):
            model(tokens(1, 8))
        past.reset()
        assert model(tokens(1, 8)).logits.dtype == torch.bfloat16
        assert attached.manager.pool.geometry.dtype == torch.bfloat16
        with pytest.raises(UnsupportedCall, match="of another pool"):
            model(tokens(1, 8), past_key_values=past)
    with attach(model, cache=cache_of(3, 2, 16, 16, 4, torch.bfloat16)):
        model.to(torch.float32)
        with pytest.raises(UnsupportedCall, match="the pages it was given"):
            model(tokens(1, 8))


def test_engine_attachment_makes_no_steps(llama, tokens):
    with attach_engine(llama) as attached, pytest.raises(UnsupportedCall, match="needs a step"):
        llama(tokens(1, 4))
    assert attached.keys_read_fraction == 1.0


def test_a_full_pool_says_what_to_pass(llama, tokens):
    with attach(llama, page_size=16, num_pages=3) as attached:
        with pytest.raises(CacheExhausted, match=r"attach\(\.\.\., num_pages=\)") as caught:
            llama(tokens(1, 60))
        assert isinstance(caught.value, OutOfPages)
        assert attached.manager.num_pages_in_use == 0
        llama(tokens(1, 48))


def test_default_pool_fits_the_first_batch_at_full_context(llama, tokens):
    with attach(llama, page_size=16) as attached:
        assert attached.manager is None
        llama(tokens(3, 5))
        assert attached.manager.pool.geometry.num_pages == 3 * 256 // 16


def test_default_pool_is_bounded(config, tokens, monkeypatch):
    from transformers import LlamaForCausalLM

    import foveate.patches.attach as attach_module

    model = LlamaForCausalLM(config("llama", max_position_embeddings=10**9)).eval()
    monkeypatch.setattr(attach_module, "DEFAULT_POOL_BYTES", 2**20)
    with attach(model) as attached:
        model(tokens(1, 5))
        assert 2**19 < attached.manager.pool.nbytes <= 2**20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param({"attention_mask": torch.ones(1, 1, 8, 8)}, "attention_mask must be", id="4d mask"),
        pytest.param({"attention_mask": torch.ones(1, 7)}, "attention_mask must be", id="short mask"),
        pytest.param({"attention_mask": torch.zeros(1, 8)}, "every token as padding", id="nothing but padding"),
        pytest.param({"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])}, "packed sequences", id="packed"),
        pytest.param({"position_ids": torch.zeros(3, 1, 8)}, "position_ids must count", id="3d positions"),
        pytest.param({"output_attentions": True}, "output_attentions", id="output attentions"),
        pytest.param({"pixel_values": torch.zeros(1)}, "text only, got pixel_values", id="images"),
    ],
)
def test_calls_that_pages_cannot_serve_are_refused(call, message, llama, tokens):
    with attach(llama) as attached:
        with pytest.raises(UnsupportedCall, match=message):
            llama(tokens(1, 8), **call)
        assert attached.manager is None or attached.manager.num_pages_in_use == 0
        llama(tokens(1, 8))


@torch.no_grad()
def test_caches_of_others_are_refused(llama, tokens, tiny):
    filled = DynamicCache(config=llama.config)
    llama(tokens(1, 4), past_key_values=filled)
    with attach(llama):
        with pytest.raises(UnsupportedCall, match="DynamicCache of its own"):
            llama(tokens(1, 4), past_key_values=filled)
        empty = DynamicCache(config=llama.config)
        own = llama(tokens(1, 4), past_key_values=empty).past_key_values
        assert isinstance(own, PagedGenerateCache)
        with pytest.raises(UnsupportedCall, match=r"output\.past_key_values"):
            llama(tokens(1, 4), past_key_values=empty)
        with attach(tiny("olmo2")), pytest.raises(UnsupportedCall, match="another attached model"):
            tiny("olmo2")(tokens(1, 4), past_key_values=own)
        with pytest.raises(UnsupportedCall, match="StaticCache of its own"):
            llama.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_a_padded_cache_needs_its_mask(llama, tokens):
    ids, mask = left_padded(tokens, [10, 6])
    with attach(llama):
        past = llama(ids, mask).past_key_values
        with pytest.raises(UnsupportedCall, match="each pass needs the attention_mask"):
            llama(ids[:, -1:], past_key_values=past)
        changed = torch.cat([1 - mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
        with pytest.raises(UnsupportedCall, match="other tokens of the past"):
            llama(ids[:, -1:], changed, past_key_values=past)


def test_policies(llama):
    for policy in ("dense", {"scheme": "streaming", "budget_tokens": 64}, build("streaming", sink_tokens=2)):
        with attach(llama, policy) as attached:
            assert attached.scheme.name in ("dense", "streaming")
    with pytest.raises(SchemeError, match="dense"):
        attach(llama, "no such scheme")
    for nameless in ({"budget_tokens": 64}, {"scheme": None}, None, 3):
        with pytest.raises(ValueError, match="names its scheme"):
            attach(llama, nameless)
    for nowhere in ("nowhere.safetensors", Path("nowhere.safetensors")):
        with pytest.raises(ProfileError, match=r"nowhere\.safetensors cannot be read"):
            attach(llama, "kascade", profile=nowhere)
    assert llama.config._attn_implementation == "eager"


def cache_of(*sizes):
    return KVCacheManager(PagePool(CacheGeometry(*sizes)), prefix_reuse=False)


def test_caches_that_do_not_fit(llama, tokens):
    with pytest.raises(ValueError, match="num_kv_heads=1, the model 2"):
        attach(llama, cache=cache_of(3, 1, 16, 16, 4))
    with pytest.raises(ValueError, match=r"the cache holds torch\.bfloat16, the model computes in torch\.float32"):
        attach(llama, cache=cache_of(3, 2, 16, 16, 4, torch.bfloat16))
    with pytest.raises(ValueError, match="the cache lies on meta, the model on cpu"):
        attach(llama, cache=cache_of(3, 2, 16, 16, 4, torch.float32, torch.device("meta")))
    assert llama.config._attn_implementation == "eager"
    manager = KVCacheManager(PagePool(CacheGeometry(3, 2, 16, 16, 4)))
    with pytest.raises(ValueError, match="its own page_size"):
        attach(llama, cache=manager, page_size=32)
    with attach(llama, cache=manager), pytest.raises(CacheConfigError, match="prefix_reuse=False"):
        llama(tokens(1, 4))


@pytest.mark.parametrize("sizes", [{"page_size": 0}, {"page_size": 7}, {"num_pages": 0}, {"num_pages": -1}], ids=str)
def test_sizes_out_of_range_are_refused(sizes, llama):
    (name,) = sizes
    with pytest.raises(CacheConfigError, match=name):
        attach(llama, **sizes)
    assert llama.config._attn_implementation == "eager"


def test_models_without_the_attention_interface_are_refused(config):
    from transformers import LlamaForCausalLM

    class Old(LlamaForCausalLM):
        def _can_set_attn_implementation(self):
            return False

    model = Old(config("llama"))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match="does not let its attention be chosen"):
        attach(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("policy", ["dense", {"scheme": "kascade", "uncalibrated": 1, "budget_tokens": 16}], ids=str)
def test_pages_are_let_go_at_once(policy, tiny_llama, tokens):
    gc.disable()
    try:
        with attach(tiny_llama, policy) as attached, torch.inference_mode():
            out = tiny_llama(tokens(1, 80), use_cache=True)
            out = tiny_llama(tokens(1, 1), past_key_values=out.past_key_values, use_cache=True)
            pages = weakref.ref(out.past_key_values.manager.pool)
        del out, attached
        assert pages() is None
    finally:
        gc.enable()


def test_a_model_of_several_text_parts_is_refused(llama, monkeypatch):
    def ambiguous(*_, **__):
        raise ValueError("Multiple valid text configs were found")

    monkeypatch.setattr(type(llama.config), "get_text_config", ambiguous)
    with pytest.raises(UnsupportedModel, match="several text parts"):
        attach(llama)
