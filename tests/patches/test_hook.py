"""One forward pass of an attached model: whose it is, what it is given, and how it ends."""

from __future__ import annotations

import threading

import pytest
import torch

from foveate.patches.attach import attach
from foveate.patches.errors import AttachError, UnsupportedCall


@pytest.fixture
def llama(tiny):
    return tiny("llama")


def padded(tokens, lengths, side):
    ids = tokens(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = slice(length, None) if side == "right" else slice(0, ids.shape[1] - length)
        mask[row, padding] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_pass_beside_one_of_another_thread_is_refused_and_disturbs_nothing(use_cache, llama, tokens):
    with torch.no_grad():
        want = llama(tokens(1, 30)).logits
    inside, go_on = threading.Event(), threading.Event()
    results = []

    def wait(*args):
        inside.set()
        assert go_on.wait(60)

    def run():
        with torch.no_grad():
            results.append(llama(tokens(1, 30), use_cache=use_cache).logits)

    with attach(llama) as attached:
        handle = llama.model.layers[0].register_forward_hook(wait)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert inside.wait(60)
            held = attached.manager.num_pages_in_use
            with pytest.raises(UnsupportedCall, match=r"another thread.*take turns.*foveate\.LLM"), torch.no_grad():
                llama(tokens(1, 20, seed=1))
            assert attached.manager.num_pages_in_use == held
        finally:
            handle.remove()
            go_on.set()
            thread.join(60)
        assert torch.allclose(results[0], want, atol=1e-4)
        assert attached.keys_read_fraction == 1.0
        with torch.no_grad():  # its turn has come
            assert llama(tokens(1, 20, seed=1)).logits.isfinite().all()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("again", ["same thread", "other thread"])
def test_pages_of_an_interrupted_pass_are_free_for_the_next(use_cache, again, llama, tokens):
    """Ctrl-C calls no hook."""

    def interrupt(*args):
        raise KeyboardInterrupt

    def interrupted():
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            llama(tokens(1, 60), use_cache=use_cache)

    with attach(llama, page_size=16, num_pages=4) as attached:
        handle = llama.model.layers[-1].register_forward_hook(interrupt)
        if again == "same thread":
            interrupted()
        else:
            thread = threading.Thread(target=interrupted)
            thread.start()
            thread.join(60)
        handle.remove()
        with torch.no_grad():
            out = llama(tokens(1, 60), use_cache=False)
            assert attached.manager.num_pages_in_use == 0
            assert llama(tokens(1, 60)).logits.equal(out.logits)


def test_an_interrupted_pass_leaves_its_cache_as_it_was(llama, tokens):
    def interrupt(*args):
        raise KeyboardInterrupt

    ids = tokens(1, 40)
    with attach(llama), torch.no_grad():
        past = llama(ids[:, :30]).past_key_values
        handle = llama.model.layers[-1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            llama(ids[:, 30:], past_key_values=past)
        handle.remove()
        got = llama(ids[:, 30:], past_key_values=past).logits
        assert past.get_seq_length() == 40
    with torch.no_grad():
        assert torch.allclose(got, llama(ids).logits[:, 30:], atol=1e-4)


@torch.no_grad()
def test_attention_that_was_chosen_anew_is_refused(tiny, tokens, config):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config("llama")).eval()
    with attach(model):
        model.set_attn_implementation("sdpa")
        with pytest.raises(AttachError, match=r"set to 'sdpa' after that: call \.detach\(\)"):
            model.generate(tokens(1, 8), max_new_tokens=2)


@torch.no_grad()
def test_right_padding_of_one_pass_gives_the_logits_of_stock_attention(llama, tokens):
    ids, mask = padded(tokens, [40, 23], "right")
    want = llama(ids, attention_mask=mask).logits
    with attach(llama):
        got = llama(ids, attention_mask=mask).logits
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-4)


@torch.no_grad()
def test_padding_between_tokens_needs_positions(llama, tokens):
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.int64)
    mask[0, 10:15] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = llama(ids, attention_mask=mask, position_ids=positions).logits
    with attach(llama) as attached:
        with pytest.raises(UnsupportedCall, match="padding between tokens: pad on the left"):
            llama(ids, attention_mask=mask)
        assert attached.manager.num_pages_in_use == 0
        got = llama(ids, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(got[mask.bool()], want[mask.bool()], atol=1e-4)


@torch.no_grad()
def test_going_on_behind_right_padding_needs_positions(llama, tokens):
    ids, mask = padded(tokens, [10, 6], "right")
    following, longer = tokens(2, 1, seed=9), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    where = torch.tensor([[10], [6]])
    past = llama(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
    want = llama(following, attention_mask=longer, past_key_values=past, position_ids=where).logits
    with attach(llama):
        past = llama(ids, attention_mask=mask).past_key_values
        with pytest.raises(UnsupportedCall, match="padding between tokens"):
            llama(following, attention_mask=longer, past_key_values=past)
        got = llama(following, attention_mask=longer, past_key_values=past, position_ids=where).logits
    assert torch.allclose(got, want, atol=1e-4)


def test_generation_behind_right_padding_is_told_to_pad_on_the_left(llama, tokens):
    ids, mask = padded(tokens, [10, 6], "right")
    with attach(llama), pytest.raises(UnsupportedCall, match=r'pad on the left \(tokenizer\.padding_side = "left"\)'):
        llama.generate(ids, attention_mask=mask, max_new_tokens=3)


@pytest.mark.parametrize("kinds", [False, True], ids=["ids alone", "all of one kind"])
def test_a_multimodal_model_generates_from_text(kinds, multimodal, tokens):
    ids = tokens(1, 20).clamp(max=90)
    given = {"token_type_ids": torch.zeros_like(ids)} if kinds else {}
    want = multimodal.generate(ids, max_new_tokens=5, do_sample=False, **given)
    with attach(multimodal):
        got = multimodal.generate(ids, max_new_tokens=5, do_sample=False, **given)
    assert torch.equal(got, want)


@pytest.mark.parametrize("lengths", [[30], [30, 19]], ids=["single", "left-padded batch"])
def test_a_model_with_planes_of_positions_generates_from_text(lengths, seeing, tokens):
    ids, mask = padded(tokens, lengths, "left")
    ids = ids.clamp(max=90)
    want = seeing.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    with attach(seeing):
        got = seeing.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, want)


@torch.no_grad()
@pytest.mark.parametrize("planes", [3, 4])
def test_a_plane_with_other_positions_is_refused(planes, seeing, tokens):
    ids = tokens(1, 20).clamp(max=90)
    positions = torch.arange(20).repeat(planes, 1, 1)
    with attach(seeing):
        seeing(ids, position_ids=positions)
        positions[1, 0, 10:] += 1
        with pytest.raises(UnsupportedCall, match="position_ids must count the tokens of each row"):
            seeing(ids, position_ids=positions)


def test_tokens_of_another_kind_are_refused(multimodal, tokens):
    ids = tokens(1, 20).clamp(max=90)
    with attach(multimodal), pytest.raises(UnsupportedCall, match="token_type_ids change which tokens see each other"):
        multimodal(ids, token_type_ids=torch.ones_like(ids))
