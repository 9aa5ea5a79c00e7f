"""Properties that every scheme has, for each entry of the registry; and StreamingLLM by its own definition."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stored import dequantize, quantize
from foveate.kv_cache.view import Rows
from foveate.sparse_attn import ops, registry
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.errors import CalibrationMissing, SchemeConfigError, UnknownScheme
from foveate.sparse_attn.ops import anchor, native
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, Role, StepGroup, StepState
from foveate.sparse_attn.selection import Band

from .cases import PROFILES, SINKS_CHANGE_THE_CHOICE, roomy_options, tight

HEADS, KV_HEADS, DIM, PAGE, LAYERS = 4, 2, 16, 16, 2
INV_FREQ = 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
SPEC = AttentionSpec(DIM**-0.5)


def rotate(rows, positions):
    """Half-split rotation of ``[T, H, D]`` in float32."""
    angle = positions[:, None].float() * INV_FREQ
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    left, right = rows.chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Rotator:
    def cap(self, query, positions, cap, layer):
        return rotate(query, positions.clamp(max=cap) - positions)


class World:
    """Raw q, k, v of some sequences, and their attention through pages.

    Args:
        stored: Element type of the pages.
        rounded: Write the floats that int8 pages would stand for.
    """

    def __init__(self, lengths, scheme=None, seed=0, order_seed=0, stored=torch.float32, rounded=False):
        self.rounded = rounded
        generator = torch.Generator().manual_seed(seed)
        self.scheme, self.lengths = scheme, lengths
        self.q, self.k, self.v = (
            [torch.randn(length, heads, DIM, generator=generator) for length in lengths]
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        needed = [-(-length // PAGE) for length in lengths]
        geometry = CacheGeometry(LAYERS, KV_HEADS, DIM, PAGE, sum(needed) + 2, stored)
        self.pool = PagePool(geometry, scheme.page_stats(geometry) if scheme else ())
        order = torch.randperm(geometry.num_pages, generator=torch.Generator().manual_seed(order_seed)).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]

    def run(self, spans, phase=Phase.PREFILL, layer=0, spec=SPEC, observer=None):
        """Output ``[T, H, D]`` per sequence for positions ``start`` to ``stop - 1`` of each, and the step."""
        slots = [self.tables[s][i // PAGE] * PAGE + i % PAGE for s, (a, b) in enumerate(spans) for i in range(a, b)]
        positions = torch.tensor([i for a, b in spans for i in range(a, b)])
        rows = Rows.build(self.tables, [b for _, b in spans], [b - a for a, b in spans], torch.device("cpu"))
        step = StepState(
            pool=self.pool, slots=torch.tensor(slots), positions=positions,
            groups=[StepGroup(self.scheme and self.scheme.for_phase(phase), phase, 0, rows, tuple(range(len(spans))))],
            rotary=Rotator(), keys_read=torch.zeros(len(spans), 2, dtype=torch.float64), observer=observer,
        )  # fmt: skip
        q, k, v = (
            torch.cat([part[a:b] for part, (a, b) in zip(x, spans, strict=True)]) for x in (self.q, self.k, self.v)
        )
        rotated = rotate(k, positions)
        if self.rounded:
            rotated, v = (dequantize(*quantize(rows)) for rows in (rotated, v))
        for index in range(layer + 1):  # earlier layers too: a layer may reuse what one of them chose
            ops.write_kv(rotated, v, self.pool.layer(index), step.slots)
            out = attend(rotate(q, positions), LayerCall(index, spec), step)
        return out.split([b - a for a, b in spans]), step

    def whole(self, **kwargs):
        return self.run([(0, length) for length in self.lengths], **kwargs)[0]


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.fixture(params=registry.names())
def scheme(request):
    """A scheme with small budgets, so that something is left out at the lengths below."""
    return registry.build(request.param, PROFILES, **tight(request.param))


@pytest.fixture(params=registry.names())
def roomy(request):
    """A scheme whose budget exceeds every length here."""
    return registry.build(request.param, PROFILES, **roomy_options(request.param))


def test_budget_beyond_the_length_is_dense(roomy):
    close(World([150], roomy).whole()[0], World([150]).whole()[0])


@pytest.mark.parametrize("layer", range(LAYERS))
def test_decode_equals_the_last_row_of_prefill(scheme, layer):
    if not scheme.same_in_decode:
        pytest.skip("decode reads other keys, by definition")
    world = World([90], scheme)
    last = world.whole(layer=layer)[0][-1:]
    again = World([90], scheme)
    again.run([(0, 89)], layer=layer)
    close(again.run([(89, 90)], phase=Phase.DECODE, layer=layer)[0][0], last)


@pytest.mark.parametrize("cuts", [(1, 2, 63), (16, 32, 130), (77,), (64, 128)], ids=str)
def test_chunks_change_nothing(scheme, cuts):
    tile = scheme.for_phase(Phase.PREFILL).tile
    if scheme.for_phase(Phase.PREFILL).pools_queries and any(cut % tile for cut in cuts):
        pytest.skip("a tile's queries choose together, so only cuts between tiles change nothing")
    want = World([150], scheme).whole()[0]
    world, edges = World([150], scheme), [0, *cuts, 150]
    close(torch.cat([world.run([span])[0][0] for span in itertools.pairwise(edges)]), want)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_int8_pages_are_read_as_the_floats_they_stand_for(scheme, layer, monkeypatch):
    """What is chosen, and what comes of it, in the prompt and in the answer."""
    eight, floats = World([90, 150], scheme, stored=torch.int8), World([90, 150], scheme, rounded=True)
    prompt, answer = [(0, 88), (0, 149)], [(88, 89), (149, 150)]
    kernels = native.library()
    words = kernels is not None and kernels.isa == "avx2"
    for phase, spans in ((Phase.PREFILL, prompt), (Phase.DECODE, answer)):
        with monkeypatch.context() as patch:
            if words and phase is Phase.PREFILL:
                # Its anchors weigh a prompt's keys roughly and choose others, worth as much: test_int8_pages.py.
                patch.setattr(anchor, "_default_backend", lambda *_: "torch")
            outs = [world.run(spans, phase, layer)[0] for world in (eight, floats)]
        for got, want in zip(*outs, strict=True):
            if words:  # multiplies words: queries have 16 bits, and in prompts weights too
                torch.testing.assert_close(got, want, atol=2e-4 if phase is Phase.PREFILL else 6e-5, rtol=1e-4)
            else:
                close(got, want)


def test_order_of_pages_changes_nothing(scheme):
    close(World([150], scheme, order_seed=1).whole()[0], World([150], scheme, order_seed=2).whole()[0])


def test_a_batch_equals_its_members_alone(scheme):
    world = World([70, 150, 3], scheme)
    for index, got in enumerate(world.whole()):
        alone = World([world.lengths[index]], scheme)
        alone.q, alone.k, alone.v = [world.q[index]], [world.k[index]], [world.v[index]]
        close(alone.whole()[0], got)


def test_later_keys_change_nothing_before(scheme):
    acting = scheme.for_phase(Phase.PREFILL)
    # Queries that choose together see each other's keys, by definition.
    first = 100 // acting.tile * acting.tile if acting.pools_queries else 100
    want = World([150], scheme).whole()[0][:first]
    world = World([150], scheme)
    world.k[0][first:] = 9.0
    world.v[0][first:] = -9.0
    close(world.whole()[0][:first], want)
    assert first > 0


def test_statistics_equal_recomputation(scheme):
    world = World([90], scheme)
    for span in [(0, 20), (20, 21), (21, 90)]:
        world.run([span])
    for index, page in enumerate(world.tables[0]):
        filled = min(PAGE, 90 - index * PAGE)
        for stat, want in ops.page_stats(world.pool.layer(0), page, filled).items():
            close(world.pool.layer(0).stats[stat][page], want)
    assert set(world.pool.layer(0).stats) == set(scheme.page_stats(world.pool.geometry))


def test_roles_cover_every_layer_and_anchors_come_first(scheme):
    roles = scheme.roles(5)
    assert len(roles) == 5
    for index, role in enumerate(roles):
        assert (role.role is Role.REUSE) == (role.anchor is not None)
        assert role.anchor is None or role.anchor < index


def test_layers_with_a_window_of_their_own_are_read_whole(scheme):
    spec = AttentionSpec(DIM**-0.5, band=Band(0, 40))
    close(World([150], scheme).whole(spec=spec, layer=1)[0], World([150]).whole(spec=spec, layer=1)[0])


def test_learned_sinks_count_once(scheme):
    if scheme.name in SINKS_CHANGE_THE_CHOICE:
        scheme = registry.build(scheme.name, PROFILES, **roomy_options(scheme.name))
    sinks = torch.tensor([0.3, -1.0, 2.0, 60.0])
    world = World([90], scheme)
    plain = world.whole()[0]
    got = World([90], scheme).whole(spec=AttentionSpec(DIM**-0.5, sinks=sinks))[0]
    # A sink scales a head's output by one number between 0 and 1; for a sink of 60 it all but vanishes.
    scale = (got * plain).sum(-1) / (plain * plain).sum(-1)
    close(got, plain * scale[..., None])
    assert bool(((scale >= 0) & (scale < 1)).all())
    assert scale[:, 3].max() < 1e-20


@pytest.mark.parametrize("name", registry.names())
def test_missing_calibration_names_its_command(name):
    scheme = registry.load(name)
    if not scheme.calibrated:
        assert registry.build(name).profile is None
        return
    with pytest.raises(CalibrationMissing, match=rf"foveate calibrate MODEL --scheme {name}\b"):
        registry.build(name)
    assert registry.build(name, PROFILES).profile is PROFILES[name]


def test_unknown_names_and_options_say_what_exists():
    with pytest.raises(UnknownScheme, match=", ".join(registry.names())):
        registry.build("nothing")
    for name in registry.names():
        with pytest.raises(SchemeConfigError, match="dense_tail_tokens"):
            registry.build(name, nonsense=1)
        with pytest.raises(SchemeConfigError, match="sink_tokens"):
            registry.build(name, sink_tokens=-1)
    assert [entry["name"] for entry in json.loads(json.dumps(registry.describe()))] == list(registry.names())


@pytest.mark.parametrize(
    "options",
    [{"budget_tokens": 4}, {"window_tokens": 5}, {"positions": "other"}, {"budget_tokens": True}, {"sink_tokens": 1.5}],
    ids=str,
)
def test_streaming_refuses_options_that_cannot_be(options):
    with pytest.raises(SchemeConfigError):
        registry.build("streaming", **options)


@pytest.mark.parametrize("length", [1, 23, 24, 25, 90])
@pytest.mark.parametrize("positions", ["cache", "text"])
def test_streaming_is_streaming_llm(length, positions):
    """One query at a time over a cache of raw keys, evicted and rotated by place in the cache (section 3.2)."""
    sinks, budget = 3, 24
    world = World([length], registry.build("streaming", budget_tokens=budget, sink_tokens=sinks, positions=positions))
    cache: list[int] = []
    want = torch.zeros(length, HEADS, DIM)
    for query in range(length):
        cache.append(query)
        if len(cache) > budget:
            del cache[sinks]
        kept = torch.tensor(cache)
        places = torch.arange(len(cache)) if positions == "cache" else kept
        keys = rotate(world.k[0][kept], places).repeat_interleave(HEADS // KV_HEADS, 1)
        values = world.v[0][kept].repeat_interleave(HEADS // KV_HEADS, 1)
        turned = rotate(world.q[0][query : query + 1], places[-1:])[0]
        weights = torch.softmax(torch.einsum("hd,khd->hk", turned, keys) * DIM**-0.5, -1)
        want[query] = torch.einsum("hk,khd->hd", weights, values)
    close(world.whole()[0], want)


def test_streaming_counts_its_reads():
    world = World([90], registry.build("streaming", **tight("streaming")))
    _, step = world.run([(0, 90)], layer=1)
    assert step.keys_read[0].tolist() == [2 * HEADS * sum(min(n, 24) for n in range(1, 91)), 2 * HEADS * 90 * 91 / 2]


BANDS = [Band(), Band(0, 5), Band(0, 9), Band(3, None), Band(3, 7), Band(6, 20)]


@pytest.mark.parametrize("other", BANDS, ids=str)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_within_is_the_intersection(band, other):
    def distances(one):
        return {far for far in range(40) if one.nearest <= far and (one.farthest is None or far < one.farthest)}

    assert distances(band.within(other)) == distances(band) & distances(other)
    assert band.visible(17) == len([far for far in distances(band) if far <= 17])
