"""Top-theta by its definition (arXiv:2502.08363), and what its calibration must learn."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import VALUE_SUM
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops, registry
from foveate.sparse_attn.calibration.base import ModelShape
from foveate.sparse_attn.calibration.threshold_table import VARIANTS, ThresholdTable
from foveate.sparse_attn.calibration.top_theta import BUDGETS, LENGTHS
from foveate.sparse_attn.errors import CalibrationMissing, ProfileError, SchemeConfigError
from foveate.sparse_attn.profile import Profile
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, Role, StepGroup
from foveate.sparse_attn.schemes.top_theta import TopTheta
from foveate.sparse_attn.selection import Band, Tiles

from .test_schemes import HEADS, KV_HEADS, SPEC, World, close, rotate

INF = float("inf")
PURE = {"sink_tokens": 0, "window_tokens": 0, "dense_tail_tokens": 0}
SHAPE = ModelShape(3, 4, 2, 16, (None, 64, None))
LAYER = LayerCall(0, AttentionSpec(0.25))


def profile_of(*tables, dtype=torch.float32):
    """A profile of one table for both variants, or of one each."""
    tensors = {}
    for variant, table in zip(VARIANTS, tables * (2 // len(tables)), strict=True):
        tensors |= table.tensors(variant, dtype)
    return Profile("top_theta", {}, {}, "", tensors)


def made_up_table(sizes=(8, 64, 256), budgets=(4, 16, 1024), seed=0):
    """Thresholds that fall with the budget and rise with the size, differently in every head."""
    share = (torch.tensor(budgets) / torch.tensor(sizes)[:, None]).clamp(max=0.99)
    spread = 0.3 * torch.randn(2, HEADS, 1, 1, generator=torch.Generator().manual_seed(seed))
    theta = 1.4 * torch.erfinv(1 - 2 * share) + spread
    expected = torch.log(2.0 + 0.1 * theta.abs())
    return ThresholdTable((0, 1), torch.tensor(sizes), torch.tensor(budgets), theta, expected)


def interpolated(table, sizes, budgets, size, budget):
    """Linear in both logarithms, written out for one number: ``[H]``."""
    i = max(index for index in range(len(sizes) - 1) if sizes[index] <= size)
    j = max(index for index in range(len(budgets) - 1) if budgets[index] <= budget)
    s = math.log(size / sizes[i]) / math.log(sizes[i + 1] / sizes[i])
    t = math.log(budget / budgets[j]) / math.log(budgets[j + 1] / budgets[j])
    corners = [table[:, a, b] * x * y for a, x in ((i, 1 - s), (i + 1, s)) for b, y in ((j, 1 - t), (j + 1, t))]
    return sum(corners)


def by_definition(world, table, options, layer):
    """Section 2 of the paper in masks, one query at a time: ``[T, H, D]``."""
    n_keys = world.lengths[0]
    sinks, window = options.get("sink_tokens", 64), options.get("window_tokens", 256)
    budget = options["budget_tokens"]
    if layer < 2:
        budget = max(budget, options.get("first_layers_budget_tokens", 512))
    positions = torch.arange(n_keys)
    q, k = rotate(world.q[0], positions), rotate(world.k[0], positions)
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, world.v[0]))
    logits = torch.einsum("qhd,khd->hqk", q, k) * SPEC.scale
    out = torch.zeros(n_keys, HEADS, q.shape[-1])
    for i in range(n_keys):
        x = logits[:, i, : i + 1]
        always = torch.zeros(i + 1, dtype=torch.bool)
        always[:sinks] = True
        if window:
            always[max(0, i - window) :] = True
        candidates = i + 1 - sinks - (window + 1 if window else 0)
        kept = torch.ones_like(x, dtype=torch.bool)
        grids = table.sizes.tolist(), table.budgets.tolist()
        if candidates > budget:
            theta = interpolated(table.theta[layer], *grids, candidates, budget)
            kept = x > theta[:, None]
            if options.get("gqa") == "union":
                kept = kept.view(KV_HEADS, -1, i + 1).any(1).repeat_interleave(HEADS // KV_HEADS, 0)
            kept = kept | always
        weights = torch.exp(x - x.amax(1, keepdim=True))
        read, dropped = (weights * kept).sum(1), (weights * ~kept).sum(1)
        compensation = options.get("compensation", "exact")
        if compensation == "bound":
            dropped = (~kept).sum(1) * torch.exp(theta - x.amax(1)) if candidates > budget else 0 * read
        elif compensation == "calibrated":
            none = (~kept).sum(1) == 0
            dropped = interpolated(table.expected[layer], *grids, candidates, budget).exp() if not none.all() else read
            dropped = torch.where(none, 0.0, dropped)
        elif compensation == "none":
            dropped = 0 * read
        total = read + options.get("compensation_scale", 1.0) * dropped
        share = torch.where(kept, weights / total[:, None], 0.0)
        out[i] = torch.einsum("hk,khd->hd", share, v[: i + 1])
        if options.get("value_mean", True):
            out[i] += (1 - share.sum(1))[:, None] * v[: i + 1].mean(0)
    return out


OPTIONS = {
    "pure": PURE | {"first_layers_budget_tokens": 0},
    "first-layers": PURE | {"first_layers_budget_tokens": 40},
    "sinks-and-window": {"sink_tokens": 5, "window_tokens": 9, "first_layers_budget_tokens": 0},
    "union": PURE | {"first_layers_budget_tokens": 0, "gqa": "union"},
    "bound": PURE | {"first_layers_budget_tokens": 0, "compensation": "bound", "compensation_scale": 0.4},
    "calibrated": PURE | {"first_layers_budget_tokens": 0, "compensation": "calibrated"},
    "half": PURE | {"first_layers_budget_tokens": 0, "compensation_scale": 0.5, "value_mean": False},
    "none": {"sink_tokens": 1, "window_tokens": 0, "compensation": "none", "value_mean": False}
    | {"first_layers_budget_tokens": 0},
}


@pytest.mark.parametrize("length", [1, 63, 111, 250])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prompts_follow_the_definition(length, options):
    options = {"budget_tokens": 12, **options}
    table = made_up_table()
    world = World([length], registry.build("top_theta", {"top_theta": profile_of(table)}, **options))
    close(world.whole()[0], by_definition(world, table, options, 0))


@pytest.mark.parametrize("length", [13, 64, 111, 250])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decode_follows_the_definition(length, options):
    options = {"budget_tokens": 12, **options}
    table = made_up_table()
    world = World([length], registry.build("top_theta", {"top_theta": profile_of(table)}, **options))
    world.run([(0, length - 1)], layer=1)
    got, step = world.run([(length - 1, length)], phase=Phase.DECODE, layer=1)
    close(got[0], by_definition(world, table, options, 1)[-1:])
    read, dense = step.keys_read[0].tolist()
    assert dense == 2 * HEADS * length
    # Every key is scored, which is half a read; of the values some are left out.
    assert dense / 2 < read <= dense
    if length == 250 and options["first_layers_budget_tokens"] == 0:
        assert read < 0.75 * dense


@pytest.mark.parametrize("length", [12, 13])
def test_rows_of_no_more_keys_than_the_budget_are_untouched(length):
    scheme = registry.build(
        "top_theta", {"top_theta": profile_of(made_up_table())}, **OPTIONS["pure"], budget_tokens=12
    )
    world = World([length], scheme)
    plan = plan_of(scheme, world.pool.layer(0), length, 1)
    assert bool(torch.isinf(plan.theta).all()) == (length == 12)


def plan_of(scheme, pages, context, count, layer=0, heads=HEADS):
    view = PagedView(pages, Rows.build([[0] * -(-context // 16)], [context], [count], torch.device("cpu")))
    return scheme.select_prefill(torch.zeros(count, heads, 16), view, Tiles.of(view.rows, 128), LayerCall(layer, SPEC))


def test_thresholds_of_all_layers_at_once_are_those_of_each(monkeypatch):
    profiles = {"top_theta": profile_of(made_up_table())}
    scheme = registry.build("top_theta", profiles, **OPTIONS["calibrated"], budget_tokens=12)
    pages = World([200], scheme).pool.layer(0)
    together = [plan_of(scheme, pages, 200, 150, layer) for layer in (0, 1)]
    monkeypatch.setattr("foveate.sparse_attn.schemes.top_theta._AT_ONCE", 0)
    for layer, want in enumerate(together):
        got = plan_of(scheme, pages, 200, 150, layer)
        assert torch.equal(got.theta, want.theta)
        assert torch.equal(got.expected, want.expected)
    assert not torch.equal(together[0].theta, together[1].theta)


def test_beyond_its_points_a_table_keeps_the_share():
    table = made_up_table()
    for name in ("theta", "expected"):
        half = {key: value - (math.log(0.5) if key == "expected" else 0) for key, value in
                table.at(torch.tensor([256.0]), 50).items()}  # fmt: skip
        torch.testing.assert_close(table.at(torch.tensor([512.0]), 100)[name], half[name])
        torch.testing.assert_close(
            table.at(torch.tensor([200.0]), 2048)["theta"], table.at(torch.tensor([100.0]), 1024)["theta"]
        )
    # Towards larger sizes at one budget thresholds rise, until the smallest budget stops them.
    theta = table.at(torch.tensor([256.0, 512.0, 1024.0, 4096.0, 1e6]), 12)["theta"]
    assert bool((theta.diff(dim=-1) >= 0).all())
    assert bool((theta.diff(dim=-1)[..., 0] > 0).all())
    torch.testing.assert_close(theta[..., -1], table.theta[:, :, -1, 0])


def test_a_table_returns_its_own_points():
    table = made_up_table()
    for column, budget in enumerate(table.budgets.tolist()):
        assert torch.equal(table.at(table.sizes.float(), budget)["theta"], table.theta[..., column])


def whole_numbers(length, seed=0, kv_heads=KV_HEADS):
    """Queries and keys of whole numbers: their products are exact in float32, in any order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-64, 65, (length, heads, 16), generator=generator).float()
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def pages_of(keys, values):
    """A pool that holds one sequence, and its block table."""
    length = len(keys)
    table = torch.randperm(-(-length // 16), generator=torch.Generator().manual_seed(9)).tolist()
    pool = PagePool(CacheGeometry(1, KV_HEADS, 16, 16, len(table)), (VALUE_SUM,))
    slots = torch.tensor([table[i // 16] * 16 + i % 16 for i in range(length)])
    ops.write_kv(keys, values, pool.layer(0), slots)
    return pool.layer(0), table


def show(calibrator, q, k, v, cuts=(), layers=(0, 1, 2)):
    """One sample, in chunks that end at ``cuts``."""
    pages, table = pages_of(k, v)
    start = 0
    for stop in (*cuts, len(q)):
        rows = Rows.build([table[: -(-stop // 16)]], [stop], [stop - start], torch.device("cpu"))
        for layer in layers:
            spec = replace(LAYER.spec, band=Band(0, SHAPE.windows[layer]))
            calibrator.see(
                q[start:stop], PagedView(pages, rows), LayerCall(layer, spec),
                StepGroup(None, Phase.PREFILL, 0, rows, (0,)), (), torch.zeros(stop - start, HEADS),
            )  # fmt: skip
        start = stop
    calibrator.end_sample()


def calibrator(**options):
    given = {"queries_per_length": 1, "sink_tokens": 4, "window_tokens": 8, **options}
    return registry.load("top_theta").calibrator(SHAPE, given)


def logits_of(q, k, position):
    keys = k[: position + 1].repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("hd,khd->hk", q[position], keys) * LAYER.spec.scale


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [128, 256, 384])
def test_on_its_own_sample_exactly_k_are_kept(length, variant):
    q, k, v = whole_numbers(400)
    learner = calibrator(sink_tokens=3, window_tokens=9)
    show(learner, q, k, v)
    profiles = {"top_theta": profile_of(*learner.tables().values())}
    pages, table = pages_of(k, v)
    rows = Rows.build([table], [length], [1], torch.device("cpu"))
    forced = {"sink_tokens": 3, "window_tokens": 9} if variant == "free" else {"sink_tokens": 0, "window_tokens": 0}
    candidates = length - (13 if variant == "free" else 0)
    for budget in (size for size in BUDGETS if size < candidates):
        scheme = registry.build(
            "top_theta", profiles, **forced, budget_tokens=budget, first_layers_budget_tokens=0, value_mean=False
        )
        view = PagedView(pages, rows)
        plan = scheme.select_decode(q[length - 1 : length], view, Tiles.of(rows, 1), LAYER)
        # Without what is kept anyway: exactly the budget, of the candidates alone or of all keys.
        x = logits_of(q, k, length - 1)
        x = x[:, 3:-10] if variant == "free" else x
        assert (x > plan.theta.T).sum(1).tolist() == [budget] * HEADS
        if variant == "all":
            _, _, kept = ops.thresholded(q[length - 1 : length], view, plan, LAYER.spec)
            assert kept.tolist() == [[budget] * HEADS]


def test_a_threshold_is_the_mean_over_samples_plus_deviations():
    samples = [whole_numbers(300, seed) for seed in (1, 2, 3)]
    learner = calibrator(sigma=0.5)
    for sample in samples:
        show(learner, *sample)
    table = learner.tables()["all"]
    assert table.layers == (0, 2)
    assert table.sizes.tolist() == [128, 192, 256]
    for row, length in enumerate(table.sizes.tolist()):
        ranked = torch.stack([logits_of(q, k, length - 1).sort(1, descending=True).values for q, k, _ in samples])
        for column, budget in enumerate(BUDGETS):
            values = ranked[:, :, min(budget, length - 1)]
            want = values.mean(0) + 0.5 * values.std(0, correction=0)
            torch.testing.assert_close(table.theta[0, :, row, column], want, atol=1e-3, rtol=1e-5)
            torch.testing.assert_close(table.theta[1, :, row, column], want, atol=1e-3, rtol=1e-5)
            rest = torch.exp(ranked - ranked[..., :1])[..., budget:].sum(-1).mean(0)
            torch.testing.assert_close(table.expected[0, :, row, column].exp(), rest, atol=1e-6, rtol=1e-4)


def test_queries_of_a_length_are_sampled_right_before_it():
    q, k, v = whole_numbers(140)
    learner = calibrator(queries_per_length=4)
    show(learner, q, k, v)
    want = torch.stack([logits_of(q, k, n - 1).sort(1, descending=True).values[:, 16] for n in (122, 124, 126, 128)])
    torch.testing.assert_close(learner.tables()["all"].theta[0, :, 0, 0], want.mean(0))
    assert learner.result()[0] == {"queries": 4}


def test_soft_caps_are_in_the_thresholds():
    q, k, v = whole_numbers(130)
    learner = calibrator()
    pages, table = pages_of(k, v)
    rows = Rows.build([table], [130], [130], torch.device("cpu"))
    spec = AttentionSpec(0.25, softcap=50.0)
    for layer in (0, 2):
        learner.see(q, PagedView(pages, rows), LayerCall(layer, spec), None, (), None)
    scores = 50 * torch.tanh(logits_of(q, k, 127) / 50)
    got = learner._sums["theta"][0, 0, :, 0, 2]
    torch.testing.assert_close(got.float(), scores.sort(1, descending=True).values[:, 64])


@pytest.mark.parametrize("cuts", [(128,), (100, 127, 129, 200, 256, 257)], ids=str)
def test_chunks_teach_the_same(cuts):
    whole, chunked = calibrator(), calibrator()
    sample = whole_numbers(400)
    show(whole, *sample)
    show(chunked, *sample, cuts=cuts)
    for name, want in whole.result()[1].items():
        assert torch.equal(chunked.result()[1][name], want), name


def test_calibration_goes_on_from_its_state():
    samples = [whole_numbers(300, seed) for seed in (1, 2, 3)]
    whole, first, second = calibrator(), calibrator(), calibrator()
    for sample in samples:
        show(whole, *sample)
    for sample in samples[:2]:
        show(first, *sample)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    show(second, *samples[2])
    for name, want in whole.result()[1].items():
        assert torch.equal(second.result()[1][name], want), name


def test_samples_that_are_too_short_teach_nothing():
    learner = calibrator(sink_tokens=64, window_tokens=256)
    show(learner, *whole_numbers(127))
    with pytest.raises(SchemeConfigError, match="at least 128 tokens"):
        learner.result()
    show(learner, *whole_numbers(383))
    with pytest.raises(SchemeConfigError, match="at least 384 tokens"):
        learner.result()


def test_a_profile_survives_its_file_and_serves(tmp_path):
    learner = calibrator()
    show(learner, *whole_numbers(400))
    about, tensors = learner.result()
    Profile("top_theta", {"layers": 3}, about, "", tensors).save(tmp_path / "p.safetensors")
    loaded = Profile.load(tmp_path / "p.safetensors")
    scheme = registry.build("top_theta", {"top_theta": loaded}, budget_tokens=64, first_layers_budget_tokens=0, **PURE)
    pages, _ = pages_of(*whole_numbers(400)[1:])
    q, k, _ = whole_numbers(400)
    theta = plan_of(scheme, pages, LENGTHS[2], 1).theta[0]
    want = logits_of(q, k, LENGTHS[2] - 1).sort(1, descending=True).values[:, 64]
    torch.testing.assert_close(theta, want, atol=0, rtol=2**-11)  # 16 bits
    with pytest.raises(ProfileError, match="layer 1"):
        plan_of(scheme, pages, 200, 1, layer=1)


def test_without_a_usable_profile_it_says_so():
    with pytest.raises(CalibrationMissing, match="foveate calibrate MODEL --scheme top_theta"):
        registry.build("top_theta")
    whole = profile_of(made_up_table())
    lacking = {name: tensor for name, tensor in whole.tensors.items() if name != "free.theta"}
    with pytest.raises(ProfileError, match=r"lacks free\.theta"):
        registry.build("top_theta", {"top_theta": replace(whole, tensors=lacking)})
    bent = dict(whole.tensors) | {"free.theta": whole.tensors["free.theta"][..., 1:]}
    with pytest.raises(ProfileError, match="malformed"):
        registry.build("top_theta", {"top_theta": replace(whole, tensors=bent)})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget_tokens": 0}, "budget_tokens"),
        ({"compensation": "other"}, "compensation"),
        ({"compensation": "none"}, "value_mean"),
        ({"compensation_scale": -1.0}, "compensation_scale"),
        ({"compensation_scale": float("nan")}, "compensation_scale"),
        ({"compensation_scale": INF}, "compensation_scale"),
        ({"compensation_scale": 1e39}, "compensation_scale"),
        ({"compensation_scale": 10**39}, "compensation_scale"),
        ({"value_mean": 1}, "value_mean"),
        ({"sparse_prefill": "no"}, "sparse_prefill"),
        ({"gqa": "shared"}, "gqa"),
        ({"dense_first_layers": -1}, "dense_first_layers"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(SchemeConfigError, match=named):
        TopTheta.Options(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"sigma": "x"}, "sigma"), ({"sigma": 10**400}, "sigma"), ({"queries_per_length": 0}, "queries")],
)
def test_calibration_options_that_cannot_be_are_refused(options, named):
    with pytest.raises(SchemeConfigError, match=named):
        calibrator(**options)


def test_layers_phases_and_statistics_follow_the_options():
    profiles = {"top_theta": profile_of(made_up_table())}
    scheme = registry.build("top_theta", profiles, dense_first_layers=2, sparse_prefill=False, value_mean=False)
    assert [role.role for role in scheme.roles(3)] == [Role.DENSE, Role.DENSE, Role.SELECT]
    assert scheme.for_phase(Phase.PREFILL).name == "dense"
    assert scheme.for_phase(Phase.DECODE) is scheme
    geometry = CacheGeometry(1, 1, 16, 16, 1)
    assert scheme.page_stats(geometry) == ()
    assert registry.build("top_theta", profiles).page_stats(geometry) == (VALUE_SUM,)


def test_above_its_largest_budget_a_table_keeps_the_share_of_the_largest():
    """In ``made_up_table`` thresholds of the largest budget are the same at every size: nothing would be seen there."""
    sizes, budgets = torch.tensor([256, 1024, 4096]), torch.tensor([16, 64])
    theta = (sizes[:, None] / budgets).log().expand(2, HEADS, -1, -1).float()
    table = ThresholdTable((0, 1), sizes, budgets, theta, -theta)
    for size, budget in ((2048.0, 128), (4096.0, 256), (1024.0, 96)):
        wanted = torch.full((2, HEADS, 1), math.log(size / budget))
        torch.testing.assert_close(table.at(torch.tensor([size]), budget)["theta"], wanted)


def test_what_is_left_out_is_the_mean_over_samples():
    samples = [[part / 64 for part in whole_numbers(300, seed)] for seed in (1, 2, 3)]
    learner = calibrator()
    for sample in samples:
        show(learner, *sample)
    table = learner.tables()["all"]
    for row, length in enumerate(table.sizes.tolist()):
        ranked = torch.stack([logits_of(q, k, length - 1).sort(1, descending=True).values for q, k, _ in samples])
        weights = torch.exp(ranked.double() - ranked[..., :1])
        for column, budget in enumerate(BUDGETS):
            want = weights[..., budget:].sum(-1).mean(0)
            assert (want.min() > 0.1) == (budget < length), "nothing is left out: the test shows nothing"
            got = table.expected[0, :, row, column].double().exp()
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
