"""Top-theta by the definition of arXiv:2502.08363: every score compared with a threshold, one row at a time."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from foveate.sparse_attn import registry
from foveate.sparse_attn.calibration.base import ModelShape
from foveate.sparse_attn.calibration.threshold_table import VARIANTS, ThresholdTable
from foveate.sparse_attn.profile import Profile
from foveate.sparse_attn.protocol import Phase

from .oracle import PURE, Pages, Text, answer, attention, causal, logits, whole

SIZES, BUDGETS = (16, 64, 256), (4, 16, 64)


def table(layers=1, heads=4, sizes=SIZES, budgets=BUDGETS, theta=None, seed=0):
    """Roughly what Gaussian scores would teach, with some spread; or one ``theta`` for everything."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.2 * torch.randn(layers, heads, len(sizes), len(budgets), generator=generator)
    shares = [[NormalDist().inv_cdf(1 - min(k / n, 0.99)) for k in budgets] for n in sizes]
    values = torch.tensor(shares) + spread if theta is None else torch.full_like(spread, theta)
    return ThresholdTable(tuple(range(layers)), torch.tensor(sizes), torch.tensor(budgets), values, 0.5 + spread)


def top_theta(learnt, **options):
    tensors = {name: part for variant in VARIANTS for name, part in learnt.tensors(variant, torch.float32).items()}
    beside = {"first_layers_budget_tokens": 0} | PURE
    return registry.build("top_theta", {"top_theta": Profile("top_theta", {}, {}, "", tensors)}, **beside | options)


def between(grid, value):
    """The places on either side of ``value`` in the logarithm, and how far it is from the first."""
    high = next(i for i, point in enumerate(grid) if point >= value)
    low = max(high - 1, 0)
    step = math.log(grid[high]) - math.log(grid[low])
    return low, high, (math.log(value) - math.log(grid[low])) / step if step else 0.0


def looked_up(values, learnt, count, budget):
    """``[H]`` for ``count`` candidates: linear in the logarithms of both; outside the sizes the same share is taken."""
    sizes, budgets = learnt.sizes.tolist(), learnt.budgets.tolist()
    near = min(max(count, sizes[0]), sizes[-1])
    a, b, down = between(sizes, near)
    c, d, along = between(budgets, min(max(budget * near / count, budgets[0]), budgets[-1]))
    upper = values[:, a, c] * (1 - along) + values[:, a, d] * along
    lower = values[:, b, c] * (1 - along) + values[:, b, d] * along
    return (upper * (1 - down) + lower * down).double()


def read(text, learnt, budget, layer=0, union=False, compensation="exact", scale=1.0, mean=True, sinks=0, window=0):
    """``[N, H, D]`` float64; rows with no more than ``budget`` candidates are dense."""
    q, k, v = text.q[layer], text.k[layer], text.v[layer].double().repeat_interleave(text.group, 1)
    scores, out = logits(q, k) * text.scale, torch.zeros(q.shape, dtype=torch.float64)
    for row in range(text.tokens):
        kept = [key for key in range(row + 1) if key < sinks or (window and key >= row - window)]
        count = row + 1 - len(kept)
        visible = scores[:, row, : row + 1]
        if count <= budget:
            out[row] = torch.einsum("hn,nhd->hd", visible.softmax(-1), v[: row + 1])
            continue
        theta = looked_up(learnt.theta[layer], learnt, count, budget)
        chosen = visible > theta[:, None]
        distance = (visible - theta[:, None]).abs()
        assert ((distance == 0) | (distance > 1e-6)).all(), "choose another seed"
        chosen[:, kept] = True
        if union:
            chosen = chosen.unflatten(0, (-1, text.group)).any(1).repeat_interleave(text.group, 0)
        most = visible.amax(-1)
        weights = (visible - most[:, None]).exp()
        dropped = {
            "exact": (weights * ~chosen).sum(-1),
            "bound": (~chosen).sum(-1) * (theta - most).exp(),
            "calibrated": looked_up(learnt.expected[layer], learnt, count, budget).exp(),
            "none": torch.zeros_like(most),
        }[compensation]
        dropped = dropped.masked_fill(chosen.all(-1), 0)  # nothing was left out
        weights = weights * chosen
        weights = weights / (weights.sum(-1) + scale * dropped)[:, None]
        out[row] = torch.einsum("hn,nhd->hd", weights, v[: row + 1])
        if mean:
            out[row] += (1 - weights.sum(-1))[:, None] * v[: row + 1].mean(0)
    return out


def close(got, want):
    torch.testing.assert_close(got.double(), want[-len(got) :], atol=1e-5, rtol=1e-5)


SHAPES = [(1, 2, 1), (16, 1, 7), (17, 2, 3), (63, 2, 1), (111, 1, 7), (250, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget", [16, 40])
def test_prompt_and_answer(shape, budget):
    tokens, kv_heads, group = shape
    text, learnt = Text(tokens, 1, kv_heads, group, seed=tokens), table(heads=kv_heads * group)
    want = read(text, learnt, budget)
    close(whole(top_theta(learnt, budget_tokens=budget), text).out[0], want)
    close(answer(top_theta(learnt, budget_tokens=budget), text).out[0], want)


COMPENSATIONS = [("exact", True), ("bound", True), ("calibrated", True), ("exact", False), ("bound", False),
                 ("calibrated", False), ("none", False)]  # fmt: skip


@pytest.mark.parametrize(("compensation", "mean"), COMPENSATIONS)
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_compensations(compensation, mean, gamma):
    text, learnt = Text(130, group=3, seed=1), table(heads=6)
    want = read(text, learnt, 16, compensation=compensation, scale=gamma, mean=mean)
    options = {"compensation": compensation, "compensation_scale": gamma, "value_mean": mean}
    scheme = top_theta(learnt, budget_tokens=16, **options)
    close(whole(scheme, text).out[0], want)
    close(answer(scheme, text).out[0], want)


@pytest.mark.parametrize("compensation", ["exact", "bound", "none"])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_union_reads_what_any_head_of_the_group_chose(compensation, group):
    text, learnt = Text(120, group=group, seed=2), table(heads=2 * group)
    mean = compensation != "none"
    want = read(text, learnt, 16, union=True, compensation=compensation, mean=mean)
    scheme = top_theta(learnt, budget_tokens=16, gqa="union", compensation=compensation, value_mean=mean)
    close(whole(scheme, text).out[0], want)
    close(answer(scheme, text).out[0], want)


VECTOR = {
    ("none", False): (0.731059, 0.268941),
    ("exact", False): (0.636409, 0.234122),
    ("bound", False): (0.490853, 0.180575),
    ("exact", True): (0.739984, 0.337697),
}


@pytest.mark.parametrize(("compensation", "mean"), VECTOR)
def test_the_test_vector(compensation, mean):
    """Scores 2, 1, 0, -1, -2 and a threshold of 0.5; values (1,0), (0,1), (1,1), (2,0), (0,2)."""
    text = Text(5, kv_heads=1, group=1)
    text.q[:], text.k[:], text.v[:] = 0, 0, 0
    text.q[..., 0] = 1
    text.k[0, :, 0, 0] = torch.tensor([2.0, 1, 0, -1, -2]) / text.scale
    text.v[0, :, 0, :2] = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 2]])
    learnt = table(heads=1, sizes=(1, 8), budgets=(1, 2), theta=0.5)
    scheme = top_theta(learnt, budget_tokens=2, compensation=compensation, value_mean=mean)
    for got in (whole(scheme, text), answer(scheme, text)):
        assert got.out[0, -1, 0, :2].tolist() == pytest.approx(VECTOR[compensation, mean], abs=2e-6)


def test_a_score_that_equals_the_threshold_is_left_out():
    text = Text(100, coarse=True)
    scores = logits(text.q[0], text.k[0]) * text.scale
    theta = 0.25
    assert (scores[:, -1] == theta).any()
    learnt = table(theta=theta)
    close(whole(top_theta(learnt, budget_tokens=16), text).out[0], read(text, learnt, 16))
    close(answer(top_theta(learnt, budget_tokens=16), text).out[0], read(text, learnt, 16))


@pytest.mark.parametrize("budget", [8, 30, 64])
def test_lengths_that_were_not_calibrated_take_the_same_share(budget):
    text, learnt = Text(400, group=2, seed=11), table()
    want = read(text, learnt, budget)
    close(whole(top_theta(learnt, budget_tokens=budget), text).out[0], want)
    close(answer(top_theta(learnt, budget_tokens=budget), text).out[0], want)


@pytest.mark.parametrize(("theta", "budget"), [(-1e9, 4), (5.0, 64), (5.0, 300)])
def test_low_thresholds_and_wide_budgets_are_dense(theta, budget):
    text, learnt = Text(64, seed=3), table(theta=theta)
    want = attention(text.q[0], text.k[0], text.v[0], causal(64).expand(4, -1, -1), text.scale)
    close(whole(top_theta(learnt, budget_tokens=budget), text).out[0], want)
    close(answer(top_theta(learnt, budget_tokens=budget), text).out[0], want)


@pytest.mark.parametrize("compensation", ["exact", "bound", "calibrated"])
def test_equal_values_come_out_as_they_are(compensation):
    text = Text(150, seed=4)
    text.v[:] = text.v[:, :1]
    scheme = top_theta(table(), budget_tokens=8, compensation=compensation)
    close(whole(scheme, text).out[0], text.v[0].double().repeat_interleave(2, 1))


def test_no_survivor_leaves_the_mean_value():
    text, learnt = Text(90, seed=5), table(theta=100.0)
    scheme = top_theta(learnt, budget_tokens=4)
    mean = text.v[0].double().mean(0, keepdim=True).repeat_interleave(2, 1)
    close(answer(scheme, text).out[0], mean)
    close(whole(scheme, text).out[0], read(text, learnt, 4))


def test_sinks_and_window_are_kept_and_no_candidates():
    text, learnt = Text(150, seed=6), table()
    scheme = top_theta(learnt, budget_tokens=16, sink_tokens=3, window_tokens=9)
    want = read(text, learnt, 16, sinks=3, window=9)
    close(whole(scheme, text).out[0], want)
    close(answer(scheme, text).out[0], want)


def test_the_first_two_layers_have_a_budget_of_their_own():
    text, learnt = Text(120, 4, seed=7), table(4)
    scheme = top_theta(learnt, budget_tokens=8, first_layers_budget_tokens=50)
    for got in (whole(scheme, text), answer(scheme, text)):
        for layer in range(4):
            close(got.out[layer], read(text, learnt, 50 if layer < 2 else 8, layer))


def test_a_batch_in_chunks():
    texts, learnt = [Text(tokens, seed=tokens) for tokens in (20, 1, 90)], table()
    pages = Pages(top_theta(learnt, budget_tokens=8), texts)
    for spans in ([(0, 7), (0, 1), (0, 50)], [(7, 19), (1, 1), (50, 89)]):
        for text, (start, stop), got in zip(texts, spans, pages.read(spans), strict=True):
            close(got.out[0], read(text, learnt, 8)[start:stop])
    got = pages.read([(19, 20), (0, 1), (89, 90)], Phase.DECODE)
    for text, one in zip(texts, got, strict=True):
        close(one.out[0], read(text, learnt, 8))


def test_a_dense_prompt_if_asked_for():
    assert top_theta(table(), sparse_prefill=False).for_phase(Phase.PREFILL).name == "dense"


def test_the_calibration_sample_itself_keeps_k():
    """The (k+1)-th largest score of the one row that was seen: k are above it."""
    text = Text(128, kv_heads=2, group=3, seed=8)
    scheme_class = registry.load("top_theta")
    calibrator = scheme_class.calibrator(
        ModelShape(1, 6, 2, 16, (None,)), {"queries_per_length": 1, "sink_tokens": 0, "window_tokens": 0}
    )
    pages = Pages(None, [text])
    pages.read([(0, 127)])
    pages.observer = calibrator
    pages.read([(127, 128)])
    calibrator.end_sample()
    learnt = calibrator.tables()["all"]
    scores = (logits(text.q[0, 127:], text.k[0]) * text.scale)[:, 0]
    place = learnt.sizes.tolist().index(128)
    for column, budget in enumerate(learnt.budgets.tolist()):
        if budget < 128:
            theta = learnt.theta[0, :, place, column, None] + 1e-6  # itself a score, and rounded
            assert (scores > theta).sum(-1).tolist() == [budget] * 6
