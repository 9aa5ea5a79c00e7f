"""Our calls to flashinfer's sampling, checked without a GPU: by the installed signatures, and by what they mean."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch

from foveate.server import sampling_flashinfer
from foveate.server.exceptions import BadLogits
from foveate.server.logits import probabilities
from foveate.server.request import SamplingParams
from foveate.server.sampling import SamplerRow, sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # only what its import has to say
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed", exc_type=ImportError)

VOCAB = 50

MIXES = {
    "plain": ("sampling_from_probs", [{}, {"temperature": 0.5}]),
    "min-p": ("sampling_from_probs", [{"min_p": 0.2}, {}]),
    "top-p": ("top_p_sampling_from_probs", [{"top_p": 0.6}, {}, {"top_p": 0.9, "min_p": 0.1}]),
    "top-k": ("top_k_top_p_sampling_from_probs", [{"top_k": 5}, {}, {"top_k": -1}, {"top_k": VOCAB + 9}]),
    "all": ("top_k_top_p_sampling_from_probs", [{"top_k": 8, "top_p": 0.7, "min_p": 0.05}, {"top_p": 0.5}, {}]),
}


def logits_of(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def cut(probs, top_k, top_p):
    """What is left of ``probs [R, V]`` by flashinfer's documentation: the best k, renormalised, then the nucleus."""
    assert probs.dtype == torch.float32
    assert top_k.dtype == torch.int32
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
    left = torch.zeros_like(probs)
    for row, (k, p) in enumerate(zip(top_k.tolist(), top_p.tolist(), strict=True)):
        best = probs[row].argsort(descending=True)[:k]
        mass = (probs[row, best] / probs[row, best].sum()).cumsum(0)
        nucleus = best[: int((mass < p).sum()) + 1]
        left[row, nucleus] = probs[row, nucleus]
    return left / left.sum(-1, keepdim=True)


@pytest.fixture
def seen(monkeypatch):
    """Stand-ins for flashinfer; the name of the function that was called and the distribution it was to draw from."""
    calls = []

    def stand_in(name):
        def draw(probs, top_k=None, top_p=None, filter_apply_order="top_k_first"):
            if name == "top_p_sampling_from_probs":
                top_k, top_p = None, top_k
            assert filter_apply_order == "top_k_first"
            rows = len(probs)
            top_k = torch.full((rows,), VOCAB, dtype=torch.int32) if top_k is None else top_k
            calls.append((name, cut(probs, top_k, torch.ones(rows) if top_p is None else top_p)))
            return torch.multinomial(calls[-1][1], 1)[:, 0].int()

        return create_autospec(getattr(flashinfer.sampling, name), side_effect=draw)

    names = {name for name, _ in MIXES.values()}
    library = SimpleNamespace(sampling=SimpleNamespace(**{name: stand_in(name) for name in names}))
    monkeypatch.setattr(sampling_flashinfer, "library", lambda: library)
    return calls


@pytest.mark.parametrize(("function", "mix"), MIXES.values(), ids=MIXES)
def test_draws_from_the_distribution_of_our_own_path(seen, function, mix):
    params = [SamplingParams(**fields) for fields in mix]
    logits = logits_of(len(params))
    tokens = sampling_flashinfer.draw(logits, params)
    ((called, distribution),) = seen
    assert called == function
    torch.testing.assert_close(distribution, probabilities(logits, params))
    assert (tokens.dtype, tokens.shape) == (torch.int64, (len(params),))
    assert distribution.gather(1, tokens[:, None]).all()


def test_rows_with_a_seed_and_greedy_rows_stay_on_our_path(seen, monkeypatch):
    def rows():
        fields = [{"seed": 7}, {"top_k": 1}, {}, {"temperature": 0}, {"seed": 8, "top_p": 0.8}, {"top_p": 0.8}]
        return [SamplerRow(SamplingParams(**field), [], [], [0]) for field in fields]

    logits = logits_of(6)
    logits[2, 11], logits[5, 22] = 100.0, 100.0  # where the others must arrive
    plain = [sampled.token_id for sampled in sample(logits, rows())]
    assert seen == []
    monkeypatch.setattr(sampling_flashinfer, "available", lambda device: True)
    assert [sampled.token_id for sampled in sample(logits, rows())] == plain
    assert plain[2::3] == [11, 22]
    ((_, distribution),) = seen
    assert len(distribution) == 2


def test_a_bad_row_disturbs_no_other(seen, monkeypatch):
    monkeypatch.setattr(sampling_flashinfer, "available", lambda device: True)
    logits = logits_of(3)
    logits[0, 5], logits[2, 9] = torch.nan, 100.0
    bad, _, good = sample(logits, [SamplerRow(SamplingParams(top_p=0.9), [], [], [0]) for _ in range(3)])
    assert isinstance(bad.error, BadLogits)
    assert good.token_id == 9
    assert good.error is None
