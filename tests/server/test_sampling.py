"""The sampler: supports, penalties, isolation of rows; and the one validator."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.server import containment
from foveate.server.containment import sample_contained
from foveate.server.exceptions import BadLogits, InvalidRequest
from foveate.server.logits import edit_logits
from foveate.server.request import SamplingParams
from foveate.server.sampling import SamplerRow, check_sampling, sample

VOCAB = 50


def row(prompt=(), output=(), eos=(0,), choice=0, **params):
    return SamplerRow(SamplingParams(**params), list(prompt), list(output), list(eos), choice)


def logits_of(rows=1, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits, times=3000, **params):
    """How often each token is drawn."""
    torch.manual_seed(1)
    rows = [row(**params) for _ in range(times)]
    counts = torch.zeros(VOCAB)
    for sampled in sample(logits.expand(times, -1), rows):
        counts[sampled.token_id] += 1
    return counts


def support(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Tokens that may be drawn and their probabilities, one rule after the other in plain Python."""
    probs = torch.softmax(logits[0].double() / temperature, -1).tolist()
    kept = sorted(range(VOCAB), key=lambda token: -probs[token])
    if top_k > 0:
        kept = kept[:top_k]
    kept = [token for token in kept if probs[token] >= min_p * probs[kept[0]]]
    total, mass, nucleus = sum(probs[token] for token in kept), 0.0, []
    for token in kept:
        if mass >= top_p * total:
            break
        nucleus.append(token)
        mass += probs[token]
    return {token: probs[token] / mass for token in nucleus}


@pytest.mark.parametrize(
    "params",
    [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}, {"temperature": 0.5}, {"top_k": 8, "top_p": 0.7, "min_p": 0.05}],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    logits = logits_of()
    counts, want = drawn(logits, **{"temperature": 1.0, **params}), support(logits, **params)
    assert set(counts.nonzero()[:, 0].tolist()) <= set(want)
    for token, probability in want.items():
        spread = math.sqrt(3000 * probability * (1 - probability))
        assert abs(counts[token] - 3000 * probability) <= 5 * spread + 1, f"token {token}"


def test_greedy_takes_the_lowest_of_the_best():
    logits = logits_of(3)
    logits[1, [7, 3]] = 99.0
    want = [int(logits[0].argmax()), 3, int(logits[2].argmax())]
    assert [s.token_id for s in sample(logits, [row(temperature=0)] * 3)] == want
    # With a feature in the batch the general path runs, and says the same.
    mixed = [row(temperature=0), row(temperature=0, logit_bias={5: -1.0}), row(temperature=0)]
    assert [s.token_id for s in sample(logits, mixed)] == want


def test_seeded_rows_do_not_depend_on_their_batch():
    logits = logits_of(4)
    alone = [sample(logits[i : i + 1], [row(seed=i)])[0].token_id for i in range(4)]
    order = [2, 0, 3, 1]
    rows = [row(seed=i) for i in order] + [row()]
    mixed = sample(torch.cat([logits[order], logits_of(1, 9)]), rows)
    assert [s.token_id for s in mixed[:4]] == [alone[i] for i in order]
    assert sample(logits[:1], [row(seed=3, choice=4)])[0] == sample(logits[:1], [row(seed=7)])[0]


def test_penalties_and_bias_equal_a_plain_loop():
    logits, prompt, output = logits_of(), [1, 2, 2, 3], [2, 4, 4, 4]
    changed = logits[0].tolist()
    for token in set(prompt + output):
        changed[token] = changed[token] / 1.5 if changed[token] > 0 else changed[token] * 1.5
    for token in set(output):
        changed[token] -= 0.7 + 0.4 * output.count(token)
    changed[9] += 3.0
    params = {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {9: 3.0}}
    counts = drawn(logits, prompt=prompt, output=output, **params)
    want = support(torch.tensor([changed]))
    for token, probability in want.items():
        spread = math.sqrt(3000 * probability * (1 - probability))
        assert abs(counts[token] - 3000 * probability) <= 5 * spread + 1, f"token {token}"


def test_min_tokens_hides_what_ends_a_text():
    logits = logits_of()
    logits[0, [0, 11]] = 50.0
    params = {"temperature": 0, "stop_token_ids": (11,), "min_tokens": 2}
    assert sample(logits, [row(output=[5], **params)])[0].token_id not in (0, 11)
    assert sample(logits, [row(output=[5, 6], **params)])[0].token_id == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("temperature", [0, 1])
def test_bad_logits_end_their_row_alone(bad, temperature):
    logits = logits_of(3)
    want = [s.token_id for s in sample(logits, [row(temperature=temperature, seed=i) for i in range(3)])]
    logits[1, 4 if bad != -float("inf") else slice(None)] = bad  # one that is hidden is nothing bad, all are
    got = sample(logits, [row(temperature=temperature, seed=i) for i in range(3)])
    assert isinstance(got[1].error, BadLogits)
    assert [got[0].token_id, got[2].token_id] == [want[0], want[2]]


def test_logprobs_are_the_models_own():
    logits = logits_of()
    logprobs = torch.log_softmax(logits[0], -1)
    got = sample(logits, [row(temperature=0, logprobs=3, logit_bias={7: 90.0})])[0].logprob
    assert got.token_id == 7
    assert got.logprob == pytest.approx(float(logprobs[7]), abs=1e-5)
    assert [token for token, _ in got.top] == logprobs.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_p", 0.0), ("top_p", 1.1),
        ("top_k", -2), ("min_p", 1.5), ("presence_penalty", 2.5), ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0), ("n", 0), ("n", 17), ("logprobs", 21), ("logprobs", -1), ("stop", ("",)),
        ("stop", ("x" * 257,)), ("stop", ("x",) * 17), ("logit_bias", {VOCAB: 1.0}), ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}), ("max_tokens", -1), ("min_tokens", -1), ("min_tokens", 17), ("seed", 2**64),
        ("stop_token_ids", (VOCAB,)),
    ],
    ids=str,
)  # fmt: skip
def test_every_bad_value_is_refused_by_name(param, value):
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(SamplingParams(**{param: value}), VOCAB)
    assert caught.value.param == param
    check_sampling(SamplingParams(), VOCAB)


@pytest.mark.parametrize("repetition", [1.0, 1.5])
@pytest.mark.parametrize("presence", [0.0, 0.7, -0.7])
@pytest.mark.parametrize("frequency", [0.0, 0.4])
def test_penalties_change_each_logit_as_a_plain_loop_does(repetition, presence, frequency):
    """Exactly, not by draws: 0.7 less for a token of the prompt alone hides in five deviations of 3,000 draws."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    prompt, output = [1, 2, 2, 3], [2, 4, 4, 4]
    params = {"repetition_penalty": repetition, "presence_penalty": presence, "frequency_penalty": frequency}
    want = logits.clone()
    for token in {*prompt, *output}:
        old = want[0, token]
        want[0, token] = old / repetition if old > 0 else old * repetition
    for token in {*output}:
        want[0, token] -= presence + frequency * output.count(token)
    got = edit_logits(logits, [row(prompt, output, **params), row(prompt, output)])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", 0), ("temperature", 2), ("top_p", 1e-9), ("top_p", 1), ("top_k", -1), ("min_p", 1),
        ("presence_penalty", -2), ("frequency_penalty", 2), ("repetition_penalty", 10), ("n", 16), ("logprobs", 20),
        ("stop", ("x" * 256,)), ("stop", ("x",) * 16), ("stop_token_ids", (VOCAB - 1,) * 16), ("logit_bias", {0: -100}),
        ("logit_bias", {VOCAB - 1: 100}), ("min_tokens", 16), ("seed", -(2**63)), ("seed", 2**63 - 1),
        ("max_tokens", 0),
    ],
    ids=str,
)  # fmt: skip
def test_every_bound_itself_is_allowed(param, value):
    check_sampling(SamplingParams(**{param: value}), VOCAB)


@pytest.mark.parametrize("param", ["temperature", "top_k", "n", "max_tokens", "logprobs", "seed"])
def test_true_is_no_number(param):
    with pytest.raises(InvalidRequest) as caught:
        check_sampling(SamplingParams(**{param: True}), VOCAB)
    assert caught.value.param == param


@pytest.mark.parametrize("counts", [(1, 3), (0, 20), (5, 0, 2)], ids=str)
def test_each_row_reports_as_many_alternatives_as_it_asked_for(counts):
    logits = torch.randn(len(counts), VOCAB, generator=torch.Generator().manual_seed(0))
    got = sample(logits, [row(temperature=0, logprobs=count) for count in counts])
    assert [len(sampled.logprob.top) for sampled in got] == list(counts)


def test_a_batch_that_fails_after_its_draws_is_drawn_again_from_the_same_place(monkeypatch):
    """The second try draws what the first would have: a seed gives the same answer beside a request that fails."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))

    def rows():
        made = [row(temperature=1.0, seed=seed) for seed in (5, 6, 7)]
        for one in made:
            one.generator(torch.device("cpu"))
        return made

    once, twice = rows(), rows()
    want = [sampled.token_id for _ in range(4) for sampled in sample(logits, once)]
    real, failures = containment.sample, [ValueError("late")]

    def failing(logits, rows):
        drawn = real(logits, rows)
        if failures:
            raise failures.pop()
        return drawn

    monkeypatch.setattr(containment, "sample", failing)
    assert [sampled.token_id for _ in range(4) for sampled in sample_contained(logits, twice)] == want
