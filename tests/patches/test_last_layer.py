"""What the last layer leaves out: of tokens whose logits nobody wants it writes keys and values only."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch

from foveate.kv_cache.stats import KEY_SUM, KEY_SUM_16, VALUE_SUM, Fold, PageStat
from foveate.kv_cache.view import Rows
from foveate.patches import fused_model
from foveate.patches.attach import attach_engine
from foveate.patches.decoder_layer import FusedLayer
from foveate.patches.fused_model import FusedModel
from foveate.patches.interface import PackedStep
from foveate.patches.quantize import quantize
from foveate.patches.step import build_step
from foveate.patches.tune import tune
from foveate.sparse_attn.ops.native import library
from foveate.sparse_attn.protocol import Phase, StepGroup

if library() is None:
    pytest.skip("the native CPU kernels were not built", allow_module_level=True)

LENGTHS = (9, 5, 7)  # of three sequences, a group each
# Norms of heads, norms behind products, biases, layers that do not rotate; weights joined, narrow, of 8 and of 4 bits.
MODELS = [
    *(("llama", kind) for kind in ("plain", "rounded", "int8")),
    *(("qwen2", kind) for kind in ("plain", "int4")),
    *((family, "plain") for family in ("qwen3", "gemma2", "olmo2", "smollm3")),
]


@pytest.fixture
def run(tiny, tokens, manager_for):
    """Runs the three sequences in one step; gives the logits of each one's last token, the pages and the reads."""

    def make(family, kind="plain"):
        model = copy.deepcopy(tiny(family)).requires_grad_(False)
        for parameter in model.parameters() if kind == "rounded" else ():
            parameter.data = parameter.bfloat16().float()
        if kind.startswith("int"):
            quantize(model, kind)
        tune(model)
        attach_engine(model)
        ids = tokens(1, sum(LENGTHS))

        def step(wanted):
            manager = manager_for(model)
            chunks = [(manager.open([], b""), length) for length in LENGTHS]
            made = build_step(manager, chunks, None)
            groups, start = [], 0
            for table, length, asked in zip([table for table, _ in chunks], LENGTHS, wanted, strict=True):
                (group,) = build_step(manager, [(table, length)], None).groups
                groups.append(replace(group, start=start, owners=(len(groups),), wanted=asked))
                start += length
            made.groups = groups
            rows = torch.tensor([sum(LENGTHS[: i + 1]) - 1 for i in range(3)])
            with torch.inference_mode():
                out = model(
                    ids,
                    position_ids=made.positions[None],
                    use_cache=False,
                    logits_to_keep=rows,
                    foveate_step=PackedStep(made),
                )
            return out.logits[0], manager.pool, made.keys_read

        return model, step

    return make


@pytest.fixture
def rows_of_last(monkeypatch):
    """Rows that the last layer computed whole, a number per call."""
    seen: list[int] = []
    compute = FusedLayer.compute

    def count(layer, x, *rest):
        seen.append(len(x))
        return compute(layer, x, *rest)

    monkeypatch.setattr(FusedLayer, "compute", count)
    return seen


@pytest.mark.parametrize(("family", "kind"), MODELS, ids=map("-".join, MODELS))
def test_what_is_wanted_is_the_same(family, kind, run, rows_of_last):
    model, step = run(family, kind)
    assert isinstance(model.model.forward, FusedModel)
    layers = len(model.model.layers)
    expected, pages, reads = step((True, True, True))
    for wanted in product([False, True], repeat=3):
        rows_of_last.clear()
        got, written, done = step(wanted)
        whole = sum(length for length, asked in zip(LENGTHS, wanted, strict=True) if asked)
        assert rows_of_last == [sum(LENGTHS)] * (layers - 1) + [whole] * (whole > 0)
        for i, asked in enumerate(wanted):
            assert not asked or torch.allclose(got[i], expected[i], rtol=1e-5, atol=1e-5), wanted
            assert torch.equal(done[i], reads[i] if asked else reads[i] * (layers - 1) / layers), wanted
        # A product of other rows may add in another order, but for kernels of ours.
        near = {"rtol": 1e-5, "atol": 1e-5} if kind == "plain" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(written.keys, pages.keys, **near, equal_nan=True)
        torch.testing.assert_close(written.values, pages.values, **near, equal_nan=True)


def test_layers_that_do_not_run_in_one_loop_do_not_attend_either(run):
    model, step = run("llama")
    expected, pages, reads = step((True, True, True))
    del model.model.forward
    got, written, done = step((True, False, True))
    torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    assert done[1, 0] < reads[1, 0]
    assert torch.equal(done[[0, 2]], reads[[0, 2]])
    torch.testing.assert_close(written.keys, pages.keys, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_queries_of_what_is_not_wanted_are_not_projected(run, monkeypatch):
    asked = []
    last = fused_model.last

    def look(layer, *given):
        keys_values = layer.keys_values
        monkeypatch.setattr(layer, "keys_values", lambda x: (asked.append(len(x)), keys_values(x))[1])
        return last(layer, *given)

    monkeypatch.setattr(fused_model, "last", look)
    model, step = run("qwen2", "int4")
    products = model.model.layers[-1].forward.project._parts
    assert [one.call.out_channels for one in products[1:]] == [32, 32]
    step((False, False, True))
    assert asked == [LENGTHS[0] + LENGTHS[1]]


def test_a_page_that_both_write_keeps_its_statistics(tiny, tokens, manager_for):
    """One sequence whose end is wanted: its last tokens read what the others wrote, in the same page."""
    model = copy.deepcopy(tiny("qwen2")).requires_grad_(False)
    tune(model)
    attach_engine(model)
    ids, split = tokens(1, 30), 21
    seen = []
    for wanted in (True, False):
        manager = manager_for(model)
        manager.pool.declare((KEY_SUM, VALUE_SUM, PageStat("key", Fold.MAX), KEY_SUM_16))
        table = manager.open([], b"")
        step = build_step(manager, [(table, 30)], None)
        pages, cpu = [list(table.pages)], torch.device("cpu")
        first, last = Rows.build(pages, [split], [split], cpu), Rows.build(pages, [30], [30 - split], cpu)
        step.groups = [
            StepGroup(None, Phase.PREFILL, 0, first, (0,), wanted=wanted),
            StepGroup(None, Phase.PREFILL, split, last, (0,)),
        ]
        given = {"position_ids": step.positions[None], "use_cache": False, "foveate_step": PackedStep(step)}
        with torch.inference_mode():
            logits = model(ids, logits_to_keep=torch.tensor([29]), **given).logits
        kept = [
            tensor[torch.tensor(table.pages)]
            for layer in range(len(model.model.layers))
            for tensor in (manager.pool.layer(layer).keys, *manager.pool.layer(layer).stats.values())
        ]
        seen.append([logits, *kept])
    for got, want in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
