"""XAttention by the definition of arXiv:2503.16428, section 2: sums along antidiagonals, one tile at a time."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.sparse_attn import registry
from foveate.sparse_attn.protocol import Phase

from .oracle import PURE, Pages, Text, agrees, answer, causal, whole


def shares(q, k, stride, block, scale):
    """``[H, B, B]``: what each block of keys holds of the estimated attention of each block of queries.

    Tokens that are missing in the last tile of ``stride`` count as zeros.
    """
    tokens, heads = q.shape[:2]
    pad = -tokens % stride
    q = torch.nn.functional.pad(q.double(), (0, 0, 0, 0, 0, pad))
    k = torch.nn.functional.pad(k.double(), (0, 0, 0, 0, 0, pad)).repeat_interleave(heads // k.shape[1], 1)
    lines = len(q) // stride
    estimate = torch.full((heads, lines, lines), float("-inf"), dtype=torch.float64)
    for row in range(lines):
        for column in range(row + 1):
            turned = q[row * stride : (row + 1) * stride].flip(0)
            estimate[:, row, column] = (turned * k[column * stride : (column + 1) * stride]).sum((0, 2))
    estimate = (estimate * scale / stride).softmax(-1)
    per, blocks = block // stride, -(-tokens // block)
    estimate = torch.nn.functional.pad(estimate, (0, blocks * per - lines, 0, blocks * per - lines))
    return estimate.unflatten(2, (blocks, per)).sum(3).unflatten(1, (blocks, per)).sum(2)


def xattention_mask(text, stride, block, tau, budget=0, group="none"):
    """``[H, N, N]``: first block and diagonal, then the best while those before hold less than ``tau``."""
    mass = shares(text.q[0], text.k[0], stride, block, text.scale)
    if group == "sum":
        mass = mass.unflatten(0, (-1, text.group)).sum(1).repeat_interleave(text.group, 0)
    blocks = mass.shape[1]
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    for head in range(mass.shape[0]):
        for row in range(blocks):
            forced = {0, row} if not budget else {row}
            held = sum(mass[head, row, j].item() for j in forced)
            rest = sorted((j for j in range(row + 1) if j not in forced), key=lambda j: (-mass[head, row, j].item(), j))
            for place, j in enumerate(rest):
                goal = tau * mass[head, row].sum().item()
                assert abs(held - goal) > 1e-5 * goal, "choose another seed"
                if held >= goal:
                    break
                forced.add(j)
                held += mass[head, row, j].item()
                assert place == 0 or mass[head, row, rest[place - 1]] > mass[head, row, j] * (1 + 1e-6)
            chosen[head, row, list(forced)] = True
    grown = chosen.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : text.tokens, : text.tokens]
    return grown & causal(text.tokens)


def xattention(**options):
    return registry.build("xattention", **PURE | options)


SHAPES = [(1, 1, 1), (15, 2, 3), (16, 2, 1), (17, 1, 7), (63, 2, 3), (64, 2, 1), (111, 1, 7), (130, 2, 3)]


@pytest.mark.parametrize("tau", [0.3, 0.7, 0.9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prompt(shape, tau):
    tokens, kv_heads, group = shape
    text = Text(tokens, 1, kv_heads, group, seed=tokens)
    text.q *= 2
    scheme = xattention(block_tokens=16, stride_tokens=4, tau=tau)
    agrees(whole(scheme, text), xattention_mask(text, 4, 16, tau), text)


@pytest.mark.parametrize(
    ("stride", "block", "page"), [(2, 16, 16), (8, 16, 32), (8, 64, 16), (16, 32, 64), (16, 128, 16), (4, 64, 32)]
)
def test_strides_and_blocks_of_other_sizes(stride, block, page):
    text = Text(300 if block > 16 else 111, 1, 1, 3, seed=1)
    text.q *= 4
    scheme = xattention(block_tokens=block, stride_tokens=stride, tau=0.6)
    agrees(whole(scheme, text, page), xattention_mask(text, stride, block, 0.6), text)


def test_the_papers_sizes():
    text = Text(1000, 1, 1, 3, seed=4)
    text.q *= 8
    want = xattention_mask(text, 16, 128, 0.5)
    agrees(whole(xattention(block_tokens=128, stride_tokens=16, tau=0.5), text), want, text)
    assert want.sum() < 0.9 * 3 * causal(1000).sum()


@pytest.mark.parametrize("cuts", [(16,), (64, 80), (32, 112, 128)], ids=str)
def test_a_prompt_cut_between_blocks(cuts):
    """In a prompt that comes in chunks each row is normalised over all keys before it."""
    text = Text(140, seed=2)
    text.q *= 2
    scheme = xattention(block_tokens=16, stride_tokens=4, tau=0.5)
    agrees(whole(scheme, text, cuts=cuts), xattention_mask(text, 4, 16, 0.5), text)


def test_antidiagonals_pair_the_last_query_with_the_first_key():
    """All heads but one product vanish: query ``3`` of a tile of 4 meets key ``0`` of it, so only that block counts."""
    text = Text(64, kv_heads=1, group=1, dim=16)
    text.q[:], text.k[:] = 0, 0
    text.q[0, 51], text.k[0, 20] = 8, 8  # places 3 and 0 of their tiles: on the line
    text.k[0, 37] = 80  # place 1: off the line of query 51
    got = whole(xattention(block_tokens=16, stride_tokens=4, tau=0.4), text).mask[0, 0, 63]
    assert got.nonzero().flatten().tolist() == [*range(32), *range(48, 64)]


def test_the_first_block_of_keys_is_kept_and_not_the_first_row():
    text = Text(80, kv_heads=1, group=1)
    text.k[0, :16] = -20 * text.q[0, 64]
    got = whole(xattention(block_tokens=16, stride_tokens=4, tau=0.01), text).mask[0, 0]
    for row in range(80):
        own = row // 16 * 16
        assert got[row].nonzero().flatten().tolist() == sorted({*range(16), *range(own, 80)} & {*range(row + 1)})


def test_no_share_and_every_share():
    text = Text(111, seed=3)
    agrees(whole(xattention(block_tokens=16, stride_tokens=8, tau=1.0), text), causal(111).expand(4, -1, -1), text)


def test_a_batch():
    texts = [Text(tokens, seed=tokens) for tokens in (1, 47, 100)]
    got = Pages(xattention(block_tokens=16, stride_tokens=4, tau=0.6), texts).read([(0, t.tokens) for t in texts])
    for text, one in zip(texts, got, strict=True):
        agrees(one, xattention_mask(text, 4, 16, 0.6), text)


def test_heads_that_choose_together():
    text = Text(130, group=3, seed=6)
    text.q *= 2
    scheme = xattention(block_tokens=16, stride_tokens=4, tau=0.5, group="sum")
    agrees(whole(scheme, text), xattention_mask(text, 4, 16, 0.5, group="sum"), text)


def test_an_answer_is_dense():
    text = Text(90)
    scheme = xattention(block_tokens=16, stride_tokens=4, tau=0.1)
    assert scheme.for_phase(Phase.DECODE).name == "dense"
    agrees(answer(scheme, text), causal(90).expand(4, -1, -1), text)


def test_a_share_of_the_attention_means_what_it_says():
    """A tile's row total is its number of rows of the estimate: the mass of each row is 1."""
    text = Text(128, seed=5)
    mass = shares(text.q[0], text.k[0], 4, 16, text.scale)
    assert mass.sum(-1).flatten().tolist() == pytest.approx([4] * 32)
    assert math.isclose(mass[:, 0, 0].min().item(), 4)
