"""MoBA by the definition of arXiv:2502.13189, section 2.2: one query, one head at a time."""

from __future__ import annotations

import pytest
import torch

from foveate.sparse_attn import registry
from foveate.sparse_attn.protocol import Phase

from .oracle import PURE, Pages, Text, agrees, answer, best, causal, logits, whole

SHAPES = [(1, 1, 1), (15, 2, 1), (16, 1, 7), (17, 2, 3), (53, 2, 3), (63, 1, 7), (111, 2, 1), (1000, 1, 3)]


def moba_mask(q, k, block, top_k, first=False, shared=False, every_row=True):
    """``[H, N, N]``: ``top_k`` counts a query's own block, not a ``first`` kept beside it; the later of equal ones."""
    tokens, heads = q.shape[:2]
    blocks = torch.arange(tokens) // block
    means = torch.stack([k[blocks == j].double().mean(0) for j in range(int(blocks[-1]) + 1)])
    gates = logits(q, means)
    if shared:
        group = heads // k.shape[1]
        gates = gates.unflatten(0, (-1, group)).sum(1).repeat_interleave(group, 0)
    mask = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for head in range(heads):
        for row in range(0 if every_row else tokens - 1, tokens):
            own, kept = int(blocks[row]), int(first)
            past = best(gates[head, row, kept:own].tolist(), top_k - 1, later_first=True)
            for chosen in {own, *(index + kept for index in past), *range(kept)}:
                mask[head, row] |= blocks == chosen
    return mask & causal(tokens)


def moba(**options):
    return registry.build("moba", **PURE | {"dense_last_layers": 0} | options)


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompt(shape, top_k):
    tokens, kv_heads, group = shape
    block = 64 if tokens == 1000 else 16
    text = Text(tokens, kv_heads=kv_heads, group=group, coarse=True, seed=tokens)
    agrees(whole(moba(block_tokens=block, top_k=top_k), text), moba_mask(text.q[0], text.k[0], block, top_k), text)


@pytest.mark.parametrize(("block", "page"), [(16, 64), (64, 16), (128, 32), (8, 16), (1, 16)])
def test_blocks_and_pages_of_other_sizes(block, page):
    text = Text(200, coarse=True, group=3)
    agrees(whole(moba(block_tokens=block, top_k=3), text, page), moba_mask(text.q[0], text.k[0], block, 3), text)


@pytest.mark.parametrize("cuts", [(1,), (16, 17, 90), (63, 64, 65), (111,)], ids=str)
def test_a_prompt_in_chunks(cuts):
    text = Text(112, coarse=True)
    agrees(whole(moba(block_tokens=16, top_k=3), text, cuts=cuts), moba_mask(text.q[0], text.k[0], 16, 3), text)


def test_a_batch():
    texts = [Text(tokens, coarse=True, seed=tokens) for tokens in (1, 47, 111, 16)]
    for text, got in zip(
        texts, Pages(moba(block_tokens=16, top_k=2), texts).read([(0, t.tokens) for t in texts]), strict=True
    ):
        agrees(got, moba_mask(text.q[0], text.k[0], 16, 2), text)


def test_a_budget_of_the_context_is_dense_and_one_block_is_block_diagonal():
    text = Text(111)
    agrees(whole(moba(block_tokens=16, top_k=7), text), causal(111).expand(4, -1, -1), text)
    agrees(whole(moba(block_tokens=16, budget_tokens=112), text), causal(111).expand(4, -1, -1), text)
    diagonal = torch.block_diag(*[torch.ones(16, 16)] * 7)[:111, :111].bool() & causal(111)
    agrees(whole(moba(block_tokens=16, top_k=1), text), diagonal.expand(4, -1, -1), text)


def test_of_equal_blocks_the_later_is_read():
    text = Text(80)
    text.k[:] = text.k[:, :1]
    got = whole(moba(block_tokens=16, top_k=3), text).mask[0]
    assert got[0, 79].nonzero().flatten().tolist() == list(range(32, 80))
    agrees(whole(moba(block_tokens=16, top_k=3), text), moba_mask(text.q[0], text.k[0], 16, 3), text)


def test_heads_of_a_group_choose_for_themselves():
    text = Text(64, kv_heads=1, group=2, coarse=True)
    text.q[0, :, 1] = -text.q[0, :, 0]
    want = moba_mask(text.q[0], text.k[0], 16, 2)
    agrees(whole(moba(block_tokens=16, top_k=2), text), want, text)
    assert (want[0, 63] != want[1, 63]).any()


@pytest.mark.parametrize("length", [0.001, 1.0, 300.0])
def test_a_planted_block_is_found_at_any_length_of_the_query(length):
    text = Text(160, kv_heads=1, group=1)
    text.k[0, 32:48] = 3 * text.q[0, 159]
    text.q[0, 159] *= length
    got = whole(moba(block_tokens=16, top_k=2), text).mask[0]
    assert got[0, 159].nonzero().flatten().tolist() == [*range(32, 48), *range(144, 160)]


def test_keys_of_the_own_block_and_behind_choose_nothing():
    text, other = Text(100), Text(100)
    other.k[0, 88:] = 50 * text.q[0, 87, ::2]
    one, two = (whole(moba(block_tokens=16, top_k=3), each) for each in (text, other))
    assert torch.equal(one.out[0, :88], two.out[0, :88])
    assert torch.equal(one.mask[0, :, :88], two.mask[0, :, :88])


@pytest.mark.parametrize("tokens", [1, 2, 17, 63, 112, 1000])
@pytest.mark.parametrize("group", [1, 7])
def test_an_answer_chooses_as_a_prompt_if_asked_to(tokens, group):
    text = Text(tokens, kv_heads=1, group=group, coarse=True, seed=3)
    want = moba_mask(text.q[0], text.k[0], 16, 4, every_row=False)
    agrees(answer(moba(block_tokens=16, top_k=4, sparse_decode=True), text), want, text)


def test_an_answer_is_dense_in_the_paper():
    scheme = moba(block_tokens=16, top_k=2)
    assert scheme.for_phase(Phase.DECODE).name == "dense"
    text = Text(90)
    agrees(answer(scheme, text), causal(90).expand(4, -1, -1), text)


def test_options_of_ours():
    text = Text(140, group=3, coarse=True)
    scheme = moba(block_tokens=16, top_k=3, keep_first_block=True)
    agrees(whole(scheme, text), moba_mask(text.q[0], text.k[0], 16, 3, first=True), text)
    scheme = moba(block_tokens=16, top_k=3, share_heads=True)
    agrees(whole(scheme, text), moba_mask(text.q[0], text.k[0], 16, 3, shared=True), text)
    scheme = moba(block_tokens=16, budget_tokens=50)  # four blocks hold as many
    agrees(whole(scheme, text), moba_mask(text.q[0], text.k[0], 16, 4), text)


def test_the_last_layers_are_dense():
    text = Text(100, layers=4, coarse=True)
    got = whole(moba(block_tokens=16, top_k=2, dense_last_layers=3), text)
    agrees(got, moba_mask(text.q[0], text.k[0], 16, 2), text)
    for layer in (1, 2, 3):
        agrees(got, causal(100).expand(4, -1, -1), text, layer)
