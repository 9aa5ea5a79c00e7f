"""DHSA by its definition: token-level scores and masks written from the paper, against chunks, walk and scheme."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import KEY_SUM, KEY_SUM_16
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops, registry
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.ops import native
from foveate.sparse_attn.ops.walk import walk_chunks
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, StepGroup, StepState
from foveate.sparse_attn.schemes import dhsa
from foveate.sparse_attn.selection import Tiles

from .seen import Seen
from .test_chunk_ops import greedy, predictor_profile, split
from .test_schemes import World, close
from .views import CPU, DIM, HEADS, KV_HEADS, make_query, make_view

BARE = {"sink_tokens": 0, "window_tokens": 0, "dense_tail_tokens": 0}
SMALL = BARE | {"block_tokens": 16, "chunk_tokens": 8, "segment_tokens": 32, "min_chunk_tokens": 4, "nms_tokens": 4}


def select(scheme, query, view, phase=Phase.PREFILL):
    """The scheme's own choice as bool ``[R, heads, longest context]``, format checked."""
    tiles = Tiles.of(view.rows, scheme.tile if phase is Phase.PREFILL else 1)
    choose = scheme.select_prefill if phase is Phase.PREFILL else scheme.select_decode
    selection = choose(query, view, tiles, LayerCall(0, AttentionSpec(DIM**-0.5)))
    selection.validate(view.rows)
    return selection.to_mask(view.rows)


def upsampled(query, keys, bounds, share="kv_group", aggregate="sqrt_length"):
    """Token scores ``[heads, L]`` of one tile ``[n, H, D]`` over keys ``[L, G, D]``, section 3 of the paper."""
    repeated = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    groups = {"all": 1, "kv_group": keys.shape[1], "none": query.shape[1]}[share]
    asked, held = (part.double().unflatten(1, (groups, -1)).mean(2) for part in (query, repeated))
    scores = torch.zeros(groups, len(keys), dtype=torch.float64)
    for begin, end in itertools.pairwise(bounds):
        chunk = held[begin:end].mean(0)
        tile = asked.mean(0)
        if aggregate == "sqrt_length":
            chunk, tile = chunk * math.sqrt(end - begin), tile * math.sqrt(len(asked))
        scores[:, begin:end] = (chunk * tile).sum(-1, keepdim=True)
    return scores


def best_tokens(scores, free, room):
    """Bool ``[heads, L]``: the ``room`` highest of the free tokens, of equal ones the lower."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool)
    for head, row in enumerate(scores.tolist()):
        order = sorted((token for token in range(len(row)) if free[token]), key=lambda token: (-row[token], token))
        chosen[head, order[:room]] = True
    return chosen


def test_vector_of_the_definition():
    keys = torch.tensor([[2.0, 0]] * 3 + [[0, 3.0]] + [[0, 1.0]] * 4)
    bounds = torch.tensor([0, 3, 4, 8])
    start, length = bounds[:-1], bounds[1:] - bounds[:-1]
    held = torch.stack([keys[a:b].sum(0) for a, b in itertools.pairwise(bounds.tolist())]) / length[:, None].sqrt()
    asked = torch.ones(2, 2).sum(0) / math.sqrt(2)
    scores = held @ asked
    torch.testing.assert_close(held, torch.tensor([[3.464102, 0], [0, 3], [0, 2]]))
    torch.testing.assert_close(scores, torch.tensor([4.898979, 4.242641, 2.828427]))
    local = 2  # N_b = 5, of which the two local tokens 6 and 7 are read anyway
    free = (torch.minimum(start + length, torch.tensor(8 - local)) - start).clamp(min=0)
    indices, counts = walk_chunks(scores[None, None], start[None], free[None], torch.tensor([5 - local]), 3)
    assert sorted({*indices[0, 0].tolist(), 6, 7}) == [0, 1, 2, 6, 7]
    assert counts.tolist() == [[3]]


@pytest.mark.parametrize(
    ("options", "page", "dim", "device", "stats"),
    [
        ({}, 16, 64, "cpu", (KEY_SUM,)),
        ({}, 64, 64, "cpu", (KEY_SUM_16,)),
        ({}, 64, 24, "cpu", ()),
        ({}, 64, 64, "cuda", ()),
        ({"chunk_tokens": 32}, 64, 64, "cpu", (KEY_SUM_16,)),
        ({"chunk_tokens": 8}, 64, 64, "cpu", ()),
        ({"boundaries": "key_cos"}, 64, 64, "cpu", ()),
    ],
    ids=str,
)
def test_chunks_are_read_from_the_statistics_that_fit_them(options, page, dim, device, stats):
    geometry = CacheGeometry(1, 2, dim, page, 9, device=torch.device(device))
    if stats == (KEY_SUM_16,) and native.library() is None:
        stats = ()  # nothing would read them
    assert registry.build("dhsa", **options).page_stats(geometry) == stats


def test_vector_of_the_definition_by_the_scheme():
    """The same keys in a scheme whose tile is the block of rows 6 and 7, in chunks of two: 0..3, then 4 and 5."""
    keys = torch.tensor([[2.0, 0]] * 4 + [[0, 1.0]] * 4)[:, None].expand(-1, 2, -1)
    scheme = registry.build(
        "dhsa", **BARE, budget_tokens=5, budget_includes_kept=True, share_heads="all",
        block_tokens=2, chunk_tokens=2, min_chunk_tokens=1, max_chunk_tokens=2, segment_tokens=2,
    )  # fmt: skip
    pool = PagePool(CacheGeometry(1, 2, 2, 16, 1), scheme.page_stats(CacheGeometry(1, 2, 2, 16, 1)))
    ops.write_kv(keys, keys, pool.layer(0), torch.arange(8))
    view = PagedView(pool.layer(0), Rows.build([[0]], [8], [2], CPU))
    step = StepState(pool, torch.arange(6, 8), torch.arange(6, 8), [], None, torch.zeros(1, 2, dtype=torch.float64))
    group = StepGroup(scheme, Phase.PREFILL, 0, view.rows, (0,))
    step.groups = [group]
    step.observer = Seen()
    attend(torch.ones(2, 4, 2), LayerCall(0, AttentionSpec(1.0)), step)
    assert step.observer.plans[0].to_mask(view.rows)[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 6, 7]


@st.composite
def walks(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    scores = draw(st.lists(st.integers(-2, 2), min_size=len(lengths), max_size=len(lengths)))
    total = sum(lengths)
    first = draw(st.integers(0, total))
    return lengths, scores, first, draw(st.integers(first, total)), draw(st.integers(0, total + 3))


@given(walks())
@settings(max_examples=200)
def test_walk_is_token_level_top_k(case):
    lengths, scores, first, end, room = case
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    tokens = torch.tensor(scores, dtype=torch.float32).repeat_interleave(torch.tensor(lengths))[None]
    place = torch.arange(len(tokens[0]))
    want = best_tokens(tokens, (place >= first) & (place < end), room)[0].nonzero()[:, 0].tolist()
    start = bounds[:-1].clamp(min=first)
    free = (bounds[1:].clamp(max=end) - start).clamp(min=0)
    width = max(room, 1)
    indices, counts = walk_chunks(
        torch.tensor([[scores]], dtype=torch.float32), start[None], free[None], torch.tensor([room]), width
    )
    assert indices[0, 0, : counts[0, 0]].tolist() == want
    assert (indices[0, 0, counts[0, 0] :] == -1).all()
    owner = torch.searchsorted(bounds, torch.tensor(want, dtype=torch.long), right=True) - 1
    taken = torch.bincount(owner, minlength=len(lengths))
    assert int(((taken > 0) & (taken < free)).sum()) <= 1, "only one chunk is taken in part"


@pytest.mark.parametrize("share", ["all", "kv_group", "none"])
@pytest.mark.parametrize("aggregate", ["sqrt_length", "mean"])
@pytest.mark.parametrize("chunk", [8, 16, 32])
@pytest.mark.parametrize(("context", "count"), [(1, 1), (63, 63), (111, 111), (130, 50)], ids=str)
def test_fixed_chunks_in_prefill(share, aggregate, chunk, context, count):
    options = BARE | {"sink_tokens": 3, "window_tokens": 10, "block_tokens": 32, "segment_tokens": 64}
    scheme = registry.build(
        "dhsa", **options, chunk_tokens=chunk, budget_tokens=21, share_heads=share, aggregate=aggregate
    )
    view, (keys,) = make_view([context], [count], stats=scheme.page_stats(CacheGeometry(1, 2, DIM, 16, 9)))
    query = make_query(view)
    got = select(scheme, query, view)
    for row, (_, start, queries, position) in enumerate(Tiles.of(view.rows, 32).host):
        begun = position // 32 * 32
        bounds = [*range(0, begun, chunk), begun]
        scores = upsampled(query[start : start + queries], keys[:begun], bounds, share, aggregate)
        free = [3 <= token < begun - 10 for token in range(begun)]
        want = best_tokens(scores, free, 21)
        want = want.expand(KV_HEADS, -1) if share == "all" else want
        assert torch.equal(got[row, :, :begun], want)
        assert not got[row, :, begun:].any()


@pytest.mark.parametrize("prompts", [None, [40, 7, 64, 90]], ids=["prompt-unknown", "prompt-known"])
@pytest.mark.parametrize(("chunk", "page"), [(8, 16), (16, 16), (64, 16), (64, 64)], ids=str)
def test_fixed_chunks_in_decode(prompts, chunk, page):
    contexts = [41, 111, 130, 90]
    scheme = registry.build("dhsa", **BARE, budget_tokens=21, chunk_tokens=chunk)
    stats = scheme.page_stats(CacheGeometry(1, 2, DIM, page, 9))
    view, keys = make_view(contexts, [1] * 4, page, stats=stats, prompts=prompts)
    query = make_query(view)
    got = select(scheme, query, view, Phase.DECODE)
    for row, context in enumerate(contexts):
        newest = context - 1
        cut = min(prompts[row], newest) if prompts else newest
        bounds = sorted({*range(0, cut, chunk), cut, newest})
        scores = upsampled(query[row : row + 1], keys[row][:newest], bounds)
        assert torch.equal(got[row, :, :newest], best_tokens(scores, [True] * newest, 21))
        assert not got[row, :, newest:].any()


def oracle_segments(begun, segment, chunk, bounds_of):
    """Bounds of the keys before a tile: finished segments by ``bounds_of(first)``, then fixed chunks."""
    bounds = {0, begun}
    for first in range(0, begun // segment * segment, segment):
        bounds |= {first, *(first + place for place in bounds_of(first))}
    return sorted(bounds | {*range(begun // segment * segment, begun, chunk)})


def key_cos_bounds(keys, options):
    """Bounds of one finished segment of keys ``[n, C]``, one gap at a time."""
    window, shortest = 4, options["min_chunk_tokens"]
    scores = []
    for gap in range(len(keys)):
        inside = max(window, shortest) - 1 <= gap < len(keys) - max(window, shortest)
        left, right = keys[max(gap - window + 1, 0) : gap + 1].mean(0), keys[gap + 1 : gap + window + 1].mean(0)
        scores.append(1 - float(torch.cosine_similarity(left, right, dim=0)) if inside else -math.inf)
    limit = len(keys) // options["block_tokens"] * options["chunks_per_block"]
    gaps = greedy(scores, limit, -math.inf, max(options["nms_tokens"], shortest - 1))
    return split([0, *(gap + 1 for gap in gaps), len(keys)], options["max_chunk_tokens"])


@pytest.mark.parametrize("per_block", [1, 8])
@pytest.mark.parametrize("phase", Phase)
def test_chunks_by_change_of_keys(per_block, phase):
    options = SMALL | {"chunks_per_block": per_block, "max_chunk_tokens": 12}
    scheme = registry.build("dhsa", **options, boundaries="key_cos", budget_tokens=21)
    contexts = [111, 20, 150]
    counts = [60, 20, 150] if phase is Phase.PREFILL else [1] * 3
    prompts = [100, 19, 128]
    view, keys = make_view(contexts, counts, prompts=prompts)
    query = make_query(view)
    got = select(scheme, query, view, phase)
    tiles = Tiles.of(view.rows, 16 if phase is Phase.PREFILL else 1)
    lengths = set()
    for row, (sequence, start, count, position) in enumerate(tiles.host):
        held = keys[sequence]

        def bounds_of(first, held=held):
            return key_cos_bounds(held[first : first + 32].flatten(1), options)

        begun = position // tiles.size * tiles.size
        cut = begun if phase is Phase.PREFILL else prompts[sequence]
        bounds = sorted({*oracle_segments(cut, 32, 8, bounds_of), begun})
        lengths |= {b - a for a, b in itertools.pairwise(bounds)}
        want = best_tokens(upsampled(query[start : start + count], held[:begun], bounds), [True] * begun, 21)
        assert torch.equal(got[row, :, :begun], want)
        assert not got[row, :, begun:].any()
    assert len(lengths) > 3, "chunks of different lengths were tried"


def test_chunks_behind_delimiters():
    ids = torch.randint(0, 12, (150,), generator=torch.Generator().manual_seed(3)).tolist()
    options = SMALL | {"max_chunk_tokens": 12, "delimiter_ids": [7, 9], "boundaries": "delimiter"}
    scheme = registry.build("dhsa", **options, budget_tokens=21)
    assert scheme.needs_token_ids
    view, (keys,) = make_view([150], [150], ids=[ids])
    query = make_query(view)

    def bounds_of(first):
        bounds = [0]
        for place in range(4, 29):  # four tokens are left on both sides of the segment
            if ids[first + place - 1] in (7, 9) and place - bounds[-1] >= 4:
                bounds.append(place)
        # A segment without any delimiter is cut into fixed chunks.
        return split([*bounds, 32], 12) if len(bounds) > 1 else list(range(0, 33, 8))

    got = select(scheme, query, view)
    for row, (_, start, count, position) in enumerate(Tiles.of(view.rows, 16).host):
        bounds = oracle_segments(position, 32, 8, bounds_of)
        scores = upsampled(query[start : start + count], keys[:position], bounds)
        assert torch.equal(got[row, :, :position], best_tokens(scores, [True] * position, 21))


def test_delimiters_need_token_ids():
    scheme = registry.build("dhsa", **SMALL, boundaries="delimiter", delimiter_ids=[1])
    view, _ = make_view([150], [150])
    with pytest.raises(SchemeConfigError, match="token ids"):
        select(scheme, torch.zeros(150, HEADS, DIM), view)


@pytest.mark.parametrize("options", [{"boundaries": "key_cos"}, {"boundaries": "key_cos", "share_boundaries": True}],
                         ids=["every-layer", "shared"])  # fmt: skip
def test_cuts_between_tiles_change_nothing(options):
    scheme = registry.build("dhsa", **SMALL | options, budget_tokens=21)
    want = World([150], scheme).whole(layer=1)[0]
    world = World([150], scheme)
    parts = [world.run([span], layer=1)[0][0] for span in itertools.pairwise([0, 16, 64, 112, 150])]
    close(torch.cat(parts), want)


@pytest.mark.parametrize("kind", ["key_cos", "attn_ratio"])
def test_budget_beyond_the_length_is_dense(kind):
    scheme = registry.build("dhsa", **SMALL, boundaries=kind, budget_tokens=1000)
    close(World([150, 40], scheme).whole()[0], World([150, 40]).whole()[0])
    for whole_prompt in (scheme, registry.build("dhsa", **SMALL | {"segment_tokens": 0}, boundaries=kind)):
        world, dense = World([150], whole_prompt), World([150])
        world.run([(0, 149)])
        dense.run([(0, 149)])
        close(world.run([(149, 150)], phase=Phase.DECODE)[0][0], dense.run([(149, 150)], phase=Phase.DECODE)[0][0])


def test_boundaries_of_the_whole_prompt_at_once():
    """``segment_tokens=0``: chunks of all keys there are; one may reach into the tile it is scored for."""
    options = SMALL | {"segment_tokens": 0, "max_chunk_tokens": 150, "chunks_per_block": 1, "chunk_tokens": 16}
    scheme = registry.build("dhsa", **options, boundaries="key_cos", budget_tokens=21)
    view, (keys,) = make_view([150], [150])
    query = make_query(view)
    bounds = key_cos_bounds(keys.flatten(1), options)
    got = select(scheme, query, view)
    for row, (_, start, count, position) in enumerate(Tiles.of(view.rows, 16).host):
        scores = upsampled(query[start : start + count], keys, bounds)[:, :position]
        assert torch.equal(got[row, :, :position], best_tokens(scores, [True] * position, 21))


def test_uniform_chunks_and_plain_means_are_block_sparse_attention():
    scheme = registry.build("dhsa", **BARE, chunk_tokens=16, block_tokens=32, budget_tokens=32, aggregate="mean")
    view, (keys,) = make_view([128], [32], stats=scheme.page_stats(CacheGeometry(1, 2, DIM, 16, 9)))
    query = make_query(view)
    means = keys[:96].unflatten(0, (6, 16)).mean(1)
    pooled = query.unflatten(1, (KV_HEADS, -1)).mean((0, 2))
    best = torch.einsum("cgd,gd->gc", means, pooled).topk(2, dim=1).indices
    want = torch.zeros(KV_HEADS, 6, dtype=torch.bool).scatter(1, best, True).repeat_interleave(16, 1)
    assert torch.equal(select(scheme, query, view)[0, :, :96], want)
    # Chunks of one length: the norm changes no order.
    normed = registry.build("dhsa", **BARE, chunk_tokens=16, block_tokens=32, budget_tokens=32)
    assert torch.equal(select(normed, query, view)[0, :, :96], want)


def test_heads_that_share_may_change_places():
    scheme = registry.build("dhsa", **SMALL, share_heads="all", budget_tokens=21)
    view, _ = make_view([150], [150])
    swapped, _ = make_view([150], [150])
    swapped.pages.keys.copy_(view.pages.keys.flip(1))
    query = make_query(view)
    order = torch.tensor([3, 1, 0, 2])
    assert torch.equal(select(scheme, query, view), select(scheme, query[:, order], swapped))


@pytest.mark.parametrize(("heads", "kinds"), [("all", KV_HEADS), ("kv_group", KV_HEADS), ("none", HEADS)])
def test_the_budget_pays_for_what_is_kept_if_told_so(heads, kinds):
    options = {"sink_tokens": 5, "window_tokens": 9, "dense_tail_tokens": 0, "block_tokens": 32, "chunk_tokens": 16}
    scheme = registry.build("dhsa", **options, budget_tokens=64, budget_includes_kept=True, share_heads=heads)
    world = World([150], scheme)
    seen = Seen()
    world.run([(0, 150)], observer=seen)
    counts = seen.plans[0].counts
    assert counts.shape[1] == kinds
    assert counts.tolist() == [[min(64, 32 * (row + 1), 150)] * kinds for row in range(4)] + [[64] * kinds]


def test_slabs_of_scores_change_nothing(monkeypatch):
    scheme = registry.build("dhsa", **SMALL, budget_tokens=21)
    for phase, counts in ((Phase.PREFILL, [90, 150]), (Phase.DECODE, [1, 1])):
        view, _ = make_view([90, 150], counts)
        query = make_query(view)
        want = select(scheme, query, view, phase)
        with monkeypatch.context() as patched:
            patched.setattr(dhsa, "SLAB_SCORES", 100)
            assert torch.equal(select(scheme, query, view, phase), want)


def test_chunks_by_the_predictor():
    module, profile = predictor_profile()
    options = SMALL | {"boundary_threshold": 0.0, "max_chunk_tokens": 12}
    scheme = registry.build("dhsa", {"dhsa": profile}, **options, boundaries="predictor", budget_tokens=21)
    view, (keys,) = make_view([111], [111])
    query = make_query(view)

    def bounds_of(first):
        with torch.no_grad():
            logits = module(keys[first : first + 32].flatten(1)).tolist()
        inside = [logit if 3 <= gap < 28 else -math.inf for gap, logit in enumerate(logits)]
        gaps = greedy(inside, 16, 0.0, 4)
        return split([0, *(gap + 1 for gap in gaps), 32], 12) if gaps else list(range(0, 33, 8))

    got = select(scheme, query, view)
    for row, (_, start, count, position) in enumerate(Tiles.of(view.rows, 16).host):
        bounds = oracle_segments(position, 32, 8, bounds_of)
        scores = upsampled(query[start : start + count], keys[:position], bounds)
        assert torch.equal(got[row, :, :position], best_tokens(scores, [True] * position, 21))


@pytest.mark.parametrize(
    "options",
    [
        {"boundaries": "other"}, {"share_heads": "some"}, {"aggregate": "max"}, {"budget_tokens": 0},
        {"chunk_tokens": 48}, {"chunk_tokens": 4}, {"chunk_tokens": 256}, {"block_tokens": 96}, {"block_tokens": 0},
        {"segment_tokens": 100}, {"max_chunk_tokens": 15, "chunk_tokens": 8}, {"boundary_window_tokens": 0},
        {"boundary_threshold": "1"}, {"share_boundaries": 1}, {"delimiter_ids": [1]}, {"boundaries": "delimiter"},
        {"boundaries": "delimiter", "delimiter_ids": ["a"]}, {"min_chunk_tokens": 0}, {"chunks_per_block": 2**62},
        {"boundary_threshold": float("nan")}, {"boundary_threshold": 10**39},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(SchemeConfigError):
        registry.build("dhsa", **options)
