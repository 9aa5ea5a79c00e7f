"""Audited requests: what is reported is the mass of transformers' own attention on the keys that were read."""

from __future__ import annotations

import queue
import re
import uuid

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foveate.server.answers import usage_body
from foveate.server.app import create_app
from foveate.server.engine import Engine
from foveate.server.llm import LLM
from foveate.server.mass import BOUNDS, MassHistogram
from foveate.server.options import EngineOptions
from foveate.server.request import Failed, Finished, GenerationRequest, SamplingParams, Usage
from foveate.server.settings import Settings

from .conftest import LocalClient

NEW = 6
GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
PROMPT = [(7 * index * index + 3 * index) % 256 for index in range(90)]
SINKS = 4


def streaming(budget, positions="cache"):
    return {"scheme": "streaming", "budget_tokens": budget, "sink_tokens": SINKS, "positions": positions}


@pytest.fixture(scope="module")
def one_layer(model_dir, tmp_path_factory):
    """A model whose only layer's queries and keys depend on nothing that a scheme could change."""
    path = tmp_path_factory.mktemp("one-layer")
    model = AutoModelForCausalLM.from_pretrained(model_dir, num_hidden_layers=1, attn_implementation="eager")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(path)
    return str(path)


@pytest.fixture
def make_engine(one_layer):
    engines = []

    def make(**options):
        engines.append(Engine.load(EngineOptions(one_layer, **{"dtype": "float32", "page_size": 16, **options})))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown(0)


def submit(engine, attention, prompt=PROMPT):
    events = queue.SimpleQueue()
    scheme = engine.build_scheme(attention)
    engine.submit(GenerationRequest(uuid.uuid4().hex, list(prompt), GREEDY, scheme, events.put))
    return events


def usage_of(events):
    while not isinstance(event := events.get(timeout=60), Finished | Failed):
        pass
    assert isinstance(event, Finished), event
    return event.usage


def by_hand(one_layer, engine, budget):
    """Mean over generated tokens and heads of the probability on sinks and window, from transformers."""
    with LLM.over(engine) as llm:
        answer = llm.generate([PROMPT], GREEDY, streaming(budget))[0].token_ids
    model = AutoModelForCausalLM.from_pretrained(one_layer, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([[*PROMPT, *answer[:-1]]])
    with torch.inference_mode():
        [weights] = model(ids, output_attentions=True).attentions
    masses = []
    for position in range(len(PROMPT), ids.shape[1]):  # the first token is drawn from the prompt's last, not decoded
        row = weights[0, :, position, : position + 1]
        masses.append(row[:, :SINKS].sum(-1) + row[:, position + 1 - (budget - SINKS) :].sum(-1))
    return float(torch.stack(masses).double().mean())


@pytest.mark.parametrize("budget", [12, 40])
def test_usage_tells_the_mass_of_the_dense_distribution(make_engine, one_layer, budget):
    usage = usage_of(submit(make_engine(audit_rate=1.0), streaming(budget)))
    want = by_hand(one_layer, make_engine(), budget)
    assert want < 0.95
    assert usage.mass_kept == pytest.approx(want, abs=1e-6)
    assert usage.audited_tokens == NEW - 1


def test_dense_keeps_everything(make_engine):
    usage = usage_of(submit(make_engine(audit_rate=1.0), {"scheme": "dense"}))
    assert (usage.mass_kept, usage.audited_tokens) == (1.0, NEW - 1)


def test_nothing_is_said_without_an_audit(make_engine):
    engine = make_engine()
    usage = usage_of(submit(engine, streaming(12)))
    assert (usage.mass_kept, usage.audited_tokens) == (None, 0)
    assert engine.snapshot().mass_kept == {}


def test_a_share_of_the_steps_is_audited_and_the_same_one_again(make_engine):
    first, second = (usage_of(submit(make_engine(audit_rate=0.5), streaming(12))) for _ in range(2))
    assert 0 < first.audited_tokens < NEW - 1
    assert first == second


def test_each_request_of_a_mixed_batch_is_booked_its_own(make_engine):
    policies = [streaming(12), {"scheme": "dense"}, streaming(40), streaming(40, "text"), streaming(1000)]
    alone = [usage_of(submit(make_engine(audit_rate=1.0), policy)).mass_kept for policy in policies]
    engine = make_engine(audit_rate=1.0, prefix_reuse=False)
    together = [usage_of(events).mass_kept for events in [submit(engine, policy) for policy in policies]]
    assert together == pytest.approx(alone, abs=1e-6)
    assert engine.snapshot().steps < len(policies) * NEW, "they did not share steps"
    assert alone[0] < alone[2] < alone[1] == 1.0
    assert engine.snapshot().mass_kept["dense"] == MassHistogram((0,) * (len(BOUNDS) - 1) + (NEW - 1,), NEW - 1)
    assert sum(engine.snapshot().mass_kept["streaming"].counts) == 4 * (NEW - 1)


def test_audit_changes_no_token(make_engine):
    with LLM.over(make_engine()) as plain, LLM.over(make_engine(audit_rate=1.0)) as audited:
        for policy in (None, streaming(12)):
            want, got = (llm.generate([PROMPT], GREEDY, policy)[0] for llm in (plain, audited))
            assert got.token_ids == want.token_ids


def test_http_answers_and_metrics_tell_it(make_engine):
    app = create_app(make_engine(audit_rate=1.0), Settings(model="m", audit_rate=1.0))
    with LocalClient(app) as client:
        body = {"prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "attention": streaming(12)}
        kept = client.post("/v1/completions", json=body).json()["usage"]["attention"]["mass_kept"]
        assert 0 < kept < 1
        text = client.get("/metrics").text
    figures = dict(re.findall(r"^(foveate_attention_mass_kept\S*) (\S+)$", text, re.MULTILINE))
    assert float(figures['foveate_attention_mass_kept_count{scheme="streaming"}']) == NEW - 1
    total = float(figures['foveate_attention_mass_kept_sum{scheme="streaming"}'])
    assert total / (NEW - 1) == pytest.approx(kept, abs=1e-6)
    assert float(figures['foveate_attention_mass_kept_bucket{le="1.0",scheme="streaming"}']) == NEW - 1


def test_answers_of_several_prompts_are_weighed_by_their_audited_tokens():
    def usage(mass, tokens):
        return Usage(10, 5, 0, "streaming", 0.5, 1, mass, tokens)

    assert usage_body([usage(0.5, 3), usage(None, 0), usage(0.9, 1)])["attention"]["mass_kept"] == 0.6
    assert usage_body([usage(None, 0)])["attention"]["mass_kept"] is None


@pytest.mark.parametrize("mass", [0.0, 0.25, 0.2500001, 0.995, 1.0])
def test_histogram_counts_a_value_in_the_first_bucket_that_holds_it(mass):
    histogram = MassHistogram().plus(mass)
    [place] = [index for index, count in enumerate(histogram.counts) if count]
    assert mass <= BOUNDS[place]
    assert place == 0 or mass > BOUNDS[place - 1]
    assert histogram.total == mass


def test_a_prompt_beside_an_answer_of_the_same_policy_is_no_part_of_the_audit(make_engine):
    """Equal policies are one scheme: of its two groups in a step only the one that decodes is measured."""
    prompts = [PROMPT[:20], PROMPT * 3, PROMPT[::-1] * 2]
    options = {"audit_rate": 1.0, "max_batch_tokens": 24, "prefix_reuse": False}
    alone = [usage_of(submit(make_engine(**options), streaming(12), prompt)) for prompt in prompts]
    engine = make_engine(**options)
    together = [usage_of(events) for events in [submit(engine, streaming(12), prompt) for prompt in prompts]]
    assert engine.snapshot().steps < sum(len(prompt) // 24 + 6 for prompt in prompts), "they did not share steps"
    assert [usage.audited_tokens for usage in together] == [usage.audited_tokens for usage in alone]
    assert [usage.mass_kept for usage in together] == pytest.approx([usage.mass_kept for usage in alone], abs=1e-6)
