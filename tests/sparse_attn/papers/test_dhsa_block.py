"""DHSA's released block form (arXiv:2510.24606, second version): each head, each tile, all blocks scored and sorted."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.sparse_attn import registry
from foveate.sparse_attn.protocol import Phase

from .oracle import PURE, Pages, Text, agrees, answer, best, causal, logits, whole


def block_means(k, block):
    return torch.stack([part.double().mean(0) for part in k.split(block)])


def picked(scores, count, must, end):
    """Blocks of one tile: ``must``, and the best before ``end`` until there are ``count``."""
    free = [block for block in range(end) if block not in must]
    left = max(count - len(must), 0)
    return must | {free[place] for place in best([scores[block] for block in free], left)}


def block_mask(text, count, tile, block, first=False, scores_of=None, dense=()):
    """``[H, N, N]``: ``count`` blocks per tile, its own and perhaps the first among them."""
    q, k, tokens = text.q[0], text.k[0], text.tokens
    mask = torch.zeros(q.shape[1], tokens, tokens, dtype=torch.bool)
    for number, start in enumerate(range(0, tokens, tile)):
        stop = min(start + tile, tokens)
        own = {*range(start // block, (stop - 1) // block + 1)}
        if scores_of:
            scores = scores_of(start, stop)
        else:
            scores = logits(q[start:stop].double().mean(0, keepdim=True), block_means(k, block))[:, 0]
        for head, row in enumerate(scores.tolist()):
            must = own | ({0} if first else set())
            for chosen in picked(row, count, must, start // block):
                mask[head, start:stop, chosen * block : (chosen + 1) * block] = True
            if number in dense:
                mask[head, start:stop] = True
    return mask & causal(tokens)


def vertical_slash(text, count, tile, block, ratio=0.5):
    """Scores by the columns and distances that the last ``tile`` queries attend to most, all tokens looked at."""
    q, k, tokens = text.q[0], text.k[0], text.tokens
    last = min(tile, tokens)
    seen = (logits(q[-last:], k) * text.scale).masked_fill(~causal(tokens)[-last:], float("-inf")).softmax(-1)
    columns = seen.sum(1)
    distance = torch.arange(tokens - last, tokens)[:, None] - torch.arange(tokens)
    distances = torch.stack([seen[:, distance == far].sum(-1) for far in range(tokens)], 1)
    vertical = int(count * block * ratio)
    top_columns = [best(row.tolist(), vertical) for row in columns]
    top_distances = [best(row.tolist(), count * block - vertical) for row in distances]

    def scores_of(start, stop):
        scores = torch.zeros(q.shape[1], -(-tokens // block), dtype=torch.float64)
        for head in range(q.shape[1]):
            for column in top_columns[head]:
                scores[head, column // block] += columns[head, column]
            for far in top_distances[head]:
                if stop - 1 - far >= 0:
                    touched = slice(max(start - far, 0) // block, (stop - 1 - far) // block + 1)
                    scores[head, touched] += distances[head, far]
        return scores

    return scores_of


def dhsa_block(**options):
    sizes = {"query_block_tokens": 32, "key_block_tokens": 16, "budget_includes_kept": True}
    return registry.build("dhsa_block", **PURE | sizes | options)


SHAPES = [(1, 1, 1), (31, 2, 3), (32, 2, 1), (33, 1, 7), (63, 2, 3), (111, 1, 7), (200, 2, 2), (1000, 1, 3)]


@pytest.mark.parametrize("density", [0.125, 0.5])
@pytest.mark.parametrize("variant", ["topk", "a"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_by_means(shape, variant, density):
    tokens, kv_heads, group = shape
    text = Text(tokens, 1, kv_heads, group, seed=tokens)
    count = max(1, math.floor(density * tokens / 16))
    want = block_mask(text, count, 32, 16, first=variant == "a")
    agrees(whole(dhsa_block(density=density, variant=variant), text), want, text)


@pytest.mark.parametrize(("tile", "block", "page"), [(128, 32, 16), (128, 64, 16), (64, 64, 32), (64, 16, 64)])
def test_tiles_and_blocks_of_other_sizes(tile, block, page):
    text = Text(500, 1, 1, 3, seed=1)
    scheme = dhsa_block(density=0.6, query_block_tokens=tile, key_block_tokens=block)
    want = block_mask(text, math.floor(0.6 * 500 / block), tile, block)
    agrees(whole(scheme, text, page), want, text)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("ratio", [0.5, 0.25, 1.0])
@pytest.mark.parametrize("tokens", [192, 224, 320])
def test_by_columns_and_distances(tokens, ratio, group):
    text = Text(tokens, kv_heads=2, group=group, seed=tokens + group)
    text.q *= 2
    count = math.floor(0.4 * tokens / 16)
    dense = {*range(-(-count * 16 // 32)), tokens // 32 - 1}
    want = block_mask(text, count, 32, 16, True, vertical_slash(text, count, 32, 16, ratio), dense)
    scheme = dhsa_block(density=0.4, variant="vs", vertical_slash_ratio=ratio)
    agrees(whole(scheme, text), want, text)


def test_a_column_and_a_distance_are_found():
    """The last queries look at key 70 and 100 tokens back: so does every tile between."""
    text = Text(256, kv_heads=1, group=1, dim=64)
    text.q[:], text.k[:] = 0, 0
    text.k[0, 70, 0, 63], text.q[0, 224:, 0, 63] = 10, 10
    for row in range(224, 256):  # each meets a key of its own
        text.q[0, row, 0, row - 224], text.k[0, row - 100, 0, row - 224] = 10, 10
    got = whole(dhsa_block(budget_tokens=112, variant="vs"), text).mask[0, 0, 207]
    # Queries 192 to 223 find key 70 as a column and keys 92 to 123 at that distance; seven blocks, one of them later.
    assert got[[0, 70, 92, 112]].all()
    assert got.sum() == 6 * 16


def block_lines(text, count, tile, block, ratio=0.5):
    """The same by mean keys: the best blocks for the mean of the last ``tile`` queries, distances in blocks."""
    scores = logits(text.q[0, -tile:].double().mean(0, keepdim=True), block_means(text.k[0], block))[:, 0] * text.scale
    heads, blocks = scores.shape
    vertical = int(count * ratio)
    columns = [best(row, vertical) for row in scores.tolist()]
    distances = [[blocks - 1 - key for key in best(row, count - vertical)] for row in scores.tolist()]

    def scores_of(start, stop):
        found = torch.zeros(heads, blocks, dtype=torch.float64)
        for head in range(heads):
            for key in columns[head]:
                found[head, key] += scores[head, key]
            for far in distances[head]:
                for key in range(start // block - far, (stop - 1) // block - far + 1):
                    if key >= 0:
                        found[head, key] += scores[head, blocks - 1 - far]
        return found

    return scores_of


@pytest.mark.parametrize("ratio", [0.5, 0.25, 1.0])
@pytest.mark.parametrize(("tokens", "group"), [(192, 1), (320, 3), (512, 2), (200, 3), (330, 1)])
def test_by_columns_and_distances_of_blocks(tokens, group, ratio):
    text = Text(tokens, kv_heads=2, group=group, seed=tokens)
    count = math.floor(0.4 * tokens / 16)
    dense = {*range(-(-count * 16 // 32)), (tokens - 1) // 32}
    want = block_mask(text, count, 32, 16, True, block_lines(text, count, 32, 16, ratio), dense)
    scheme = dhsa_block(density=0.4, variant="vsb", vertical_slash_ratio=ratio)
    agrees(whole(scheme, text), want, text)


@pytest.mark.parametrize("variant", ["topk", "a", "vs", "vsb"])
@pytest.mark.parametrize("tokens", [1, 33, 111, 160])
def test_a_whole_density_is_dense(variant, tokens):
    text = Text(tokens, group=3)
    for options in ({"density": 1.0}, {"budget_tokens": 10_000}):
        agrees(whole(dhsa_block(variant=variant, **options), text), causal(tokens).expand(6, -1, -1), text)


@pytest.mark.parametrize("variant", ["topk", "a", "vs", "vsb"])
def test_no_row_loses_its_own_blocks_to_the_future(variant):
    """Even the least budget leaves each query its tile's keys up to itself, and nothing of it goes to later blocks."""
    text = Text(256, seed=2)
    text.k[0, 200:] = 10 * text.q[0, 128:160].mean(0)[::2]
    got = whole(dhsa_block(budget_tokens=64, variant=variant), text).mask[0]
    for row in range(256):
        assert got[:, row, row // 32 * 32 : row + 1].all()
        assert got[:, row, : row + 1].sum(-1).min() >= min(64 - 31, row + 1)


def test_of_equal_blocks_the_first_is_read():
    text = Text(160)
    text.k[:] = text.k[:, :1]
    got = whole(dhsa_block(budget_tokens=64), text).mask[0, 0, 159]
    assert got.nonzero().flatten().tolist() == [*range(32), *range(128, 160)]


def test_heads_choose_for_themselves():
    text = Text(160, kv_heads=1, group=2, seed=3)
    text.q[0, :, 1] = -text.q[0, :, 0]
    got = whole(dhsa_block(budget_tokens=64), text)
    agrees(got, block_mask(text, 4, 32, 16), text)
    assert not torch.equal(got.mask[0, 0], got.mask[0, 1])


@pytest.mark.parametrize("cuts", [(32,), (64, 96), (192,)], ids=str)
@pytest.mark.parametrize("variant", ["topk", "a"])
def test_a_prompt_cut_between_tiles(cuts, variant):
    text = Text(210, seed=6)
    want = block_mask(text, math.floor(0.4 * 210 / 16), 32, 16, variant == "a")
    agrees(whole(dhsa_block(density=0.4, variant=variant), text, cuts=cuts), want, text)


def test_an_answer_is_dense_as_released_and_sparse_if_asked():
    text = Text(150, group=3, seed=4)
    assert dhsa_block().for_phase(Phase.DECODE).name == "dense"
    agrees(answer(dhsa_block(), text), causal(150).expand(6, -1, -1), text)
    scores = logits(text.q[0, 149:], block_means(text.k[0], 16))[:, 0]
    want = torch.zeros(6, 1, 150, dtype=torch.bool)
    for head, row in enumerate(scores.tolist()):
        for chosen in picked(row, 4, {9}, 9):
            want[head, 0, chosen * 16 : (chosen + 1) * 16] = True
    agrees(answer(dhsa_block(budget_tokens=64, sparse_decode=True), text), want, text)


def test_a_batch():
    texts = [Text(tokens, seed=tokens) for tokens in (1, 47, 130)]
    got = Pages(dhsa_block(budget_tokens=64), texts).read([(0, text.tokens) for text in texts])
    for text, one in zip(texts, got, strict=True):
        agrees(one, block_mask(text, 4, 32, 16), text)
