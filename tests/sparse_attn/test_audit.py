"""The audit: the mass it measures is the dense softmax's, and what it measures is the same in every run."""

from __future__ import annotations

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops, registry
from foveate.sparse_attn.audit import LAYERS_PER_STEP, Audit, mass_kept
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, LayerRole, Phase, Role, StepGroup
from foveate.sparse_attn.schemes.dense import Dense
from foveate.sparse_attn.selection import Band, ScoreThreshold, Segment, Selection, Tiles

HEADS, KV_HEADS, DIM, PAGE = 6, 2, 16, 16
CPU = torch.device("cpu")


class Call:
    """One decode call over random keys: sequences of some lengths, and the dense softmax by hand."""

    def __init__(self, lengths=(75, 130), spec=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.spec = lengths, spec or AttentionSpec(0.3)
        needed = [-(-length // PAGE) for length in lengths]
        pool = PagePool(CacheGeometry(1, KV_HEADS, DIM, PAGE, sum(needed)))
        order = torch.randperm(sum(needed), generator=generator).tolist()
        tables = [[order.pop() for _ in range(count)] for count in needed]
        self.keys = [torch.randn(length, KV_HEADS, DIM, generator=generator) for length in lengths]
        for pages, keys in zip(tables, self.keys, strict=True):
            slots = torch.tensor([pages[i // PAGE] * PAGE + i % PAGE for i in range(len(keys))])
            ops.write_kv(keys, torch.randn(keys.shape, generator=generator), pool.layer(0), slots)
        self.view = PagedView(pool.layer(0), Rows.build(tables, list(lengths), [1] * len(lengths), CPU))
        self.query = torch.randn(len(lengths), HEADS, DIM, generator=generator)
        self.layer = LayerCall(0, self.spec)
        self.tiles = Tiles.of(self.view.rows, 1)

    def dense(self, sequence):
        """``[H, context]`` float64 probabilities over the keys of the layer's band."""
        keys = self.keys[sequence].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
        logits = torch.einsum("hd,khd->hk", self.query[sequence].double(), keys) * self.spec.scale
        if self.spec.softcap:
            logits = self.spec.softcap * torch.tanh(logits / self.spec.softcap)
        distance = torch.arange(self.lengths[sequence] - 1, -1, -1)
        if self.spec.band.farthest is not None:
            logits[:, distance >= self.spec.band.farthest] = -torch.inf
        return logits.softmax(-1)

    def selection(self, seed=1, size=4):
        units = -(-max(self.lengths) // size)
        mask = torch.rand(len(self.lengths), KV_HEADS, units, generator=torch.Generator().manual_seed(seed)) < 0.3
        mask[..., 0] = True
        last = (self.tiles.position + self.tiles.query_count - 1) // size
        return Selection.from_mask(mask & (torch.arange(units) <= last[:, None, None]), size, self.tiles)

    def measure(self, *segments):
        parts = [
            ops.decode(self.query, self.view, s.keys, AttentionSpec(0.3, self.spec.softcap, s.band)) for s in segments
        ]
        lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
        return mass_kept(self.query, self.view, self.layer, segments, lse)


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(0.3),
        AttentionSpec(0.3, softcap=1.5),
        AttentionSpec(0.3, sinks=torch.linspace(-3, 9, HEADS)),
    ],
    ids=["plain", "softcap", "learned-sinks"],
)
def test_mass_of_a_selection_is_the_dense_softmax_over_its_keys(spec):
    call = Call(spec=spec)
    selection = call.selection()
    got = call.measure(Segment(selection, spec.band))
    chosen = selection.to_mask(call.view.rows).repeat_interleave(HEADS // KV_HEADS, dim=1)
    for sequence, length in enumerate(call.lengths):
        want = (call.dense(sequence) * chosen[sequence, :, :length]).sum(-1)
        assert want.max() < 0.9, "nothing was left out: the test shows nothing"
        torch.testing.assert_close(got[sequence].double(), want, atol=1e-6, rtol=1e-5)


def test_mass_of_everything_is_one():
    call = Call()
    assert torch.equal(call.measure(Segment(None)), torch.ones(2, HEADS))


@pytest.mark.parametrize("cap", [None, 20], ids=["text", "cache"])
def test_moved_positions_are_measured_where_the_model_has_the_keys(cap):
    call = Call()
    sinks = Selection.from_mask(torch.ones(2, KV_HEADS, 1, dtype=torch.bool), 1, call.tiles)
    segments = (Segment(None, Band(0, 17)), Segment(sinks, Band(17, None), cap))
    lse = torch.full((2, HEADS), 5.0) if cap else None  # of moved queries: says nothing of the model's own
    got = call.measure(*segments) if lse is None else mass_kept(call.query, call.view, call.layer, segments, lse)
    for sequence, length in enumerate(call.lengths):
        dense = call.dense(sequence)
        want = dense[:, length - 17 :].sum(-1) + dense[:, 0]
        torch.testing.assert_close(got[sequence].double(), want, atol=1e-6, rtol=1e-5)


def test_mass_above_a_threshold():
    call = Call()
    plan = ScoreThreshold(torch.full((2, HEADS), 1.0), recent_tokens=4)
    _, lse, kept = ops.thresholded(call.query, call.view, plan, call.spec)
    got = mass_kept(call.query, call.view, call.layer, (Segment(plan),), lse)
    for sequence, length in enumerate(call.lengths):
        dense = call.dense(sequence)
        keys = call.keys[sequence].repeat_interleave(HEADS // KV_HEADS, dim=1)
        read = torch.einsum("hd,khd->hk", call.query[sequence], keys) * 0.3 > 1.0
        read[:, length - 4 :] = True
        assert torch.equal(read.sum(-1), kept[sequence].long())
        torch.testing.assert_close(got[sequence].double(), (dense * read).sum(-1), atol=1e-6, rtol=1e-5)


def test_thresholds_on_moved_queries_are_refused():
    call = Call()
    plan = ScoreThreshold(torch.zeros(2, HEADS))
    with pytest.raises(ValueError, match="moved queries"):
        mass_kept(call.query, call.view, call.layer, (Segment(plan, position_cap=5),), torch.zeros(2, HEADS))


class Halves(Dense):
    """Selects in even layers, reuses in every fifth, reads the others whole."""

    def roles(self, num_layers):
        made = [LayerRole(Role.DENSE)] * num_layers
        made[::2] = [LayerRole(Role.SELECT)] * len(made[::2])
        made[5::5] = [LayerRole(Role.REUSE, 0)] * len(made[5::5])
        return tuple(made)


def groups_of(*schemes, phase=Phase.DECODE):
    rows = Rows.build([[0]], [5], [1], CPU)
    return [StepGroup(scheme, phase, index, rows, (index,)) for index, scheme in enumerate(schemes)]


def test_layers_that_select_are_sampled_the_same_way_in_every_run():
    scheme = Halves(Halves.Options())
    windows = [None] * 12
    windows[4] = 64
    picks = []
    for _ in range(2):
        audit = Audit(1.0, windows)
        steps = [audit.begin(groups_of(scheme), 1, CPU) for _ in range(200)]
        picks.append([step._layers[id(scheme)] for step in steps])
    assert picks[0] == picks[1]
    assert {len(layers) for layers in picks[0]} == {LAYERS_PER_STEP}
    assert frozenset.union(*picks[0]) == {0, 2, 5, 6, 8, 10}


def test_rate_is_the_share_of_decode_steps():
    scheme = Halves(Halves.Options())
    audit = Audit(0.25, [None] * 4)
    audited = [audit.begin(groups_of(scheme), 1, CPU) is not None for _ in range(2000)]
    assert sum(audited) == pytest.approx(500, abs=60)
    assert Audit(0.0, [None] * 4).begin(groups_of(scheme), 1, CPU) is None
    assert Audit(1.0, [None] * 4).begin(groups_of(scheme, phase=Phase.PREFILL), 1, CPU) is None


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_share_is_refused(rate):
    with pytest.raises(ValueError, match="audit_rate"):
        Audit(rate, [None])


def test_a_scheme_that_reads_everything_has_mass_one():
    step = Audit(1.0, [None] * 4).begin(groups_of(registry.build("dense"), Halves(Halves.Options())), 3, CPU)
    assert step.kept.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
