"""DHSA by the definition of arXiv:2510.24606, first version: chunks of keys walked to a budget of tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foveate.sparse_attn import registry

from .chunks import fixed
from .oracle import PURE, Pages, Text, agrees, answer, causal, whole


def chunk_scores(queries, keys, cuts, share="all", mean=False):
    """``[H, C]`` for the queries ``[n, H, D]`` of a tile and chunks of ``keys [N, G, D]`` between ``cuts``."""
    heads, kv_heads = queries.shape[1], keys.shape[1]
    queries, keys = queries.double(), keys.double().repeat_interleave(heads // kv_heads, 1)
    if share != "none":
        sets = 1 if share == "all" else kv_heads
        queries, keys = (
            x.unflatten(1, (sets, -1)).mean(2).repeat_interleave(heads // sets, 1) for x in (queries, keys)
        )
    root = (lambda n: n) if mean else math.sqrt
    tile = queries.sum(0) / root(len(queries))
    chunks = [keys[a:b].sum(0) / root(b - a) for a, b in itertools.pairwise(cuts)]
    return torch.stack([(tile * chunk).sum(-1) for chunk in chunks], 1)


def walked(scores, cuts, first, end, room):
    """Keys ``first`` to ``end - 1`` by the scores of their chunks, equal ones by place, until there is no room."""
    taken = []
    order = sorted(range(len(scores)), key=lambda c: (-scores[c], c))
    for place, chunk in enumerate(order):
        keys = [key for key in range(max(cuts[chunk], first), min(cuts[chunk + 1], end))]
        if place and keys and len(taken) < room:
            gap = scores[order[place - 1]] - scores[chunk]
            assert gap == 0 or gap > 1e-6, "choose another seed"
        taken += keys[: max(room - len(taken), 0)]
    return taken


def dhsa_mask(text, budget, cuts_for, tile=32, share="all", mean=False, sinks=0, window=0, included=False, layer=0):
    """``[H, N, N]``; ``cuts_for(start)`` are the cuts of all keys as a tile at ``start`` sees them."""
    q, k = text.q[layer], text.k[layer]
    mask = torch.zeros(q.shape[1], text.tokens, text.tokens, dtype=torch.bool)
    for start in range(0, text.tokens, tile):
        stop, cuts = min(start + tile, text.tokens), cuts_for(start)
        must = {*range(min(sinks, stop)), *range(max(start - window, 0), stop)}
        room = max(budget - len(must), 0) if included else budget
        for head, scores in enumerate(chunk_scores(q[start:stop], k, cuts, share, mean).tolist()):
            keys = walked(scores, cuts, sinks, start - window, room)
            mask[head, start:stop, [*keys, *must]] = True
    return mask & causal(text.tokens)


def answer_mask(text, budget, cuts, share="all", layer=0):
    """``[H, 1, N]`` of the last query: the newest token is read, and the chunks before it walked."""
    q, k, last = text.q[layer], text.k[layer], text.tokens - 1
    mask = torch.zeros(q.shape[1], 1, text.tokens, dtype=torch.bool)
    mask[..., last] = True
    if last:
        for head, scores in enumerate(chunk_scores(q[last:], k[:last], cuts, share).tolist()):
            mask[head, 0, walked(scores, cuts, 0, last, budget)] = True
    return mask


def dhsa(**options):
    return registry.build("dhsa", **PURE | {"block_tokens": 32, "share_heads": "all"} | options)


def every(text, size):
    return lambda start: fixed(text.tokens, size)


SHAPES = [(1, 1, 1), (31, 2, 3), (32, 2, 1), (33, 1, 7), (63, 2, 3), (111, 1, 7), (200, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", ["all", "kv_group", "none"])
def test_fixed_chunks(shape, share):
    tokens, kv_heads, group = shape
    text = Text(tokens, 1, kv_heads, group, seed=tokens)
    for size, budget in ((16, 40), (8, 21)):
        scheme = dhsa(budget_tokens=budget, chunk_tokens=size, share_heads=share)
        agrees(whole(scheme, text), dhsa_mask(text, budget, every(text, size), share=share), text)


@pytest.mark.parametrize("tokens", [1, 2, 17, 63, 111, 1000])
@pytest.mark.parametrize("share", ["all", "kv_group", "none"])
def test_fixed_chunks_in_an_answer(tokens, share):
    text = Text(tokens, group=3, seed=tokens)
    scheme = dhsa(budget_tokens=40, chunk_tokens=16, share_heads=share)
    want = answer_mask(text, 40, fixed(max(tokens - 1, 1), 16), share)
    agrees(answer(scheme, text), want, text)


@pytest.mark.parametrize(("prompt", "tokens"), [(50, 52), (50, 61), (48, 64), (3, 40)])
def test_what_was_generated_is_one_chunk(prompt, tokens):
    text = Text(tokens, seed=3)
    cuts = [*fixed(prompt, 16), tokens - 1] if tokens - 1 > prompt else fixed(prompt, 16)
    want = answer_mask(text, 20, cuts)
    agrees(answer(dhsa(budget_tokens=20, chunk_tokens=16), text, prompt=prompt), want, text)


def test_the_test_vector():
    """Keys (2,0) three times, (0,3), (0,1) four times in chunks of 3, 1 and 4, a tile of two queries (1,1)."""
    keys = torch.tensor([[2.0, 0]] * 3 + [[0, 3.0]] + [[0, 1.0]] * 4)[:, None]
    cuts = [0, 3, 4, 8]
    scores = chunk_scores(torch.ones(2, 1, 2), keys, cuts)[0].tolist()
    assert scores == pytest.approx([4.898979, 4.242641, 2.828427], abs=1e-6)
    assert sorted([*walked(scores, cuts, 0, 6, 3), 6, 7]) == [0, 1, 2, 6, 7]


def test_a_long_chunk_outweighs_a_short_one_of_the_same_mean():
    """The same through pages: 9 keys of one kind and 23 of a slightly worse one; plain means turn it round."""
    text = Text(96, kv_heads=1, group=1)
    text.q[0, 64:], text.k[:] = 1.0, 0.0
    ids = [0] * 96
    ids[8], ids[31] = 7, 7
    text.k[0, :9], text.k[0, 9:32] = 1.0, 0.9
    scheme = dhsa(budget_tokens=9, boundaries="delimiter", delimiter_ids=(7,), segment_tokens=32)
    got = whole(scheme, text, ids=ids).mask[0, 0, 95]
    assert got.nonzero().flatten().tolist() == [*range(9, 18), *range(64, 96)]
    scheme = dhsa(budget_tokens=9, boundaries="delimiter", delimiter_ids=(7,), segment_tokens=32, aggregate="mean")
    got = whole(scheme, text, ids=ids).mask[0, 0, 95]
    assert got.nonzero().flatten().tolist() == [*range(9), *range(64, 96)]


def test_of_equal_chunks_the_first_is_read_and_the_last_one_in_part():
    text = Text(96)
    text.k[:] = text.k[:, :1]
    got = whole(dhsa(budget_tokens=20, chunk_tokens=16), text).mask[0, 0, 95]
    assert got.nonzero().flatten().tolist() == [*range(20), *range(64, 96)]


@pytest.mark.parametrize("included", [True, False])
def test_what_is_kept_beside_and_out_of_the_budget(included):
    text = Text(250, group=3, seed=8)
    scheme = dhsa(budget_tokens=70, sink_tokens=5, window_tokens=11, budget_includes_kept=included)
    want = dhsa_mask(text, 70, every(text, 16), sinks=5, window=11, included=included)
    agrees(whole(scheme, text), want, text)


def test_a_budget_of_the_context_is_dense():
    text = Text(200, seed=1)
    for boundaries in ("fixed", "key_cos", "attn_ratio"):
        scheme = dhsa(budget_tokens=200, boundaries=boundaries, segment_tokens=64)
        agrees(whole(scheme, text), causal(200).expand(4, -1, -1), text)
        agrees(answer(scheme, text), causal(200).expand(4, -1, -1), text)


def test_heads_may_change_places_where_all_choose_together():
    text, turned = Text(111, group=3, seed=4), Text(111, group=3, seed=4)
    turned.q, turned.k = text.q.flip(2), text.k.flip(2)
    one, two = (whole(dhsa(budget_tokens=20), each).mask for each in (text, turned))
    assert torch.equal(one, two)


def test_a_batch():
    texts = [Text(tokens, seed=tokens) for tokens in (1, 47, 130)]
    got = Pages(dhsa(budget_tokens=20, chunk_tokens=16), texts).read([(0, t.tokens) for t in texts])
    for text, one in zip(texts, got, strict=True):
        agrees(one, dhsa_mask(text, 20, every(text, 16)), text)
