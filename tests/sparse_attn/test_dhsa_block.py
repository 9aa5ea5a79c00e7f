"""The released block form of DHSA by its definition: masks of blocks written from the paper's code, row by row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foveate.kv_cache.stats import KEY_SUM
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import budget, registry
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.ops import line_scores
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase
from foveate.sparse_attn.schemes import dhsa_block
from foveate.sparse_attn.schemes.dense import Dense
from foveate.sparse_attn.selection import Tiles

from .paged import CPU, Paged
from .test_schemes import World, close
from .views import HEADS, KV_HEADS, make_query, make_view

BARE = {"sink_tokens": 0, "window_tokens": 0, "dense_tail_tokens": 0}
SMALL = BARE | {"query_block_tokens": 32, "key_block_tokens": 16}
PURE = SMALL | {"budget_includes_kept": True}
SPEC = AttentionSpec(0.7)


def blocks_read(scheme, query, view, phase=Phase.PREFILL):
    """Bool ``[R, H, blocks]``, with what is kept; format checked."""
    tiles = Tiles.of(view.rows, scheme.tile if phase is Phase.PREFILL else 1)
    choose = scheme.select_prefill if phase is Phase.PREFILL else scheme.select_decode
    selection = choose(query, view, tiles, LayerCall(0, SPEC))
    selection.validate(view.rows)
    kept = budget.keep(selection, scheme, phase)
    kept.validate(view.rows)
    assert kept.granularity == scheme.options.key_block_tokens
    return kept.to_mask(view.rows)[..., :: kept.granularity]


def best(scores, candidates, count):
    """The ``count`` candidates with the highest scores, of equal ones the lower."""
    return set(sorted(candidates, key=lambda block: (-scores[block], block))[: max(count, 0)])


def means(keys, size):
    """``[H, blocks, D]``, the last block over the keys it has."""
    repeated = keys.repeat_interleave(HEADS // keys.shape[1], 1).double()
    return torch.stack([part.mean(0) for part in repeated.split(size)], 1)


def row_of(position, count, tile, size):
    """First block of a tile's own, and one past the last that its queries see."""
    return position // tile * tile // size, (position + count - 1) // size + 1


@pytest.mark.parametrize("variant", ["topk", "a"])
@pytest.mark.parametrize("length", [1, 63, 111, 150])
@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(("size", "page"), [(16, 16), (32, 16), (16, 64)], ids=str)
def test_blocks_by_means(variant, length, density, size, page):
    options = PURE | {"key_block_tokens": size, "variant": variant, "density": density}
    scheme = registry.build("dhsa_block", **options)
    view, (keys,) = make_view([length], [length], page, stats=[KEY_SUM])
    query = make_query(view)
    got = blocks_read(scheme, query, view)
    blocks = max(1, -(-length // size) if density == 1 else int(density * length / size))
    for row, (_, start, count, position) in enumerate(Tiles.of(view.rows, 32).host):
        own, seen = row_of(position, count, 32, size)
        scores = torch.einsum("hud,hd->hu", means(keys, size), query[start : start + count].double().mean(0))
        for head in range(HEADS):
            forced = {*range(own, seen)} | ({0} if variant == "a" else set())
            want = forced | best(scores[head].tolist(), {*range(own)} - forced, blocks - len(forced))
            assert got[row, head].nonzero()[:, 0].tolist() == sorted(want)
            if seen <= blocks:
                assert len(want) == seen, "few blocks are all read"


def attention_of_last(query, keys, count):
    """``[H, n, L]`` float64 weights of the last ``count`` queries."""
    repeated = keys.repeat_interleave(HEADS // keys.shape[1], 1).double()
    logits = torch.einsum("qhd,khd->hqk", query[-count:].double(), repeated) * SPEC.scale
    position = torch.arange(len(keys) - count, len(keys))
    return logits.masked_fill(position[:, None] < torch.arange(len(keys)), -math.inf).softmax(-1)


def token_line_scores(query, keys, tokens, vertical, tiles, size):
    """``vs``: scores ``[R][H][blocks]`` by adding up one line and one block at a time."""
    length = len(keys)
    weights = attention_of_last(query, keys, min(32, len(query)))
    count = weights.shape[1]
    found = [[[0.0] * -(-length // size) for _ in range(HEADS)] for _ in tiles]
    for head in range(HEADS):
        columns = weights[head].sum(0).tolist()
        distances = [0.0] * length
        for row in range(count):
            for key in range(length - count + row + 1):
                distances[length - count + row - key] += float(weights[head, row, key])
        kept = best(columns, range(length), vertical)
        kept_distances = best(distances, range(length), tokens - vertical)
        for place, (_, _, _, position) in enumerate(tiles):
            first = position // 32 * 32
            for key in kept:
                found[place][head][key // size] += columns[key]
            for distance in kept_distances:
                low, high = first - distance, first + 31 - distance
                for block in range(len(found[place][head])):
                    if high >= block * size and low < (block + 1) * size and high >= 0:
                        found[place][head][block] += distances[distance]
    return found


def block_line_scores(query, keys, blocks, vertical, tiles, size):
    """``vsb``: the same with the mean of the last queries and of each block."""
    held = means(keys, size)
    asked = query[-min(32, len(query)) :].double().mean(0)
    scores = torch.einsum("hud,hd->hu", held, asked) * SPEC.scale
    count = scores.shape[1]
    found = [[[0.0] * count for _ in range(HEADS)] for _ in tiles]
    for head in range(HEADS):
        row = scores[head].tolist()
        kept = best(row, range(count), vertical)
        kept_distances = {count - 1 - block: row[block] for block in best(row, range(count), blocks - vertical)}
        for place, (_, _, _, position) in enumerate(tiles):
            own = position // 32 * 32 // size
            for block in range(count):
                found[place][head][block] += row[block] if block in kept else 0.0
                for distance, score in kept_distances.items():
                    if own - distance <= block <= own + 32 // size - 1 - distance:
                        found[place][head][block] += score
    return found


@pytest.mark.parametrize("variant", ["vs", "vsb"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("prompt", [None, 150, 200], ids=["prompt-unknown", "prompt-ends", "prompt-goes-on"])
@pytest.mark.parametrize("tokens", [32, 80])
def test_blocks_by_lines(variant, ratio, prompt, tokens):
    options = PURE | {"variant": variant, "vertical_slash_ratio": ratio, "budget_tokens": tokens}
    scheme = registry.build("dhsa_block", **options)
    view, (keys,) = make_view([150], [118], stats=[KEY_SUM], prompts=prompt and [prompt])
    query = make_query(view)
    got = blocks_read(scheme, query, view)
    tiles = Tiles.of(view.rows, 32).host
    blocks = tokens // 16
    if variant == "vs":
        scores = token_line_scores(query, keys, tokens, int(tokens * ratio), tiles, 16)
    else:
        scores = block_line_scores(query, keys, blocks, int(blocks * ratio), tiles, 16)
    for row, (_, _, count, position) in enumerate(tiles):
        own, seen = row_of(position, count, 32, 16)
        everything = position // 32 * 32 < tokens or (row == len(tiles) - 1 and prompt != 200)
        for head in range(HEADS):
            forced = {0, *range(own, seen)}
            chosen = best(scores[row][head], {*range(own)} - forced, blocks - len(forced))
            want = {*range(seen)} if everything else forced | chosen
            assert got[row, head].nonzero()[:, 0].tolist() == sorted(want)
    assert not bool(got.all()), "something is left out"


def test_free_budget_comes_on_top_of_what_is_kept():
    options = SMALL | {"sink_tokens": 20, "window_tokens": 16, "budget_tokens": 32}
    view, _ = make_view([150], [150], stats=[KEY_SUM])
    read = blocks_read(registry.build("dhsa_block", **options), make_query(view), view)
    # Two free blocks, two of sinks, one of window, two own ones; of the last tile's own blocks, two are begun.
    assert read.sum(-1).tolist() == [[2] * 4, [4] * 4, [6] * 4, [7] * 4, [7] * 4]


def test_density_counts_the_whole_prompt_where_it_is_known():
    scheme = registry.build("dhsa_block", **SMALL, density=0.25)
    for prompts, blocks in (([320], 5), (None, 2)):
        view, _ = make_view([150], [22], stats=[KEY_SUM], prompts=prompts)
        assert blocks_read(scheme, make_query(view), view).sum(-1).tolist() == [[blocks + 2] * HEADS]
    floored = registry.build("dhsa_block", **SMALL, density=0.25, min_budget_tokens=64)
    assert blocks_read(floored, make_query(view), view).sum(-1).tolist() == [[4 + 2] * HEADS]


@pytest.mark.parametrize("variant", ["topk", "a"])
def test_cuts_between_tiles_change_nothing(variant):
    scheme = registry.build("dhsa_block", **SMALL, variant=variant, budget_tokens=32)
    want = World([150], scheme).whole()[0]
    world = World([150], scheme)
    close(torch.cat([world.run([span])[0][0] for span in itertools.pairwise([0, 32, 96, 128, 150])]), want)


@pytest.mark.parametrize("variant", ["a", "vs", "vsb"])
def test_budget_beyond_the_length_is_dense(variant):
    scheme = registry.build("dhsa_block", **SMALL, variant=variant, density=1.0)
    close(World([150, 40], scheme).whole()[0], World([150, 40]).whole()[0])


@pytest.mark.parametrize("variant", ["vs", "vsb"])
def test_a_batch_equals_its_members_alone(variant):
    scheme = registry.build("dhsa_block", **SMALL, variant=variant, budget_tokens=32)
    world = World([70, 150, 3], scheme)
    for index, got in enumerate(world.whole()):
        alone = World([world.lengths[index]], scheme)
        alone.q, alone.k, alone.v = [world.q[index]], [world.k[index]], [world.v[index]]
        close(alone.whole()[0], got)


def test_decode_is_dense_unless_told_otherwise():
    dense = registry.build("dhsa_block")
    assert isinstance(dense.for_phase(Phase.DECODE), Dense)
    assert dense.for_phase(Phase.PREFILL) is dense


@pytest.mark.parametrize("variant", ["topk", "vs"])
def test_sparse_decode_chooses_per_head(variant):
    scheme = registry.build("dhsa_block", **SMALL, variant=variant, budget_tokens=32, sparse_decode=True)
    assert scheme.for_phase(Phase.DECODE) is scheme
    view, keys = make_view([111, 40, 1], [1] * 3, stats=[KEY_SUM])
    query = make_query(view)
    got = blocks_read(scheme, query, view, Phase.DECODE)
    for row, context in enumerate((111, 40, 1)):
        own = (context - 1) // 16
        scores = torch.einsum("hud,hd->hu", means(keys[row], 16), query[row].double())
        for head in range(HEADS):
            forced = {own} | ({0} if variant == "vs" else set())
            want = forced | best(scores[head].tolist(), {*range(own)} - forced, 2)
            assert got[row, head].nonzero()[:, 0].tolist() == sorted(want)


@pytest.mark.parametrize("slab", [16 << 20, 1], ids=["one-slab", "many-slabs"])
def test_lines_of_the_last_queries(slab, monkeypatch):
    monkeypatch.setattr(line_scores, "SLAB_BYTES", slab)
    view, keys = make_view([90, 33], [40, 33])
    query = make_query(view)
    for sequence, part in enumerate((query[:40], query[40:])):
        weights = attention_of_last(part, keys[sequence], 32)
        columns, diagonals = line_scores.line_scores(part[-32:], view, sequence, SPEC)
        torch.testing.assert_close(columns.double(), weights.sum(1), atol=1e-5, rtol=1e-5)
        length = weights.shape[2]
        want = torch.zeros(HEADS, length, dtype=torch.float64)
        for row, key in itertools.product(range(32), range(length)):
            if (distance := length - 32 + row - key) >= 0:
                want[:, distance] += weights[:, row, key]
        torch.testing.assert_close(diagonals.double(), want, atol=1e-5, rtol=1e-5)
    capped = AttentionSpec(0.7, softcap=2.0)
    columns, _ = line_scores.line_scores(query[:32], make_view([32], [32])[0], 0, capped)
    torch.testing.assert_close(columns.sum(1), torch.full((HEADS,), 32.0))


def test_slabs_of_scores_change_nothing(monkeypatch):
    for variant, phase in (("topk", Phase.PREFILL), ("vs", Phase.PREFILL), ("topk", Phase.DECODE)):
        scheme = registry.build("dhsa_block", **SMALL, variant=variant, budget_tokens=32, sparse_decode=True)
        counts = [90, 150] if phase is Phase.PREFILL else [1, 1]
        view, _ = make_view([90, 150], counts, stats=[KEY_SUM])
        want = blocks_read(scheme, make_query(view), view, phase)
        with monkeypatch.context() as patched:
            patched.setattr(dhsa_block, "SLAB_SCORES", 1)
            assert torch.equal(blocks_read(scheme, make_query(view), view, phase), want)


@pytest.mark.parametrize(
    "options",
    [
        {"density": -0.1}, {"density": 1.5}, {"density": True}, {"vertical_slash_ratio": 2}, {"variant": "b"},
        {"key_block_tokens": 48}, {"key_block_tokens": 256}, {"key_block_tokens": 8}, {"query_block_tokens": 48},
        {"query_block_tokens": 0}, {"sparse_decode": 1}, {"budget_tokens": -1},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(SchemeConfigError):
        registry.build("dhsa_block", **options)


def test_unread_kv_heads_do_not_matter():
    """A query head chooses by its own KV head alone."""
    scheme = registry.build("dhsa_block", **SMALL, budget_tokens=32)
    view, _ = make_view([150], [150], page=64)
    query = make_query(view)
    want = blocks_read(scheme, query, view)
    view.pages.keys[:, KV_HEADS - 1] *= -1
    got = blocks_read(scheme, query, view)
    half = HEADS // KV_HEADS
    assert torch.equal(got[:, : HEADS - half], want[:, : HEADS - half])
    assert not torch.equal(got[:, HEADS - half :], want[:, HEADS - half :])


def test_in_decode_a_density_is_a_share_of_the_keys_there():
    """The prompt's length is for prompts: an answer that grows has more blocks to choose from."""
    options = {"key_block_tokens": 16, "query_block_tokens": 16, "sink_tokens": 0, "window_tokens": 0}
    scheme = registry.build("dhsa_block", density=0.5, sparse_decode=True, dense_tail_tokens=0, **options)
    world = Paged([161, 321], stats=[KEY_SUM])
    rows = Rows.build(world.tables, [161, 321], [1, 1], CPU, prompt_lens=[64, 64])
    query = torch.cat([query[-1:] for query in world.query])
    plan = scheme.select_decode(query, PagedView(world.pool.layer(0), rows), Tiles.of(rows, 1), LayerCall(0, SPEC))
    assert plan.counts.tolist() == [[5] * 4, [10] * 4]
