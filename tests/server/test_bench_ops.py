"""``foveate bench ops``: every case runs, counts its work, and stands beside the machine's limit."""

from __future__ import annotations

import json

import pytest
import torch

from foveate.server import cli
from foveate.server.bench import cases
from foveate.server.bench import ops as bench_ops
from foveate.server.bench.arguments import OPS
from foveate.server.bench.cases import Setting, Taken, causal_pairs, pages_of, stopwatch, take_turns
from foveate.server.bench.ops import CASES
from foveate.server.bench.ops_attention import choose
from foveate.server.bench.shapes import SHAPES
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import native
from foveate.sparse_attn.ops.cpu import has_bfloat16_products
from foveate.sparse_attn.ops.native import library


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cases, "WALK_BYTES", 100_000)
    monkeypatch.setattr(cases, "GEMM", (32, 32, 32))


def setting(dtype=torch.float32, context=300, queries=70, stored=None):
    isas = (library().isa,) if library() else ()
    return Setting(SHAPES["tiny"], "tiny", dtype, stored or dtype, torch.device("cpu"), context, queries, 0.25, isas)


def run(*arguments):
    common = ["--shapes", "tiny", "--context", "256", "--queries", "64", "--repeats", "1"]
    return cli.main(["bench", "ops", *common, *arguments])


def test_every_op_is_reported_beside_its_limit(small, tmp_path, capsys):
    assert run("-o", str(tmp_path)) == 0
    report = json.loads((tmp_path / "ops.json").read_text())
    assert {row["op"] for row in report["rows"]} == set(OPS) == set(CASES)
    for row in report["rows"]:
        assert row["unit"] == ("GB/s" if row["limit"] == "sum of a large tensor" else "GFLOP/s")
        assert row["share"] == pytest.approx(row["rate"] / row["limit_rate"])
        assert row["milliseconds"] > 0
    kernels = {row["kernel"] for row in report["rows"] if row["op"] == "prefill"}
    assert "torch" in kernels
    assert (library() is None) or (f"native {library().isa}" in kernels)
    assert {path.name for path in tmp_path.glob("*.png")} == {f"ops-{op}.png" for op in OPS}
    dtype = "bfloat16" if has_bfloat16_products() else "float32"  # those of bfloat16 take minutes where it has none
    assert f"| decode | {dtype} | tiny | all keys |" in capsys.readouterr().out


# `write` has no result, and the kinds of `linear` differ on purpose.
@pytest.mark.parametrize("op", sorted(set(OPS) - {"write", "linear"}))
@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=["float32", "int8"])
def test_kernels_of_a_case_compute_the_same(small, op, stored):
    """They are given the same input, or their times could not be compared."""
    with torch.inference_mode():
        for case in CASES[op](setting(stored=stored)):
            results = [_first(call()) for call in case.calls.values()]
            for result in results[1:]:
                if result.dtype.is_floating_point:
                    torch.testing.assert_close(result, results[0], atol=1e-4, rtol=1e-3)
                else:
                    assert result.shape == results[0].shape
                    same = result == results[0]
                    if stored == torch.int8:  # ranked roughly on AVX2: one other key moves those behind it
                        same = (result[..., None] == results[0][..., None, :]).any(-1)
                    assert same.float().mean() > 0.95, "but for near ties"


def _first(result):
    while isinstance(result, (list, tuple)):
        result = result[0]
    return result.indices if hasattr(result, "indices") and not isinstance(result, torch.Tensor) else result


def test_work_is_counted_by_visible_pairs(small):
    case = next(iter(CASES["prefill"](setting(context=100, queries=10))))
    pairs = sum(range(91, 101))
    assert causal_pairs(setting(context=100, queries=10)) == pairs
    shape = SHAPES["tiny"]
    assert case.work == 4 * shape.head_dim * shape.heads * pairs
    [case] = CASES["scores"](setting(context=100, queries=10))
    assert case.work == 2 * shape.head_dim * shape.heads * pairs


def test_decode_counts_the_bytes_of_all_layers_it_walks_through(small):
    whole, *chosen = CASES["decode"](setting(context=128))
    shape = SHAPES["tiny"]
    layer = 128 * shape.kv_heads * shape.head_dim * 2 * 4
    assert whole.steps == 100_000 // layer
    assert whole.work == layer * whole.steps
    assert all(0 < case.work < whole.work for case in chosen)
    [whole, *_] = CASES["decode"](setting(context=128, stored=torch.int8))
    assert whole.work == 128 * shape.kv_heads * (shape.head_dim + 4) * 2 * whole.steps, "a scale per row"


def test_the_threshold_keeps_about_the_share_that_was_asked_for(small, monkeypatch):
    seen = []
    real = ops.thresholded
    monkeypatch.setattr(ops, "thresholded", lambda *args, **more: seen.append(real(*args, **more)) or seen[-1])
    torch.manual_seed(0)
    [case] = CASES["threshold"](setting(context=2000))
    case.calls["torch"]()
    kept = torch.stack([kept for _, _, kept in seen]).float().mean() / 2000
    assert kept == pytest.approx(0.25, abs=0.03)


def test_chosen_units_stand_before_their_tile_and_are_the_share(small):
    [view] = pages_of(setting(context=4096, queries=256), 256)
    selection = choose(view, 64, 0.25, 128)
    selection.validate(view.rows)
    first = selection.tiles.position // 64
    assert bool((selection.counts >= 1).all())
    assert bool((selection.indices.amax(-1) < first[:, None]).all())
    assert selection.counts.float().mean().item() == pytest.approx(0.25 * first.float().mean().item(), rel=0.35)


def test_candidates_take_turns_and_the_first_round_does_not_count():
    order = []

    def watch(call):
        order.append(call())
        return Taken(100 if len(order) <= 2 else ord(order[-1]), len(order))

    found = take_turns({"a": lambda: "a", "b": lambda: "b"}, 3, watch)
    assert order == ["a", "b"] * 4
    assert found == {"a": Taken(ord("a"), 5), "b": Taken(ord("b"), 6)}


def test_a_cpu_is_measured_until_the_call_returns():
    taken = stopwatch(torch.device("cpu"), cpu_time=True)(lambda: sum(range(100_000)))
    assert taken.seconds == taken.host_seconds > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--isas", "nosuch"], "this machine has"),
        (["--queries", "512"], "does not fit a context of 256"),
        (["--cpu-time", "--threads", "2"], "measures one thread"),
        (["--device", "nosuch"], "nosuch"),
        (["--device", "meta"], "choose auto, cpu, cuda"),
    ],
)
def test_what_cannot_be_measured_is_told(small, capsys, arguments, said):
    assert run(*arguments) == 1
    assert said in capsys.readouterr().err


def test_int8_pages_are_no_matter_of_a_gpu(small, monkeypatch, capsys):
    monkeypatch.setattr(bench_ops, "device_of", torch.device)
    assert run("--device", "cuda", "--kv-dtype", "int8") == 1
    assert "for a CPU" in capsys.readouterr().err


def test_without_native_kernels_torch_is_measured(small, monkeypatch, capsys):
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(cases, "opened", lambda: None)
    assert run("--ops", "write,bounds,decode") == 0
    assert "| native" not in capsys.readouterr().out
