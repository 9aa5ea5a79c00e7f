"""An engine answers alike whether a model's layers run in one loop and in one native call, or each by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foveate.patches import fused_model
from foveate.patches.decoder_layer import fused_layers
from foveate.patches.fused_model import FusedModel
from foveate.server.engine import Engine
from foveate.server.llm import LLM
from foveate.server.loader import load
from foveate.server.options import EngineOptions
from foveate.server.request import SamplingParams
from foveate.sparse_attn.ops.native import library

from ..sparse_attn.cases import kascade_profile

if library() is None:
    pytest.skip("the native CPU kernels were not built", allow_module_level=True)

_SMALL = {"budget_tokens": 8, "sink_tokens": 2, "window_tokens": 4}
_PURE = {"budget_tokens": 8, "sink_tokens": 0, "window_tokens": 0, "dense_first_layers": 0}
POLICIES = {
    "dense": {"scheme": "dense"},
    "kascade": {"scheme": "kascade", "uncalibrated": 1, **_SMALL},
    "kascade-pure": {"scheme": "kascade", "uncalibrated": 1, **_PURE},
    "kascade-heads-exchanged": {"scheme": "kascade", **_SMALL, "dense_first_layers": 0},
    "kascade-dense-anchor": {"scheme": "kascade", **_SMALL},
    "exact_topk": {"scheme": "exact_topk", **_SMALL, "dense_first_layers": 0},
    "exact_topk-pure": {"scheme": "exact_topk", **_PURE},
    "streaming": {"scheme": "streaming", "budget_tokens": 16},
    "quest": {"scheme": "quest", "budget_tokens": 16, "sink_tokens": 2, "window_tokens": 4, "dense_first_layers": 0},
}

CALIBRATED = {"kascade-heads-exchanged", "kascade-dense-anchor"}
IN_ONE_CALL = {name for name in POLICIES if name.startswith(("dense", "kascade", "exact_topk"))}


@pytest.fixture(params=["in-parts", "whole", "int8", "int4", "int4wo"])
def given(request, model_dir, tmp_path):
    """The tiny model and its quantization; all but the first take one call in a decode step."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for parameter in model.parameters() if request.param == "whole" else ():
        parameter.data = parameter.bfloat16().float()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path)
    kind = request.param if request.param.startswith("int") else "none"
    return str(tmp_path), kind, request.param != "in-parts"


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("name", POLICIES)
def test_answers_are_the_same(name, kv_dtype, given, monkeypatch):
    calls, answers, runs = [], [], []
    compute, run = FusedModel.compute, fused_model.run
    monkeypatch.setattr(fused_model, "run", lambda parts, *rest: (runs.append(len(parts)), run(parts, *rest))[1])
    monkeypatch.setattr(FusedModel, "compute", lambda *args: (calls.append(args[1].shape[1]), compute(*args))[1])
    path, kind, whole = given
    options = EngineOptions(
        path, dtype="float32", quantization=kind, max_batch_tokens=16, max_running=2, kv_dtype=kv_dtype
    )
    for fused in (True, False):
        loaded = load(options)
        if name in CALIBRATED:
            loaded = replace(loaded, profiles={"kascade": kascade_profile([0], [[0, 1], [1, 0]])})
        inner = loaded.model.model
        assert isinstance(inner.forward, FusedModel)
        if not fused:
            del inner.forward
            for layer in fused_layers(loaded.model):
                layer.whole = None
        calls.clear()
        with LLM.over(Engine(loaded, options)) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            done = llm.generate([[*range(1, 40)], [*range(5, 30)]], params, POLICIES[name])
        answers.append([(one.token_ids, one.usage.keys_read_fraction) for one in done])
        assert bool(calls) == fused
        assert not fused or {1, 2} <= set(calls), "decode steps of one and of two sequences"
        if fused and name in IN_ONE_CALL and whole:
            assert set(runs) == {2}, "both layers in one call, what one chooses included"
    assert answers[0] == answers[1]
