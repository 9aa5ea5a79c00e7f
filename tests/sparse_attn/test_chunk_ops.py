"""What chunks are made from: sums of keys, scores of gaps, boundaries; each against its plain definition."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.stats import KEY_SUM, KEY_SUM_16
from foveate.kv_cache.view import PagedView
from foveate.sparse_attn import chunks, registry
from foveate.sparse_attn.errors import ProfileError, SchemeConfigError
from foveate.sparse_attn.ops import boundaries, boundary_predictor, key_change_torch, sums, sums_torch
from foveate.sparse_attn.ops.attention_ratio import attention_ratio, mass_ratio
from foveate.sparse_attn.ops.boundary_predictor import BoundaryPredictor
from foveate.sparse_attn.ops.key_change import key_change
from foveate.sparse_attn.profile import Profile
from foveate.sparse_attn.protocol import AttentionSpec

from .views import DIM, HEADS, KV_HEADS, make_query, make_view


def greedy(scores, limit, threshold, distance):
    """Suppression one gap at a time, as the authors write it."""
    order = sorted((gap for gap in range(len(scores)) if scores[gap] > threshold), key=lambda gap: (-scores[gap], gap))
    chosen: list[int] = []
    for gap in order:
        if len(chosen) < limit and all(abs(gap - other) > distance for other in chosen):
            chosen.append(gap)
    return sorted(chosen)


def split(bounds, longest):
    """Chunks above ``longest`` in equal parts."""
    found = set(bounds)
    for begin, end in itertools.pairwise(bounds):
        parts = -(-(end - begin) // longest)
        found |= {begin + -(-(end - begin) * part // parts) for part in range(parts)}
    return sorted(found)


@given(
    st.lists(st.one_of(st.integers(-3, 3), st.just(-math.inf)), min_size=1, max_size=60),
    st.integers(0, 20), st.integers(0, 9), st.sampled_from([-math.inf, 0.5]),
)  # fmt: skip
@settings(max_examples=200)
def test_suppression_in_rounds_is_greedy(scores, limit, distance, threshold):
    rows = torch.tensor([scores, scores[::-1]], dtype=torch.float32)
    picked = boundaries.pick_boundaries(rows, torch.tensor([limit, limit]), threshold, distance)
    for row, given_scores in zip(picked, (scores, scores[::-1]), strict=True):
        assert row.nonzero()[:, 0].tolist() == greedy(given_scores, limit, threshold, distance)


def test_boundaries_as_the_authors_choose_them():
    scores = torch.randn(256, generator=torch.Generator().manual_seed(1)) + 1
    for tokens in (None, 64):
        chosen = [] if tokens is None else [256 - 64]
        for gap in scores.argsort(descending=True).tolist():
            late = tokens is not None and gap > 256 - tokens
            if len(chosen) >= 16 or scores[gap] <= 1.1 or late or any(abs(gap - other) <= 8 for other in chosen):
                continue
            chosen.append(gap)
        want = sorted({0, 256, *(gap + 1 for gap in chosen)})
        assert boundaries.global_boundaries(scores, 128, instruction_tokens=tokens) == want
    assert boundaries.global_boundaries(torch.zeros(256), 128) == [0, 256]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(4, 20))
@settings(max_examples=100)
def test_long_chunks_are_cut_into_equal_parts(lengths, longest):
    bounds = [0, *itertools.accumulate(lengths)]
    begins = torch.zeros(1, bounds[-1] + 5, dtype=torch.bool)
    begins[0, bounds[:-1]] = True
    end = torch.tensor([bounds[-1]])
    start, length = boundaries.chunk_table(boundaries.limit_lengths(begins, end, longest), end, bounds[-1])
    want = split(bounds, longest)
    assert start[0, : len(want) - 1].tolist() == want[:-1]
    assert length[0, : len(want) - 1].tolist() == [b - a for a, b in itertools.pairwise(want)]
    assert not length[0, len(want) - 1 :].any()


def test_no_chunk_is_too_short_or_too_long():
    scores = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2))
    cut = chunks.Cut(block=16, per_block=8, threshold=0.5, distance=3, window=4, shortest=5, longest=10, fallback=8)
    found = chunks.from_scores(scores, torch.tensor([256, 200, 64]), cut, whole=True)
    lengths = found.length[found.length > 0]
    assert lengths.min() >= 5
    assert lengths.max() <= 10
    assert found.length.sum(1).tolist() == [256, 192, 64]
    assert bool((found.start[0][found.length[0] > 0] < found.live_from[0][found.length[0] > 0]).all())


@pytest.mark.parametrize(("window", "segment", "segments"), [(4, 32, 4), (1, 16, 7), (3, 111, 1), (4, 200, 1)], ids=str)
@pytest.mark.parametrize("slab", [64 << 20, 1], ids=["one-slab", "many-slabs"])
def test_change_of_keys_equals_reference(window, segment, segments, slab, monkeypatch):
    monkeypatch.setattr(key_change_torch, "SLAB_BYTES", slab)
    view, _ = make_view([111, 5, 90], [1, 1, 1])
    want = key_change(view, window, segment, segments, backend="reference")
    torch.testing.assert_close(key_change(view, window, segment, segments), want)
    assert bool(torch.isfinite(want).any())


@pytest.mark.parametrize("scattered", [True, False], ids=["pages-scattered", "pages-side-by-side"])
@pytest.mark.parametrize("stats", [[KEY_SUM], [KEY_SUM, KEY_SUM_16]], ids=["pages", "runs"])
@pytest.mark.parametrize(("size", "page"), [(8, 16), (16, 16), (64, 16), (16, 64), (32, 64), (8, 64)], ids=str)
def test_sums_equal_reference(size, page, stats, scattered):
    view, _ = make_view([111, 5, 90, 64], [1] * 4, page, stats=stats, scattered=scattered)
    summed = KEY_SUM_16 in stats
    want = sums.unit_sums(view, size, backend="reference")
    got = sums.unit_sums(view, size, summed)
    for row, context in enumerate(view.rows.host_context_lens):
        whole = context // size
        torch.testing.assert_close(got[row, :whole], want[row, :whole])
    for cuts, ends in (
        ((100, 0, 90, 32), (110, 4, 90, 64)),
        ((17, 3, 16, 0), (111, 4, 70, 0)),
    ):
        want = sums.cut_sums(view, size, cuts, ends, backend="reference")
        torch.testing.assert_close(sums.cut_sums(view, size, cuts, ends, summed), want)
    # The cut is where the last page ends.
    full, _ = make_view([128, 64], [1, 1], page, stats=stats, scattered=scattered)
    want = sums.cut_sums(full, size, (128, 64), (128, 64), backend="reference")
    torch.testing.assert_close(sums.cut_sums(full, size, (128, 64), (128, 64), summed), want)


def test_sums_that_another_scheme_asked_for_later_are_not_read():
    """They do not cover pages written before; a scheme says that it has kept them from the start."""
    view, _ = make_view([111, 90], [1] * 2, 64)
    late = torch.full((*view.pages.keys.shape[:2], 4, view.head_dim), 7.0)
    view = PagedView(replace(view.pages, stats={KEY_SUM_16: late}), view.rows)
    want = sums.unit_sums(view, 16, backend="reference")[:, :5]
    torch.testing.assert_close(sums.unit_sums(view, 16)[:, :5], want)
    scheme = registry.build("dhsa_block", key_block_tokens=32)
    assert scheme.page_stats(CacheGeometry(1, 2, 64, 64, 9)) == ()


@pytest.mark.parametrize("slab", [64 << 20, 1000], ids=["one-slab", "many-slabs"])
def test_sums_of_overlapping_runs_equal_reference(slab, monkeypatch):
    monkeypatch.setattr(sums_torch, "SLAB_BYTES", slab)
    view, _ = make_view([111, 5], [1, 1])
    start, length = torch.tensor([[0, 100, 3, 7], [0, 4, 0, 2]]), torch.tensor([[111, 11, 0, 20], [5, 1, 2, 0]])
    want = sums.chunk_sums(view, start, length, backend="reference")
    torch.testing.assert_close(sums.chunk_sums(view, start, length), want)


def test_sums_refuse_what_does_not_fit():
    view, _ = make_view([111], [1])
    with pytest.raises(ValueError, match="do not fit pages of 16"):
        sums.unit_sums(view, 24)
    with pytest.raises(ValueError, match="key_sum"):
        sums.unit_sums(view, 32)
    with pytest.raises(ValueError, match="1 rows"):
        sums.chunk_sums(view, torch.zeros(2, 3), torch.zeros(2, 3))


def test_ratio_of_attention_mass_is_the_authors():
    """Sums of rectangles, one gap at a time; rows of all queries."""
    length, window = 40, 4
    logits = torch.randn(length, length, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    attention = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
    got = mass_ratio(attention, 0, window)
    for gap in range(length):
        past = attention[gap + window :, max(gap - window + 1, 0) : gap + 1].sum() + 1e-6
        future = attention[gap + window :, gap + 1 : gap + window + 1].sum() + 1e-6
        inside = window - 1 <= gap < length - window
        assert float(got[gap]) == pytest.approx(float(max(past, future) / min(past, future)) if inside else 0.0)


def test_ratio_of_the_last_queries():
    view, keys = make_view([90, 20], [70, 20])
    query = make_query(view)
    spec = AttentionSpec(0.7, softcap=3.0)
    got = attention_ratio(query, view, spec, 4, 64)
    for row, (context, part) in enumerate(((90, query[6:70]), (20, query[70:]))):
        held = keys[row].repeat_interleave(HEADS // KV_HEADS, 1)
        logits = torch.einsum("qhd,khd->hqk", part, held) * 0.7
        logits = 3.0 * torch.tanh(logits / 3.0)
        position = torch.arange(context - len(part), context)
        logits = logits.masked_fill(position[:, None] < torch.arange(context), -math.inf)
        want = mass_ratio(logits.softmax(-1).mean(0), context - len(part), 4)
        torch.testing.assert_close(got[row, :context], want.float(), rtol=1e-4, atol=1e-4)
        assert not got[row, context:].any()


class Predictor(torch.nn.Module):
    """The authors' ``BoundarySimilarityAttn``, plainly."""

    def __init__(self, channels, window, heads, pool):
        super().__init__()
        self.window = window
        self.enc = torch.nn.ModuleDict(
            {
                "mha": torch.nn.MultiheadAttention(channels, heads, batch_first=True),
                "norm": torch.nn.LayerNorm(channels),
            }
        )
        self.pool = torch.nn.ModuleDict({"gate": torch.nn.Linear(channels, 1, bias=False)}) if pool else None
        self.mlp = torch.nn.Sequential(torch.nn.Linear(4 * channels + 1, 24), torch.nn.ReLU(), torch.nn.Linear(24, 1))

    def forward(self, keys):
        padded = torch.nn.functional.pad(keys, (0, 0, self.window - 1, self.window))
        logits = []
        for gap in range(len(keys)):
            tokens = padded[None, gap : gap + 2 * self.window]
            encoded = self.enc["norm"](self.enc["mha"](tokens, tokens, tokens, need_weights=False)[0])[0]
            halves = encoded[: self.window], encoded[self.window :]
            if self.pool is None:
                left, right = (half.mean(0) for half in halves)
            else:
                left, right = ((self.pool["gate"](half).softmax(0) * half).sum(0) for half in halves)
            likeness = torch.cosine_similarity(left, right, dim=0, eps=1e-6)[None]
            logits.append(self.mlp(torch.cat([left, right, (left - right).abs(), left * right, likeness])))
        return torch.cat(logits)


def predictor_profile(pool=False, heads=4, window=4):
    torch.manual_seed(0)
    module = Predictor(KV_HEADS * DIM, window, heads, pool)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return module, Profile("dhsa", {}, {"heads": heads, "window": window}, "", tensors)


@pytest.mark.parametrize("pool", [False, True], ids=["mean", "gated"])
@pytest.mark.parametrize(("heads", "window"), [(4, 4), (8, 2)], ids=str)
def test_predictor_equals_a_plain_module(pool, heads, window, tmp_path, monkeypatch):
    module, profile = predictor_profile(pool, heads, window)
    profile.save(tmp_path / "profile.safetensors")
    loaded = Profile.load(tmp_path / "profile.safetensors")
    predictor = BoundaryPredictor(loaded.tensors, loaded.options)
    keys = torch.randn(50, KV_HEADS * DIM, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        want = module(keys)
    torch.testing.assert_close(predictor.logits(keys[None])[0], want, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(boundary_predictor, "SLAB_ELEMENTS", 20_000)
    torch.testing.assert_close(predictor.logits(keys[None])[0], want, atol=1e-4, rtol=1e-4)


def test_a_predictor_that_does_not_fit_is_refused():
    _, profile = predictor_profile()
    with pytest.raises(SchemeConfigError, match="--profile"):
        registry.build("dhsa", boundaries="predictor")
    tensors = {name: tensor for name, tensor in profile.tensors.items() if name != "mlp.2.bias"}
    with pytest.raises(ProfileError, match=r"mlp\.2\.bias missing"):
        BoundaryPredictor(tensors, profile.options)
    with pytest.raises(ProfileError, match="cannot have 5 heads"):
        BoundaryPredictor(profile.tensors, {"heads": 5})
    with pytest.raises(ProfileError, match="32 channels"):
        BoundaryPredictor(profile.tensors, profile.options).logits(torch.zeros(1, 9, 64))
