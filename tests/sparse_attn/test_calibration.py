"""Kascade's calibration against its definition, loop by loop, and against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import Rows
from foveate.sparse_attn import ops, registry
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.calibration.anchors import choose_anchors, gained, head_map
from foveate.sparse_attn.calibration.base import ModelShape
from foveate.sparse_attn.calibration.holdings import Maps, Mass, Similarity
from foveate.sparse_attn.errors import SchemeConfigError
from foveate.sparse_attn.profile import Profile
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, Role, StepGroup, StepState
from foveate.sparse_attn.selection import Band

HEADS, KV_HEADS, DIM, PAGE, TILE, TOP = 4, 2, 8, 16, 16, 5
LAYERS = 3
SPEC = AttentionSpec(1.5 * DIM**-0.5)


def shape(windows=(None,) * LAYERS):
    return ModelShape(len(windows), HEADS, KV_HEADS, DIM, tuple(windows))


def calibrator(windows=(None,) * LAYERS, **options):
    options = {"objective": "similarity", "tile_tokens": TILE, "top_tokens": TOP, "decode_tokens": 2} | options
    return registry.load("kascade").calibrator(shape(windows), options)


def sample(seed, length=70, layers=LAYERS):
    """Queries and keys per layer; layer 1 asks nearly what layer 0 asks, with its heads exchanged."""
    generator = torch.Generator().manual_seed(seed)
    query = [torch.randn(length, HEADS, DIM, generator=generator) for _ in range(layers)]
    keys = [torch.randn(length, KV_HEADS, DIM, generator=generator) for _ in range(layers)]
    query[1] = query[0].unflatten(1, (KV_HEADS, -1)).flip(1).flatten(1, 2) * 1.1
    keys[1] = keys[0].flip(1)
    return query, keys


def show(seen, query, keys, spans, specs=(SPEC,) * LAYERS):
    """Runs one sample past a calibrator, in the steps ``(start, stop, phase)``, and ends it."""
    length, layers = len(query[0]), len(query)
    pages = -(-length // PAGE)
    pool = PagePool(CacheGeometry(layers, KV_HEADS, DIM, PAGE, pages))
    for start, stop, phase in spans:
        rows = Rows.build([list(range(pages))], [stop], [stop - start], torch.device("cpu"))
        step = StepState(
            pool, torch.arange(start, stop), torch.arange(start, stop), [StepGroup(None, phase, 0, rows, (0,))],
            None, torch.zeros(1, 2, dtype=torch.float64), observer=seen,
        )  # fmt: skip
        for layer in range(layers):
            part = slice(start, stop)
            ops.write_kv(keys[layer][part], keys[layer][part], pool.layer(layer), step.slots)
            attend(query[layer][part], LayerCall(layer, specs[layer]), step)
            # Attention turns the residual stream by more in later layers.
            before = torch.tensor([[1.0, 0.0]]).repeat(stop - start, 1)
            seen.see_residual(layer, before, torch.tensor([[0.0, layer + 1.0]]))
    seen.end_sample()


WHOLE = [(0, 68, Phase.PREFILL), (68, 69, Phase.DECODE), (69, 70, Phase.DECODE)]


def expected(query, keys):
    """Section 3.3: ``[a, b, y, x]`` for one sample, by loops."""
    length = len(query[0])
    maps, tiles = [], [(start, min(start + TILE, 68)) for start in range(0, 68, TILE)] + [(68, 69), (69, 70)]
    for q, k in zip(query, keys, strict=True):
        logits = torch.einsum("thd,shd->hts", q, k.repeat_interleave(HEADS // KV_HEADS, 1)) * SPEC.scale
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), -1)
        maps.append(weights.unflatten(0, (KV_HEADS, -1)).sum(1))
    result = torch.zeros(LAYERS, LAYERS, KV_HEADS, KV_HEADS)
    for a, b in itertools.combinations_with_replacement(range(LAYERS), 2):
        for x, y in itertools.product(range(KV_HEADS), repeat=2):
            shares = []
            for start, stop in tiles:
                end = start if start < 68 else stop  # in decode the newest key is a candidate too
                ours, theirs = (maps[layer][head, start:stop].sum(0) for layer, head in ((b, y), (a, x)))
                own = ours[end:].sum()
                held, most = (ours[:end][other[:end].argsort(descending=True)[:TOP]].sum() for other in (theirs, ours))
                shares.append((held + own) / (most + own))
            result[a, b, y, x] = min(shares)
    return result


def learnt_similarity(seen):
    return seen.state()["similarity"] / seen.state()["samples"]


def test_similarity_is_the_papers():
    samples = [sample(0), sample(1)]
    seen = calibrator()
    for query, keys in samples:
        show(seen, query, keys, WHOLE)
    want = sum(expected(query, keys) for query, keys in samples) / 2
    torch.testing.assert_close(learnt_similarity(seen).float(), want, atol=1e-5, rtol=1e-5)


def test_chunks_change_nothing():
    whole, chunked = calibrator(), calibrator()
    show(whole, *sample(0), WHOLE)
    show(chunked, *sample(0), [(0, 32, Phase.PREFILL), (32, 48, Phase.PREFILL), (48, 68, Phase.PREFILL), *WHOLE[1:]])
    torch.testing.assert_close(whole.state()["similarity"], chunked.state()["similarity"], atol=1e-6, rtol=1e-6)


def test_importance_is_one_minus_the_cosine_to_what_follows():
    seen = calibrator()
    show(seen, *sample(0), WHOLE)
    _, tensors = seen.result()
    want = [1 - 1 / (1 + (layer + 1) ** 2) ** 0.5 for layer in range(LAYERS)]
    torch.testing.assert_close(tensors["importance"], torch.tensor(want))


def test_the_profile_serves_the_scheme():
    """Layer 1 is layer 0 with its heads exchanged, and that is what is learnt."""
    seen = calibrator(anchors=2)
    show(seen, *sample(0), WHOLE)
    options, tensors = seen.result()
    assert options == {"chosen_anchors": 2}
    assert tensors["anchors.2"].tolist() == [0, 2]
    assert tensors["head_map.2"].tolist() == [[0, 1], [1, 0], [0, 1]]
    scheme = registry.build("kascade", {"kascade": Profile("kascade", {}, options, "", tensors)})
    assert [role.role for role in scheme.roles(LAYERS)] == [Role.DENSE_ANCHOR, Role.REUSE, Role.SELECT]


def test_layers_with_a_window_are_never_anchors():
    windows = (20, None, 20, None, None)
    seen = calibrator(windows, anchors=2)
    query, keys = sample(0, layers=5)
    specs = [AttentionSpec(SPEC.scale, band=Band(0, window)) for window in windows]
    show(seen, query, keys, WHOLE, specs)
    _, tensors = seen.result()
    assert tensors["global_layers"].tolist() == [1, 3, 4]
    for count in (1, 2, 3):
        anchors = tensors[f"anchors.{count}"].tolist()
        assert anchors[0] == 1
        assert set(anchors) <= {1, 3, 4}
        assert tensors[f"head_map.{count}"].shape == (5, KV_HEADS)
    assert "anchors.4" not in tensors


@pytest.mark.parametrize("name", [name for name in registry.names() if registry.load(name).calibrated])
def test_a_model_of_nothing_but_windows_is_refused_before_any_sample(name):
    with pytest.raises(SchemeConfigError, match="window of its own"):
        registry.load(name).calibrator(shape((20, 20)), {})


@pytest.mark.parametrize(
    ("options", "least"),
    [
        # The last token, generated, chooses five of six keys, its own among them.
        ({"objective": "similarity", "decode_tokens": 1}, TOP + 1),
        # The first tile behind as many keys begins at 16.
        ({"objective": "similarity", "decode_tokens": 0}, TILE + 1),
        ({"objective": "mass", "decode_tokens": 1}, 3 + 8 + TOP + 1),
        ({"objective": "mass", "decode_tokens": 0}, 2 * TILE + 1),
    ],
    ids=str,
)
def test_samples_that_leave_no_choice_are_refused(options, least):
    """Were every candidate chosen, any layer's choice would hold all that any other attends to."""
    options = options | {"sink_tokens": 3, "window_tokens": 8}

    def learn(length):
        seen, prompt = calibrator(**options), length - options["decode_tokens"]
        answer = [(token, token + 1, Phase.DECODE) for token in range(prompt, length)]
        show(seen, *sample(0, length), [(0, prompt, Phase.PREFILL), *answer])
        return seen.result()[1]["layer_holdings"]

    with pytest.raises(SchemeConfigError, match=f"samples of at least {least} tokens"):
        learn(least - 1)
    assert float(learn(least).diagonal().min()) > 0


def test_each_sample_must_leave_a_choice():
    seen = calibrator()
    show(seen, *sample(0), WHOLE)
    with pytest.raises(SchemeConfigError, match=f"samples of at least {TOP + 1} tokens"):
        show(seen, *sample(1, TOP), [(0, TOP, Phase.PREFILL)])


@pytest.mark.parametrize("objective", ["similarity", "mass"])
def test_it_goes_on_from_its_state(objective):
    options = {"objective": objective, "sink_tokens": 3, "window_tokens": 8}
    whole, first = calibrator(**options), calibrator(**options)
    for seed in range(3):
        show(whole, *sample(seed), WHOLE)
    for seed in range(2):
        show(first, *sample(seed), WHOLE)
    second = calibrator(**options)
    second.restore(first.state())
    show(second, *sample(2), WHOLE)
    for name, tensor in whole.result()[1].items():
        assert torch.equal(second.result()[1][name], tensor), name


def test_without_a_sample_there_is_nothing_to_learn():
    with pytest.raises(SchemeConfigError, match="no sample"):
        calibrator().result()


@pytest.mark.parametrize("name", [name for name in registry.names() if not registry.load(name).calibrated])
def test_schemes_without_a_profile_have_nothing_to_calibrate(name):
    with pytest.raises(SchemeConfigError, match="nothing to calibrate"):
        registry.load(name).calibrator(shape(), {})


@pytest.mark.parametrize(
    "options",
    [
        {"top_tokens": 0}, {"anchors": 9}, {"anchors": True}, {"decode_tokens": -1}, {"nonsense": 1},
        {"kept": 0}, {"kept": 1.5}, {"kept": True}, {"objective": "both"}, {"anchors": 10**20},
    ],
    ids=str,
)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(SchemeConfigError, match=next(iter(options))):
        calibrator(**options)


matrices = st.integers(1, 6).flatmap(
    lambda size: st.lists(st.floats(0, 1, width=32), min_size=size * size, max_size=size * size).map(
        lambda values: torch.tensor(values).view(size, size).triu()
    )
)


def total(gain, anchors):
    ends = [*anchors[1:], len(gain)]
    return sum(float(gain[anchor, anchor:end].double().sum()) for anchor, end in zip(anchors, ends, strict=True))


@given(matrices)
@settings(max_examples=60)
def test_anchors_are_the_best_of_all(gain):
    for count in range(1, len(gain) + 1):
        anchors = choose_anchors(gain, count)
        every = [(0, *rest) for rest in itertools.combinations(range(1, len(gain)), count - 1)]
        assert tuple(anchors) in every
        assert total(gain, anchors) == pytest.approx(max(total(gain, each) for each in every))


@given(matrices)
@settings(max_examples=60)
def test_more_anchors_never_lose_where_a_layer_serves_itself_best(gain):
    gain.fill_diagonal_(1.0)
    totals = [total(gain, choose_anchors(gain, count)) for count in range(1, len(gain) + 1)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(totals))


def similarity(scores, starts):
    """Of one sample that is one chunk."""
    found = Similarity(len(scores), scores.shape[2], TOP)
    found.add(Maps(scores, torch.tensor(starts), Phase.PREFILL, 1))
    found.end_sample()
    return found.mean()


def test_similarity_lies_between_0_and_1_and_is_1_to_itself():
    maps = torch.rand(3, 4, KV_HEADS, 40, generator=torch.Generator().manual_seed(0)) ** 4
    starts = [0, 16, 32, 36]  # the first tile has no candidates
    found = similarity(maps, starts)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    for layer, head in itertools.product(range(3), range(KV_HEADS)):
        assert found[layer, layer, head, head] == pytest.approx(1)
    each = torch.stack([similarity(maps[:, [row]], [start]) for row, start in enumerate(starts)])
    torch.testing.assert_close(found, each.amin(0))
    assert bool((found <= each.mean(0) + 1e-6).all())
    assert torch.equal(similarity(torch.zeros(1, 1, 1, 3), [0]), torch.ones(1, 1, 1, 1, dtype=torch.float64))


def test_mass_counts_what_is_chosen_between_sinks_and_window():
    """By loops, with prompt and answer counted alike."""
    generator = torch.Generator().manual_seed(0)
    prompt, answer = torch.rand(2, 3, KV_HEADS, 48, generator=generator), torch.rand(2, 1, KV_HEADS, 49)
    found = Mass(2, KV_HEADS, TOP, sink_tokens=3, window_tokens=8)
    found.add(Maps(prompt[:, :2], torch.tensor([0, 16]), Phase.PREFILL, 32))
    found.add(Maps(prompt[:, 2:], torch.tensor([32]), Phase.PREFILL, 16))
    found.add(Maps(answer, torch.tensor([49]), Phase.DECODE, 1))

    def held(scores, start, a, b, y, x):
        free = range(3, max(start - 8, 3))
        best = sorted(free, key=lambda key: -float(scores[a, x, key]))[:TOP]
        return sum(float(scores[b, y, key]) for key in best)

    for a, b in itertools.combinations_with_replacement(range(2), 2):
        for y, x in itertools.product(range(KV_HEADS), repeat=2):
            tiles = sum(held(prompt[:, row], start, a, b, y, x) for row, start in enumerate((0, 16, 32))) / 48
            assert float(found.mean()[a, b, y, x]) == pytest.approx((tiles + held(answer[:, 0], 49, a, b, y, x)) / 2)


def test_the_fewest_anchors_that_keep_the_share_are_proposed():
    """Layer 1 is layer 0 with its heads exchanged, so its choice is held by layer 0's; layer 2 is like neither."""
    seen = calibrator(objective="mass", sink_tokens=0, window_tokens=0, kept=0.99)
    show(seen, *sample(0), WHOLE)
    options, tensors = seen.result()
    assert options == {"chosen_anchors": 2}
    assert tensors["anchors.2"].tolist() == [0, 2]
    assert tensors["head_map.2"].tolist() == [[0, 1], [1, 0], [0, 1]]
    gain = tensors["layer_holdings"].clone()
    gain[:, 0] = 0.0
    shares = [gained(gain, tensors[f"anchors.{number}"].tolist()) / float(gain.diagonal().sum()) for number in (1, 2)]
    assert shares[0] < 0.99 <= shares[1]


def test_head_maps_name_the_anchors_best_head():
    mean = torch.zeros(3, 3, 2, 2)
    mean[0, 1] = torch.tensor([[0.1, 0.9], [0.8, 0.9]])
    assert head_map(mean, [0, 2]).tolist() == [[0, 1], [1, 1], [0, 1]]
