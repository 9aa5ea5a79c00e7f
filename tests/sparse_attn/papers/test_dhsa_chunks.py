"""DHSA's boundaries: each way to cut keys into chunks, as the tiles of a prompt and an answer see them."""

from __future__ import annotations

import pytest
import torch

from foveate.sparse_attn import registry
from foveate.sparse_attn.profile import Profile

from .chunks import Predictor, attention_ratio, behind, chosen, fixed, in_segments, key_cos
from .oracle import PURE, Text, agrees, answer, whole
from .test_dhsa import answer_mask, dhsa, dhsa_mask


@pytest.mark.parametrize("segment", [64, 128, 0])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_chunks_where_keys_change(segment, kv_heads):
    text = Text(300, 1, kv_heads, 3, seed=kv_heads)

    def of_segment(first, last):
        return chosen(key_cos(text.k[0, first:last]), (last - first) // 32 * 8)

    def seen(start):
        if not segment:
            return of_segment(0, 300)
        cuts = in_segments(start // segment * segment, segment, 16, of_segment)
        return cuts + fixed(300, 16, cuts[-1])[1:]

    scheme = dhsa(budget_tokens=50, boundaries="key_cos", segment_tokens=segment)
    agrees(whole(scheme, text), dhsa_mask(text, 50, seen), text)


def test_chunks_where_keys_change_in_an_answer():
    text = Text(301, seed=7)

    def of_segment(first, last):
        return chosen(key_cos(text.k[0, first:last]), (last - first) // 32 * 8)

    scheme = dhsa(budget_tokens=50, boundaries="key_cos", segment_tokens=64)
    agrees(answer(scheme, text), answer_mask(text, 50, in_segments(300, 64, 16, of_segment)), text)


@pytest.mark.parametrize("segment", [64, 0])
def test_chunks_where_the_attention_of_the_last_queries_changes(segment):
    text = Text(200, group=3, seed=2)
    text.q *= 2
    ratios = attention_ratio(text.q[0], text.k[0], text.scale)

    def of_segment(first, last):
        inside = [
            score if 3 <= gap < last - first - 4 else float("-inf") for gap, score in enumerate(ratios[first:last])
        ]
        return chosen(inside, (last - first) // 32 * 8, 1.1)

    def seen(start):
        if not segment:
            return of_segment(0, 200)
        cuts = in_segments(start // segment * segment, segment, 16, of_segment)
        return cuts + fixed(200, 16, cuts[-1])[1:]

    scheme = dhsa(budget_tokens=50, boundaries="attn_ratio", segment_tokens=segment)
    agrees(whole(scheme, text), dhsa_mask(text, 50, seen), text)


def test_chunks_behind_delimiters():
    text = Text(300, seed=5)
    ids = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(1)).tolist()

    def of_segment(first, last):
        return behind(ids[first:last], (3, 4))

    def seen(start):
        cuts = in_segments(start // 64 * 64, 64, 16, of_segment)
        return cuts + fixed(300, 16, cuts[-1])[1:]

    scheme = dhsa(budget_tokens=50, boundaries="delimiter", delimiter_ids=(3, 4), segment_tokens=64)
    agrees(whole(scheme, text, ids=ids), dhsa_mask(text, 50, seen), text)


@pytest.mark.parametrize("heads", [4, 8])
def test_chunks_where_the_papers_network_says(heads):
    text, network = Text(150, seed=heads), Predictor(32, heads)

    def of_segment(first, last):
        return chosen(network.scores(text.k[0, first:last]), (last - first) // 32 * 8, 0.05)

    def seen(start):
        cuts = in_segments(start // 64 * 64, 64, 16, of_segment)
        return cuts + fixed(150, 16, cuts[-1])[1:]

    assert of_segment(0, 64) != fixed(64, 16)
    profile = Profile("dhsa", {}, {"heads": heads, "window": 4}, "", network.state_dict())
    options = {"block_tokens": 32, "share_heads": "all", "segment_tokens": 64, "boundary_threshold": 0.05}
    scheme = registry.build("dhsa", {"dhsa": profile}, **PURE, **options, budget_tokens=30, boundaries="predictor")
    agrees(whole(scheme, text), dhsa_mask(text, 30, seen), text)


def test_long_chunks_are_cut():
    text = Text(1024, seed=5)
    ids = [0] * 1024
    ids[299], ids[320] = 7, 7
    cuts = behind(ids, (7,))
    assert cuts[:5] == [0, 100, 200, 300, 321]
    scheme = dhsa(budget_tokens=250, boundaries="delimiter", delimiter_ids=(7,), segment_tokens=0)
    agrees(whole(scheme, text, ids=ids), dhsa_mask(text, 250, lambda start: cuts), text)


def test_layers_may_share_the_boundaries_of_the_first():
    text = Text(200, 2, seed=6)

    def cuts_of(layer):
        return chosen(key_cos(text.k[layer]), 200 // 32 * 8)

    options = {"budget_tokens": 30, "boundaries": "key_cos", "segment_tokens": 0}
    agrees(whole(dhsa(**options), text), dhsa_mask(text, 30, lambda start: cuts_of(1), layer=1), text, 1)
    scheme = dhsa(**options, share_boundaries=True)
    agrees(whole(scheme, text), dhsa_mask(text, 30, lambda start: cuts_of(0), layer=1), text, 1)


@pytest.mark.parametrize("cuts", [(32,), (64, 96), (160,)], ids=str)
def test_a_prompt_cut_between_tiles(cuts):
    text = Text(200, seed=6)
    scheme = dhsa(budget_tokens=30, boundaries="key_cos", segment_tokens=64)
    assert torch.equal(whole(scheme, text, cuts=cuts).mask, whole(scheme, text).mask)
