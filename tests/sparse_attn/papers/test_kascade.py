"""Kascade by the definition of arXiv:2512.16391, section 3: probabilities of all keys, pooled and sorted."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.sparse_attn import registry

from ..cases import kascade_profile
from .oracle import PURE, Pages, Text, agrees, answer, best, causal, logits, whole


def pooled(text, layer, rows, stop, everything=False):
    """``[G, stop]``: the probabilities of ``rows``, summed over them and over the heads of a group (or all heads)."""
    scores = logits(text.q[layer, rows], text.k[layer, :stop]) * text.scale
    scores = scores.masked_fill(~causal(stop)[rows], float("-inf"))
    mass = scores.softmax(-1).sum(1).unflatten(0, (-1, text.group)).sum(1)
    return mass.sum(0).expand_as(mass) if everything else mass


def budget_of(options, keys):
    if options.get("budget_tokens"):
        return min(options["budget_tokens"], keys)
    fraction, floor = options.get("budget_fraction", 0.1), options.get("min_budget_tokens", 128)
    return min(max(math.floor(fraction * keys), floor), keys)


def prompt_masks(text, anchors, head_map, tile, scored=0, everything=False, **options):
    """``[L, H, N, N]``: the rolling budget; layer 0 chooses and is dense."""
    tokens, kv_heads = text.tokens, text.k.shape[2]
    masks = torch.zeros(text.layers, kv_heads, tokens, tokens, dtype=torch.bool)
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        chosen = []
        for layer in range(text.layers):
            rows = list(range(stop - 1, start - 1, -(tile // scored) if scored else -1))
            if layer in anchors:
                mass = pooled(text, layer, rows, stop, everything)[:, :start]
                chosen = [best(one.tolist(), budget_of(options, start)) for one in mass]
            for head in range(kv_heads):
                source = head if layer in anchors else head_map[layer][head]
                masks[layer, head, start:stop, chosen[source]] = True
                masks[layer, head, start:stop, start:stop] = True
    masks[0] = True
    return (masks & causal(tokens)).repeat_interleave(text.group, 1)


def answer_masks(text, anchors, head_map, everything=False, **options):
    """``[L, H, 1, N]``: all keys are candidates and none is forced in."""
    tokens, kv_heads = text.tokens, text.k.shape[2]
    masks = torch.zeros(text.layers, kv_heads, 1, tokens, dtype=torch.bool)
    chosen = []
    for layer in range(text.layers):
        if layer in anchors:
            mass = pooled(text, layer, slice(tokens - 1, tokens), tokens, everything)
            chosen = [best(one.tolist(), budget_of(options, tokens)) for one in mass]
        for head in range(kv_heads):
            masks[layer, head, 0, chosen[head if layer in anchors else head_map[layer][head]]] = True
    masks[0] = True
    return masks.repeat_interleave(text.group, 1)


ANCHORS = [0, 2]
MAP = [[0, 1], [1, 0], [0, 1], [1, 1], [0, 0]]
ONE_HEAD = [[0]] * 5


def kascade(head_map=MAP, anchors=ANCHORS, **options):
    profiles = {"kascade": kascade_profile(anchors, head_map)}
    return registry.build("kascade", profiles, **PURE | options)


def all_layers(got, want, text):
    for layer in range(text.layers):
        agrees(got, want[layer], text, layer)


# Tokens, KV heads, group, seed.
SHAPES = [(1, 2, 1, 0), (15, 2, 3, 0), (16, 2, 1, 0), (17, 1, 7, 0), (63, 2, 3, 0), (111, 1, 7, 0), (130, 2, 1, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget", [1, 20])
def test_prompt(shape, budget):
    tokens, kv_heads, group, seed = shape
    text, head_map = Text(tokens, 5, kv_heads, group, seed=seed), MAP if kv_heads == 2 else ONE_HEAD
    scheme = kascade(head_map, budget_tokens=budget, tile_tokens=16)
    all_layers(whole(scheme, text), prompt_masks(text, ANCHORS, head_map, 16, budget_tokens=budget), text)


@pytest.mark.parametrize("shape", [*SHAPES[1:], (1000, 2, 3, 1)], ids=str)
def test_answer(shape):
    tokens, kv_heads, group, seed = shape
    text, head_map = Text(tokens, 5, kv_heads, group, seed=seed), MAP if kv_heads == 2 else ONE_HEAD
    scheme = kascade(head_map, budget_tokens=12, tile_tokens=16)
    all_layers(answer(scheme, text), answer_masks(text, ANCHORS, head_map, budget_tokens=12), text)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_the_rolling_budget_has_a_floor(fraction):
    text = Text(600, 3, group=2, seed=2)
    options = {"budget_fraction": fraction}
    want = prompt_masks(text, ANCHORS, MAP, 32, **options)
    all_layers(whole(kascade(**options), text), want, text)
    assert want[1, 0, 250].sum() == 128 + 27  # 224 keys before the tile, and 27 of its own
    all_layers(answer(kascade(**options), text), answer_masks(text, ANCHORS, MAP, **options), text)


@pytest.mark.parametrize("tokens", [31, 32, 33, 100, 128])
def test_short_contexts_are_dense(tokens):
    text = Text(tokens, 3)
    all_layers(whole(kascade(), text), causal(tokens).expand(3, 4, -1, -1), text)
    all_layers(answer(kascade(), text), causal(tokens).expand(3, 4, -1, -1), text)


def test_the_whole_context_as_budget_is_dense():
    text = Text(300, 3)
    for options in ({"budget_fraction": 1.0}, {"budget_tokens": 300}, {"budget_tokens": 100_000}):
        all_layers(whole(kascade(**options), text), causal(300).expand(3, 4, -1, -1), text)
        all_layers(answer(kascade(**options), text), causal(300).expand(3, 4, -1, -1), text)


def test_every_layer_an_anchor_is_top_k_of_each():
    text, everyone = Text(111, 5, group=3), [0, 1, 2, 3, 4]
    scheme = kascade([[0, 1]] * 5, everyone, budget_tokens=9, tile_tokens=16)
    all_layers(whole(scheme, text), prompt_masks(text, everyone, MAP, 16, budget_tokens=9), text)
    all_layers(answer(scheme, text), answer_masks(text, everyone, MAP, budget_tokens=9), text)


def test_a_layer_like_its_anchor_does_as_its_anchor():
    text = Text(100, 4)
    for part in (text.q, text.k, text.v):
        part[3] = part[2]
    got = whole(kascade([[0, 1]] * 4, budget_tokens=10, tile_tokens=16), text)
    torch.testing.assert_close(got.out[3], got.out[2], atol=1e-6, rtol=0)


def test_the_head_map_names_heads_of_the_anchor():
    """Exchanging an anchor's heads and the map's numbers alike changes nothing in the layers that reuse."""
    text, turned = Text(100, 4), Text(100, 4)
    turned.k[2], turned.q[2] = text.k[2].flip(1), text.q[2].unflatten(1, (2, 2)).flip(1).flatten(1, 2)
    one = whole(kascade([[0, 1]] * 3 + [[0, 0]], budget_tokens=10, tile_tokens=16), text)
    two = whole(kascade([[0, 1]] * 3 + [[1, 1]], budget_tokens=10, tile_tokens=16), turned)
    assert torch.equal(one.mask[3], two.mask[3])
    assert not torch.equal(one.mask[2], two.mask[2])


def test_probabilities_are_pooled_and_not_scores():
    """A head of great norm has no more than one vote: its best key is not chosen twice over."""
    text = Text(64, 1, kv_heads=1, group=2)
    text.q[0, 63, 0] *= 1000
    text.k[0, 5], text.k[0, 40] = text.q[0, 63, 0] / 300, 20 * text.q[0, 63, 1]
    mass = pooled(text, 0, slice(63, 64), 64)
    assert mass.sum().item() == pytest.approx(2)
    text = Text(64, 2, kv_heads=1, group=2)
    text.q[0], text.k[0] = Text(64, 1, 1, 2, seed=8).q[0], Text(64, 1, 1, 2, seed=8).k[0]
    text.q[0, 63, 0] *= 1000
    got = answer(kascade(ONE_HEAD, anchors=[0], budget_tokens=8), text)
    all_layers(got, answer_masks(text, [0], ONE_HEAD, budget_tokens=8), text)
    by_score = logits(text.q[0, 63:], text.k[0]).sum(0)[0].topk(8).indices
    assert not got.mask[1, 0, 0, by_score].all()


def test_a_prefix_reads_as_the_beginning_of_the_prompt():
    text = Text(450, 3)
    options = {"budget_fraction": 0.2, "min_budget_tokens": 30}
    short, full = Text(450, 3), prompt_masks(text, ANCHORS, MAP, 32, **options)
    short.tokens = 320
    for name in "qkv":
        setattr(short, name, getattr(short, name)[:, :320])
    all_layers(whole(kascade(**options), short), full[:, :, :320, :320], short)
    all_layers(whole(kascade(**options), text, cuts=(32, 320, 448)), full, text)


def test_of_equal_keys_the_first_are_read():
    text = Text(80, 3)
    text.k[:] = 0
    got = whole(kascade(budget_tokens=5, tile_tokens=16), text)
    assert got.mask[1, 0, 70].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, *range(64, 71)]


def test_requests_of_a_batch_do_not_see_each_other():
    texts = [Text(tokens, 5, seed=tokens) for tokens in (33, 1, 100)]
    got = Pages(kascade(budget_tokens=7, tile_tokens=16), texts).read([(0, text.tokens) for text in texts])
    for text, one in zip(texts, got, strict=True):
        all_layers(one, prompt_masks(text, ANCHORS, MAP, 16, budget_tokens=7), text)


def test_options_of_ours():
    text = Text(150, 5, group=3)
    scheme = kascade(budget_tokens=7, tile_tokens=32, pool="all")
    identity = [[0, 1]] * 5
    all_layers(whole(scheme, text), prompt_masks(text, ANCHORS, identity, 32, everything=True, budget_tokens=7), text)
    all_layers(answer(scheme, text), answer_masks(text, ANCHORS, identity, everything=True, budget_tokens=7), text)
    scheme = kascade(budget_tokens=7, tile_tokens=32, scored_queries=8)
    all_layers(whole(scheme, text), prompt_masks(text, ANCHORS, MAP, 32, scored=8, budget_tokens=7), text)
