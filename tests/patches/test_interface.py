"""The attention function: registration, padding, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, MistralConfig

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.pool import PagePool
from foveate.patches import interface
from foveate.patches.errors import PatchError, UnsupportedCall, UnsupportedModel
from foveate.patches.interface import NAME, PackedStep, no_mask, paged_attention, register
from foveate.patches.step import build_step
from foveate.sparse_attn.protocol import Phase
from foveate.sparse_attn.registry import build


class Layer(torch.nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.layer_idx = 0
        self.config = MistralConfig(num_hidden_layers=1, sliding_window=None, max_position_embeddings=256)
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.fixture
def manager():
    return KVCacheManager(PagePool(CacheGeometry(1, 2, 8, 16, 8)), prefix_reuse=False)


@pytest.fixture
def packed(manager):
    return PackedStep(build_step(manager, [(manager.open([], b""), 5)], None))


def tensors(batch=1, length=5, keys=None, dim=8, value_dim=8, kv_heads=2):
    keys = length if keys is None else keys
    shapes = (4, length, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    return tuple(torch.randn(batch, *shape) for shape in shapes)


def test_register_may_be_repeated():
    register()
    register()
    assert AttentionInterface._global_mapping[NAME] is paged_attention
    assert AttentionMaskInterface._global_mapping[NAME] is no_mask


def test_import_changes_nothing():
    code = (
        "import foveate.patches.attach, foveate.patches.verify;"
        "from transformers import AttentionInterface as A, AttentionMaskInterface as M;"
        "assert 'foveate' not in A._global_mapping and 'foveate' not in M._global_mapping"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_output_is_causal_attention(packed):
    query, key, value = tensors()
    out, weights = paged_attention(Layer(), query, key, value, None, foveate_step=packed)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert weights is None
    assert torch.allclose(out, want.transpose(1, 2), atol=1e-5)


def test_padding_is_neither_read_nor_written(manager):
    """Rows of 3 and 5 tokens in a left-padded batch give what each gives alone, and zeros elsewhere."""
    query, key, value = tensors(batch=2)
    tables = [manager.open([], b""), manager.open([], b"")]
    index = torch.tensor([2, 3, 4, 5, 6, 7, 8, 9])
    step = build_step(manager, [(tables[0], 3), (tables[1], 5)], None)
    for tensor in (query, key, value):
        tensor[0, :, :2] = float("nan")
    out, _ = paged_attention(Layer(), query, key, value, None, foveate_step=PackedStep(step, index))
    assert torch.equal(out[0, :2], torch.zeros(2, 4, 8))
    for row, first in ((0, 2), (1, 0)):
        alone = torch.nn.functional.scaled_dot_product_attention(
            query[row : row + 1, :, first:],
            key[row : row + 1, :, first:],
            value[row : row + 1, :, first:],
            is_causal=True,
            enable_gqa=True,
        )
        assert torch.allclose(out[row, first:], alone[0].transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1)])
@pytest.mark.parametrize("layout", ["tokens", "heads", "slices"])
def test_strides_are_the_same_for_any_number_of_tokens(layout, heads, kv_heads, monkeypatch):
    """GPU kernels are compiled for them: in the middle of an answer that takes up to a second."""
    seen = []

    def write(keys, values, pages, slots):
        seen.append((keys.stride(), values.stride()))

    def attend(queries, layer, step):
        seen.append(queries.stride())
        return queries

    monkeypatch.setattr(interface.ops, "write_kv", write)
    monkeypatch.setattr(interface, "attend", attend)
    manager = KVCacheManager(PagePool(CacheGeometry(1, kv_heads, 8, 16, 8)), prefix_reuse=False)

    def laid_out(count, length):
        if layout == "heads":
            return torch.zeros(1, count, length, 8)
        several = torch.zeros(1, length, count if layout == "tokens" else 3 * count, 8)
        return several[:, :, -count:].transpose(1, 2)

    for length in (1, 5, 7):
        step = PackedStep(build_step(manager, [(manager.open([], b""), length)], None))
        query, key, value = (laid_out(count, length) for count in (heads, kv_heads, kv_heads))
        paged_attention(Layer(), query, key, value, None, foveate_step=step)
    assert len(set(seen)) == 2, "one of keys and values, one of queries"


@pytest.mark.parametrize(
    ("layer", "inputs", "kwargs", "error", "message"),
    [
        pytest.param({}, {}, {"foveate_step": None}, UnsupportedCall, r"foveate\.attach\(model\)", id="no step"),
        pytest.param({}, {}, {"foveate_step": object()}, UnsupportedCall, "got object", id="not a step"),
        pytest.param({"layer_idx": None}, {}, {}, UnsupportedModel, "no layer_idx", id="no layer index"),
        pytest.param({"is_causal": False}, {}, {}, UnsupportedModel, "bidirectional", id="bidirectional layer"),
        pytest.param({}, {}, {"is_causal": False}, UnsupportedModel, "bidirectional", id="bidirectional call"),
        pytest.param({}, {"keys": 9}, {}, UnsupportedModel, "9 keys for 5 queries", id="cross-attention"),
        pytest.param({}, {"value_dim": 4}, {}, UnsupportedModel, "values 4", id="value head dim"),
        pytest.param(
            {}, {"kv_heads": 4}, {}, UnsupportedModel, "keys of 4 heads and head dim 8, and the.*2 and 8", id="KV heads"
        ),
        pytest.param(
            {}, {"dim": 4, "value_dim": 4}, {}, UnsupportedModel, "2 heads and head dim 4, and.*2 and 8", id="head dim"
        ),
        pytest.param({}, {}, {"position_bias": torch.zeros(1)}, UnsupportedModel, "position bias", id="position bias"),
        pytest.param({}, {}, {"dropout": 0.1}, UnsupportedCall, r"model\.eval\(\)", id="dropout"),
        pytest.param(
            {}, {}, {"attention_mask": torch.ones(1, 1, 5, 5)}, UnsupportedCall, "no attention mask", id="mask"
        ),
        pytest.param({}, {"length": 6}, {}, UnsupportedCall, "for 5 tokens, the model was given 6", id="wrong length"),
    ],
)
def test_what_pages_cannot_do_is_refused(layer, inputs, kwargs, error, message, packed):
    arguments = {"attention_mask": None, "foveate_step": packed, **kwargs}
    with pytest.raises(error, match=message) as caught:
        paged_attention(Layer(**layer), *tensors(**inputs), **arguments)
    assert isinstance(caught.value, PatchError)


@pytest.mark.parametrize(
    ("named", "given"),
    [(24, None), (None, 24), (24, 23), (24, 4096)],
    ids=["in the mask alone", "in code alone", "another", "longer than the context"],
)
def test_a_window_other_than_that_of_the_config_is_refused(named, given, packed):
    layer = Layer()
    layer.config.sliding_window = named
    with pytest.raises(
        UnsupportedModel, match=f"a sliding window of {given} in layer 0 where its config names {named}"
    ):
        paged_attention(layer, *tensors(), None, sliding_window=given, foveate_step=packed)


@pytest.mark.parametrize(
    ("named", "given"),
    [(24, 24), (None, None), (256, None), (None, 256), (300, 400)],
    ids=["the same", "none", "as long as the context", "as long, in code alone", "both longer"],
)
def test_a_window_that_no_sequence_outgrows_may_be_left_out(named, given, packed):
    layer = Layer()
    layer.config.sliding_window = named
    for step in (packed, PackedStep(packed.step)):
        paged_attention(layer, *tensors(), None, sliding_window=given, foveate_step=step)


def test_a_window_that_changes_is_looked_at_again(packed):
    layer = Layer()
    paged_attention(layer, *tensors(), None, foveate_step=packed)
    with pytest.raises(UnsupportedModel, match="sliding window of 24"):
        paged_attention(layer, *tensors(), None, sliding_window=24, foveate_step=PackedStep(packed.step))


def test_a_layer_that_attends_twice_in_a_pass_is_refused(packed):
    paged_attention(Layer(), *tensors(), None, foveate_step=packed)
    with pytest.raises(UnsupportedModel, match="Layer attends twice with layer_idx 0 in one pass"):
        paged_attention(Layer(), *tensors(), None, foveate_step=packed)


def test_gradients_are_refused_at_once_in_training_and_else_when_they_are_wanted(packed):
    query, key, value = tensors()
    query.requires_grad_()
    with pytest.raises(UnsupportedCall, match="no gradient"):
        paged_attention(Layer(), query, key, value, None, foveate_step=packed)
    out, _ = paged_attention(Layer().eval(), query, key, value, None, foveate_step=packed)
    with pytest.raises(UnsupportedCall, match="no gradient passes through"):
        out.sum().backward()
    assert query.grad is None
    with torch.no_grad():
        out, _ = paged_attention(Layer().eval(), query, key, value, None, foveate_step=PackedStep(packed.step))
    assert not out.requires_grad


def test_no_gradient_where_keys_alone_want_one(packed):
    query, key, value = tensors()
    key.requires_grad_()
    out, _ = paged_attention(Layer().eval(), query, key, value, None, foveate_step=packed)
    with pytest.raises(UnsupportedCall, match="no gradient passes through"):
        out.sum().backward()


def test_a_mask_without_elements_is_none(packed):
    out, _ = paged_attention(Layer(), *tensors(), torch.empty(1, 1, 0, 0), foveate_step=packed)
    assert out.shape == (1, 5, 4, 8)


def test_masks_of_the_models_own_are_refused():
    assert no_mask(1, 5, 5, use_vmap=False, mask_function=None) is None
    with pytest.raises(UnsupportedCall, match="function of its own"):
        no_mask(1, 5, 5, use_vmap=True)


def test_steps_of_one_token_behind_a_context_are_decode(manager):
    first, second = manager.open([], b""), manager.open([], b"")
    assert build_step(manager, [(first, 1)], None).groups[0].phase is Phase.PREFILL
    manager.commit(first, range(1))
    assert build_step(manager, [(first, 1), (second, 1)], None).groups[0].phase is Phase.PREFILL
    manager.commit(second, range(1))
    step = build_step(manager, [(first, 1), (second, 1)], None)
    assert step.groups[0].phase is Phase.DECODE
    assert step.positions.tolist() == [1, 1]


def test_the_length_of_the_prompt_says_what_is_decode_and_where_the_dense_tail_is(manager):
    scheme = build("streaming", budget_tokens=8, dense_tail_tokens=4)
    table = manager.open([], b"")

    def phases(count, prompt_tokens):
        step = build_step(manager, [(table, count)], scheme, prompt_tokens=prompt_tokens)
        manager.commit(table, range(table.num_tokens + count))
        return [(group.phase, group.scheme, group.rows.num_queries) for group in step.groups]

    assert phases(7, 10) == [(Phase.PREFILL, scheme, 6), (Phase.PREFILL, None, 1)]
    assert phases(1, 10) == [(Phase.PREFILL, None, 1)], "one token of the prompt is no decode step"
    assert phases(2, 10) == [(Phase.PREFILL, None, 2)]
    assert phases(1, 10) == [(Phase.DECODE, scheme, 1)]


@pytest.mark.parametrize("tail", [0, 4])
def test_schemes_are_told_the_length_of_the_prompt(tail, manager):
    scheme = build("streaming", budget_tokens=8, dense_tail_tokens=tail)
    tables = [manager.open([], b""), manager.open([], b"")]
    for count, known in ((8, 10), (2, 10), (1, 10), (1, None)):
        step = build_step(manager, [(table, count) for table in tables], scheme, prompt_tokens=known)
        for table in tables:
            manager.commit(table, range(table.num_tokens + count))
        told = [length for group in step.groups for length in group.rows.host_prompt_lens or (None,)]
        assert set(told) == {known}


def test_a_text_may_have_no_dense_tail(manager):
    scheme = build("streaming", budget_tokens=8, dense_tail_tokens=4)
    [group] = build_step(manager, [(manager.open([], b""), 10)], scheme, prompt_tokens=10, dense_tail=False).groups
    assert (group.scheme, group.rows.num_queries) == (scheme, 10)
