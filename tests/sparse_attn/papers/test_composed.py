"""Composed: each phase is what its part's own oracle says, keys and statistics of one pool serving both."""

from __future__ import annotations

import pytest

from foveate.sparse_attn import registry
from foveate.sparse_attn.protocol import Phase

from ..cases import kascade_profile
from .oracle import PURE, Pages, Text, agrees, answer, causal, whole
from .test_kascade import ANCHORS, MAP, answer_masks, prompt_masks
from .test_moba import moba_mask
from .test_quest import NOTHING_DENSE, quest_mask
from .test_xattention import xattention_mask

XATTENTION = {"scheme": "xattention", "block_tokens": 16, "stride_tokens": 4, "tau": 0.5} | PURE
QUEST = {"scheme": "quest", "budget_tokens": 32, "min_pages": 1} | NOTHING_DENSE | PURE
MOBA = {"scheme": "moba", "block_tokens": 16, "top_k": 2, "dense_last_layers": 0} | PURE
KASCADE = {"scheme": "kascade", "budget_tokens": 9, "tile_tokens": 16} | PURE


def composed(prefill, decode):
    profiles = {"kascade": kascade_profile(ANCHORS, MAP)}
    return registry.build("composed", profiles, prefill=prefill, decode=decode)


@pytest.mark.parametrize("tokens", [1, 17, 63, 111, 500])
def test_xattention_then_quest(tokens):
    text = Text(tokens, group=3, seed=tokens)
    scheme = composed(XATTENTION, QUEST)
    agrees(whole(scheme, text), xattention_mask(text, 4, 16, 0.5), text)
    agrees(answer(scheme, text), quest_mask(text.q[0], text.k[0], 16, 2), text)


@pytest.mark.parametrize("group", [1, 7])
def test_moba_then_quest(group):
    text = Text(120, kv_heads=1, group=group, coarse=True)
    scheme = composed(MOBA, QUEST)
    agrees(whole(scheme, text), moba_mask(text.q[0], text.k[0], 16, 2), text)
    agrees(answer(scheme, text), quest_mask(text.q[0], text.k[0], 16, 2), text)


def test_moba_in_both_phases_generates_densely_unless_told():
    text = Text(120, coarse=True)
    agrees(answer(composed(MOBA, MOBA), text), causal(120).expand(4, -1, -1), text)
    want = moba_mask(text.q[0], text.k[0], 16, 2)
    agrees(answer(composed(MOBA, MOBA | {"sparse_decode": True}), text), want, text)


def test_kascade_then_quest_and_the_other_way_round():
    text = Text(100, 4, group=2)
    got = whole(composed(KASCADE, QUEST), text)
    want = prompt_masks(text, ANCHORS, MAP, 16, budget_tokens=9)
    for layer in range(4):
        agrees(got, want[layer], text, layer)
    got = answer(composed(KASCADE, QUEST), text)
    for layer in range(4):
        agrees(got, quest_mask(text.q[layer], text.k[layer], 16, 2), text, layer)
    got = answer(composed("dense", KASCADE), text)
    want = answer_masks(text, ANCHORS, MAP, budget_tokens=9)
    for layer in range(4):
        agrees(got, want[layer], text, layer)


@pytest.mark.parametrize("page", [16, 32])
def test_dense_prompt_then_quest(page):
    text = Text(140, coarse=True)
    agrees(whole(composed("dense", QUEST), text), causal(140).expand(4, -1, -1), text)
    agrees(answer(composed("dense", QUEST), text, page), quest_mask(text.q[0], text.k[0], page, 32 // page), text)


def test_parts_keep_their_own_sinks_and_window():
    """Kept keys come on top of a part's choice, and are no candidates of it."""
    text = Text(150, coarse=True)
    got = answer(composed("dense", QUEST | {"sink_tokens": 16, "window_tokens": 32}), text).mask[0]
    assert got[:, 0, :16].all()
    assert got[:, 0, 112:].all()
    pages = got[:, 0, 16:112].unflatten(1, (-1, 16)).any(-1).sum(-1)
    assert pages.tolist() == [2, 2, 2, 2]


def test_a_batch_and_an_answer_of_several_tokens():
    texts = [Text(tokens, coarse=True, seed=tokens) for tokens in (20, 61, 130)]
    pages = Pages(composed(MOBA, QUEST), texts)
    for text, got in zip(texts, pages.read([(0, text.tokens - 5) for text in texts]), strict=True):
        stop = text.tokens - 5
        agrees(got, moba_mask(text.q[0, :stop], text.k[0, :stop], 16, 2), text)
    for left in range(5, 0, -1):
        spans = [(text.tokens - left, text.tokens - left + 1) for text in texts]
        for text, got in zip(texts, pages.read(spans, Phase.DECODE), strict=True):
            stop = text.tokens - left + 1
            agrees(got, quest_mask(text.q[0, :stop], text.k[0, :stop], 16, 2), text)
