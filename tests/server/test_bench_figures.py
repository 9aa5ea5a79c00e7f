"""The arithmetic of ``foveate bench``: percentiles, growth, arrivals, goodput, and the summary of timed prompts."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.server.bench.arrivals import Answer, poisson, summarize
from foveate.server.bench.figures import growth, percentile, shares, spread
from foveate.server.bench.latency_report import summary, told

FLOATS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 0.99, 3.0), ([1, 2, 3, 4], 0.5, 2.5), ([4, 1, 3, 2], 1, 4), ([1, 2], 0, 1), (range(101), 0.9, 90)],
    ids=["one", "between-two", "largest", "smallest", "exact"],
)
def test_percentile(values, share, expected):
    assert percentile(list(values), share) == pytest.approx(expected)


@given(FLOATS)
def test_percentiles_lie_within_the_values_and_in_order(values):
    found = spread(values)
    assert min(values) <= found["p50"] <= found["p90"] <= found["p99"] <= found["max"] == max(values)
    assert found["p50"] == pytest.approx(statistics.median(values))


def test_nothing_has_no_percentiles():
    assert spread([]) is None
    with pytest.raises(ValueError, match="0 values"):
        percentile([], 0.5)
    with pytest.raises(ValueError, match="percentile 2"):
        percentile([1.0], 2)


def test_shares_add_up_and_name_the_rest():
    found = shares({"attention": 1.0, "linear": 2.0}, 4.0)
    assert found == {"attention": 0.25, "linear": 0.5, "rest": 0.25}


@pytest.mark.parametrize(("factor", "power"), [(2, 1), (4, 2), (math.sqrt(2), 0.5)])
def test_growth_is_the_power_of_the_length(factor, power):
    assert growth(1000, 3.0, 2000, 3.0 * factor) == pytest.approx(power)


# Arrivals


def test_the_same_seed_gives_the_same_moments_and_twice_the_rate_half_of_them():
    assert poisson(2.0, 20, "a") == poisson(2.0, 20, "a")
    assert poisson(2.0, 20, "a") != poisson(2.0, 20, "b")
    assert poisson(4.0, 20, "a") == pytest.approx([moment / 2 for moment in poisson(2.0, 20, "a")])


def test_gaps_are_exponential():
    moments = poisson(5.0, 20_000, 0)
    gaps = [later - earlier for earlier, later in zip([0.0, *moments], moments, strict=False)]
    assert min(gaps) > 0
    # Standard errors: 0.7 % of the mean, and about 1 % of the deviation.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_must_be_above_0(rate):
    with pytest.raises(ValueError, match="rate above 0"):
        poisson(rate, 3, 0)


# Goodput against a trace made by hand


TRACE = [
    # due, sent, pieces, end, tokens
    Answer(0.0, 0.0, (0.5, 0.6, 0.7, 0.8), 0.8, 4),  # TTFT 0.5, TPOT 0.1: good
    Answer(1.0, 1.2, (2.1, 2.2), 2.3, 2),  # TTFT 1.1 from when it was due: late
    Answer(2.0, 2.0, (2.4, 3.4, 4.4), 4.4, 3),  # TPOT 1.0: slow
    Answer(3.0, 3.0, (3.9,), 4.0, 1),  # one token: TTFT 0.9 alone counts: good
    Answer(4.0, 4.0, (4.1, 4.2), 5.0, 2, "cut off"),  # fast as far as it went, but not whole
    Answer(5.0, 5.0, (), 5.0, 0, "429"),
]


def test_goodput_counts_whole_answers_that_kept_both_promises():
    found = summarize(TRACE, slo_ttft=1.0, slo_tpot=0.5)
    assert (found["requests"], found["completed"], found["seconds"]) == (6, 4, 5.0)
    assert found["errors"] == {"cut off": 1, "429": 1}
    assert found["goodput"] == pytest.approx(2 / 5.0)
    assert found["good_share"] == pytest.approx(2 / 6)
    assert found["tokens_per_second"] == pytest.approx((4 + 2 + 3 + 1) / 5.0)
    assert found["late_seconds"] == pytest.approx(0.2)
    assert found["ttft_seconds"]["max"] == pytest.approx(1.1)
    assert found["ttft_seconds"]["p50"] == pytest.approx((0.5 + 0.9) / 2)
    assert found["tpot_seconds"]["p50"] == pytest.approx(0.1), "of 0.1, 0.1 and 1.0"
    assert found["itl_seconds"]["p50"] == pytest.approx(0.1), "of 3, 1 and 2 gaps"


def test_pieces_that_hold_several_tokens_do_not_flatter_time_per_token():
    assert Answer(0.0, 0.0, (1.0, 1.5), 4.1, 4, last=4.0).tpot == 1.0, "tokens without text take their time"
    answer = Answer(0.0, 0.0, (1.0, 1.5), 1.5, 6)
    assert answer.tpot == pytest.approx(0.1)
    assert answer.gaps == [0.5]


def test_nothing_answered_is_no_goodput():
    found = summarize([TRACE[-1]], 1.0, 1.0)
    assert (found["goodput"], found["ttft_seconds"], found["completed"]) == (0, None, 0)
    with pytest.raises(ValueError, match="no answers"):
        summarize([], 1.0, 1.0)


# Timed prompts


def line(length, first, kind="run", repeat=0, label="dense", gaps=(0.1, 0.3), **more):
    attention = {"scheme": label}
    common = {"kind": kind, "length": length, "repeat": repeat, "digest": label, "label": label, "attention": attention}
    if kind == "skipped":
        return {**common, "what": "run", "limit_seconds": 5.0, "reason": "too long", **more}
    return {
        **common,
        "first_seconds": first,
        "gaps_seconds": list(gaps),
        "gap_seconds": statistics.median(gaps) if gaps else None,
        "total_seconds": first + sum(gaps),
        "keys_read_fraction": 0.5,
        "pages": 1,
        "prefill_parts": {},
        "decode_parts": {},
        "load": [0.5, 1.5],
        **more,
    }


def test_cells_are_medians_with_growth_and_shares():
    parts = {"attention": 1.0, "selection": 0.5, "linear": 2.0}
    decode = {"attention": 0.1, "selection": 0, "linear": 0.2}
    found = summary(
        [
            line(1000, 1.0), line(1000, 3.0, repeat=1), line(1000, 2.0, repeat=2),
            line(2000, 8.0),
            line(2000, 4.0, "parts", prefill_parts=parts, decode_parts=decode),
            line(4000, 0, "skipped"),
        ]
    )  # fmt: skip
    short, long = found["cells"]
    assert (short["first_seconds"], short["first_seconds_range"], short["repeats"]) == (2.0, [1.0, 3.0], 3)
    assert short["load_average"] == [0.5, 1.5]
    assert short["gap_seconds"] == pytest.approx(0.2)
    assert "growth" not in short
    assert long["growth"] == pytest.approx(2.0)
    assert long["prefill_tokens_per_second"] == pytest.approx(250)
    assert long["prefill_shares"] == {"attention": 0.25, "selection": 0.125, "linear": 0.5, "rest": 0.125}
    assert long["decode_shares"]["rest"] == pytest.approx(0.25)
    [skipped] = found["skipped"]
    assert (skipped["length"], skipped["reason"]) == (4000, "too long")
    text = told({**found, "model": {"name": "m", "dtype": "float32", "quantization": "none"}, "unavailable": [],
                 "synthetic_profiles": []})  # fmt: skip
    assert "| dense | 2.00 (50) | 8.00 (50) | - |" in text
    assert "skipped: dense at 4,000 tokens: too long" in text


def test_a_repeat_that_was_cut_off_is_told_beside_what_was_measured():
    found = summary([line(1000, 1.0), line(1000, 0, "skipped", repeat=1)])
    [skipped] = found["skipped"]
    assert (len(found["cells"]), skipped["repeat"]) == (1, 1)
    body = {**found, "model": {"name": "m", "dtype": "float32", "quantization": "none"}}
    text = told({**body, "unavailable": [], "synthetic_profiles": []})
    assert "skipped: dense at 1,000 tokens, repeat 2: too long" in text
    found = summary([line(1000, 1.0), line(1000, 0, "skipped", repeat=1), line(1000, 3.0, repeat=1)])
    assert (found["cells"][0]["repeats"], found["skipped"]) == (2, [])


def test_two_profiles_of_one_scheme_are_two_rows():
    found = summary(
        [line(1000, 1.0, label="kascade", digest="0123456789"), line(1000, 2.0, label="kascade", digest="abcdef0123")]
    )
    assert {cell["label"]: cell["first_seconds"] for cell in found["cells"]} == {
        "kascade [012345]": 1.0,
        "kascade [abcdef]": 2.0,
    }


def test_an_answer_of_one_token_has_no_gap():
    [cell] = summary([line(1000, 1.0, gaps=())])["cells"]
    assert (cell["gap_seconds"], cell["gap_seconds_p90"]) == (None, None)
