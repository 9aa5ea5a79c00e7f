"""Quest by the definition of arXiv:2406.10774, section 3: the highest logit that a page's extremes allow."""

from __future__ import annotations

import pytest
import torch

from foveate.sparse_attn import registry
from foveate.sparse_attn.protocol import Phase, Role

from .oracle import PURE, Pages, Text, agrees, answer, best, causal, logits, whole

NOTHING_DENSE = {"dense_first_layers": 0, "group": "none"}


def bounds(q, k, page):
    """``[H, P]`` for one query ``[H, D]``: for each page the sum over channels of the larger product."""
    group = q.shape[0] // k.shape[1]
    pages = []
    for start in range(0, len(k), page):
        rows = k[start : start + page].double().repeat_interleave(group, 1)
        low, high = rows.amin(0), rows.amax(0)
        pages.append(torch.maximum(q.double() * low, q.double() * high).sum(-1))
    return torch.stack(pages, 1)


def quest_mask(q, k, page, count, group="none", scale=1.0):
    """``[H, 1, N]`` of the last query: the open page is read beside the ``count`` best full ones before it."""
    scores, heads, tokens = bounds(q[-1], k, page), q.shape[1], len(k)
    open_page = (tokens - 1) // page
    scores = scores[:, :open_page].unflatten(0, (k.shape[1], -1))
    if group == "max":
        scores = scores.amax(1, keepdim=True).expand_as(scores)
    elif group == "sum":
        scores = scores.sum(1, keepdim=True).expand_as(scores)
    elif group == "softmax":
        scores = (scores * scale).softmax(-1).sum(1, keepdim=True).expand_as(scores)
    mask = torch.zeros(heads, 1, tokens, dtype=torch.bool)
    for head, row in enumerate(scores.flatten(0, 1)):
        for chosen in [*best(row.tolist(), count), open_page]:
            mask[head, 0, chosen * page : (chosen + 1) * page] = True
    return mask


def quest(**options):
    return registry.build("quest", **PURE | NOTHING_DENSE | options)


SHAPES = [(1, 1, 1), (16, 2, 3), (17, 2, 1), (63, 1, 7), (64, 2, 3), (65, 2, 2), (111, 1, 3), (1000, 2, 7)]


@pytest.mark.parametrize("budget", [16, 48, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_answer(shape, budget):
    tokens, kv_heads, group = shape
    text = Text(tokens, 1, kv_heads, group, coarse=True, seed=tokens)
    scheme = quest(budget_tokens=budget, min_pages=1)
    agrees(answer(scheme, text), quest_mask(text.q[0], text.k[0], 16, budget // 16), text)


@pytest.mark.parametrize("page", [32, 64, 128])
def test_pages_of_other_sizes(page):
    text = Text(200, group=3, coarse=True)
    want = quest_mask(text.q[0], text.k[0], page, max(3, 64 // page))
    agrees(answer(quest(budget_tokens=64), text, page), want, text)


def test_three_pages_at_least():
    text = Text(170, coarse=True)
    want = quest_mask(text.q[0], text.k[0], 16, 3)
    for budget in (16, 32, 63):
        agrees(answer(quest(budget_tokens=budget), text), want, text)
    agrees(answer(quest(budget_tokens=64), text), quest_mask(text.q[0], text.k[0], 16, 4), text)


@pytest.mark.parametrize("group", ["none", "max", "sum"])
def test_heads_that_choose_together(group):
    text = Text(150, group=3, coarse=True, seed=2)
    want = quest_mask(text.q[0], text.k[0], 16, 2, group)
    agrees(answer(quest(budget_tokens=32, min_pages=1, group=group), text), want, text)


def test_heads_that_choose_together_by_softmax():
    text = Text(150, group=3, seed=2)
    want = quest_mask(text.q[0], text.k[0], 16, 2, "softmax", text.scale)
    agrees(answer(quest(budget_tokens=32, min_pages=1, group="softmax"), text), want, text)


def test_a_bound_is_no_less_than_any_logit_of_its_page():
    text = Text(160, coarse=True)
    scores = logits(text.q[0, -1:], text.k[0])[:, 0].unflatten(1, (-1, 16)).amax(-1)
    assert (bounds(text.q[0, -1], text.k[0], 16) >= scores).all()


def test_negative_channels_take_the_minimum():
    """A page is chosen for its least keys where a query is negative: by mean or maximum another one would be."""
    text = Text(80, kv_heads=1, group=1)
    text.k[:] = 0
    text.q[0, 79] = -1
    text.k[0, 20], text.k[0, 21] = -3, 3  # its mean is 0
    text.k[0, 32:48] = 1
    text.k[0, 48:64] = -0.5
    got = answer(quest(budget_tokens=16, min_pages=1), text)
    assert got.mask[0, 0, 0].nonzero().flatten().tolist() == [*range(16, 32), *range(64, 80)]


def test_of_equal_pages_the_first_is_read():
    text = Text(90)
    text.k[:] = text.k[:, :1]
    got = answer(quest(budget_tokens=32, min_pages=1), text)
    assert got.mask[0, 0, 0].nonzero().flatten().tolist() == [*range(32), *range(80, 90)]


def test_extremes_follow_a_growing_page():
    """Read token by token: each answer's mask is that of its own length."""
    text = Text(90, coarse=True)
    pages = Pages(quest(budget_tokens=32, min_pages=1), [text])
    pages.read([(0, 40)])
    for at in range(40, 90):
        got = pages.read([(at, at + 1)], Phase.DECODE)[0]
        agrees(got, quest_mask(text.q[0, : at + 1], text.k[0, : at + 1], 16, 2), text)


def test_a_batch():
    texts = [Text(tokens, coarse=True, seed=tokens) for tokens in (1, 50, 170)]
    pages = Pages(quest(budget_tokens=32, min_pages=1), texts)
    pages.read([(0, 0), (0, 49), (0, 169)])
    got = pages.read([(0, 1), (49, 50), (169, 170)], Phase.DECODE)
    for text, one in zip(texts, got, strict=True):
        agrees(one, quest_mask(text.q[0], text.k[0], 16, 2), text)


def test_the_prompt_and_two_layers_are_dense():
    scheme = registry.build("quest", **PURE, group="none", budget_tokens=16, min_pages=1)
    assert scheme.for_phase(Phase.PREFILL).name == "dense"
    assert [role.role for role in scheme.roles(4)] == [Role.DENSE, Role.DENSE, Role.SELECT, Role.SELECT]
    text = Text(100, 4, coarse=True)
    agrees(whole(scheme, text), causal(100).expand(4, -1, -1), text, 3)
    got = answer(scheme, text)
    for layer in (0, 1):
        agrees(got, causal(100).expand(4, -1, -1), text, layer)
    for layer in (2, 3):
        agrees(got, quest_mask(text.q[layer], text.k[layer], 16, 1), text, layer)


@pytest.mark.parametrize("budget", [96, 100, 10_000])
def test_the_whole_context_as_budget_is_dense(budget):
    text = Text(111)
    agrees(answer(quest(budget_tokens=budget), text), causal(111).expand(4, -1, -1), text)
