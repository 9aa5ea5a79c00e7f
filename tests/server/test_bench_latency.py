"""``foveate bench latency`` and ``throughput`` on tiny models: resuming, limits, profiles, reports."""

from __future__ import annotations

import errno
import json
import sys
from argparse import Namespace

import pytest

from foveate.server import cli
from foveate.server.bench import latency, throughput
from foveate.server.bench.setup import random_prompt, wanted
from foveate.server.bench.synthetic import LetterTokenizer, load_synthetic
from foveate.server.bench.timing import TooLong, time_request
from foveate.server.detokenizer import Detokenizer
from foveate.server.engine import Engine
from foveate.server.options import EngineOptions
from foveate.server.request import SamplingParams
from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import SchemeConfigError

TINY = ("--synthetic", "tiny", "--dtype", "float32", "--kv-cache-gib", "0.05")


def bench(output, *arguments, what="latency"):
    return cli.main(["bench", what, *TINY, "-o", str(output), *arguments])


def report_of(output, what="latency"):
    return json.loads((output / f"{what}.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    loaded = load_synthetic("tiny", EngineOptions("tiny", dtype="float32"), 0)
    with loaded.attached:
        yield loaded


# From end to end


@pytest.mark.parametrize("what", ["latency", "throughput", "ops", "serve"])
def test_an_output_that_is_no_directory_is_told_before_anything_is_measured(tmp_path, capsys, what):
    file = tmp_path / "taken"
    file.write_text("")
    arguments = {"serve": ("--url", "http://127.0.0.1:9"), "ops": ()}.get(what, (*TINY, "--scheme", "dense"))
    assert cli.main(["bench", what, *arguments, "-o", str(file)]) == 1
    captured = capsys.readouterr()
    assert "File exists" in captured.err
    assert not captured.out


@pytest.mark.parametrize("what", ["latency", "throughput", "ops", "serve"])
@pytest.mark.parametrize("taken", ["{}.json", ".{}.json.part"])
def test_a_report_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys, what, taken):
    (tmp_path / taken.format(what)).mkdir()
    arguments = {"serve": ("--url", "http://127.0.0.1:9"), "ops": ()}.get(what, (*TINY, "--scheme", "dense"))
    assert cli.main(["bench", what, *arguments, "-o", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "Is a directory" in captured.err
    assert not captured.out


@pytest.mark.parametrize("fails", ["write_text", "plots"])
def test_a_report_that_cannot_be_written_any_more_is_printed(tmp_path, monkeypatch, capsys, fails):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "plots":
        monkeypatch.setattr(throughput, "_draw", full)
    else:
        monkeypatch.setattr(type(tmp_path), "write_text", full)
    arguments = ("--requests", "1", "--lengths", "40", "--new-tokens", "2", "--repeats", "1", "--scheme", "dense")
    assert bench(tmp_path, *arguments, what="throughput") == 1
    captured = capsys.readouterr()
    assert "| dense |" in captured.out
    assert "foveate: the results are not all written: [Errno 28] No space left on device" in captured.err
    assert (tmp_path / "throughput.json").exists() == (fails == "plots")


def test_an_answer_of_one_token(tmp_path):
    assert bench(tmp_path, "--lengths", "40", "--new-tokens", "1", "--repeats", "1", "--scheme", "dense") == 0
    [cell] = report_of(tmp_path)["cells"]
    assert cell["gap_seconds"] is cell["decode_shares"] is None
    assert cell["prefill_shares"]["linear"] > 0


def test_every_scheme_is_measured_at_every_length(tmp_path, capsys):
    arguments = ("--lengths", "256,128", "--new-tokens", "3", "--repeats", "2")
    assert bench(tmp_path, *arguments) == 0
    report = report_of(tmp_path)
    assert {(cell["length"], cell["label"]) for cell in report["cells"]} == {
        (length, name) for length in (128, 256) for name in registry.names()
    }
    for cell in report["cells"]:
        assert cell["repeats"] == 2
        assert cell["first_seconds"] > 0
        assert cell["gap_seconds"] > 0
        for phase in ("prefill", "decode"):
            shares = cell[f"{phase}_shares"]
            assert list(shares) == ["attention", "selection", "linear", "rest"]
            assert sum(shares.values()) == pytest.approx(1)
            assert all(0 <= share < 1 for share in shares.values())
            assert shares["linear"] > 0
        assert ("growth" in cell) == (cell["length"] == 256)
    assert sorted(report["synthetic_profiles"]) == ["kascade", "top_theta"]
    assert report["unavailable"] == report["skipped"] == []
    assert (report["format"], report["version"], report["kind"]) == ("foveate-bench", 1, "latency")
    assert {"torch", "foveate", "cpu", "cpu_flags", "threads", "kernels"} <= set(report["machine"])
    assert set(report["load_average"]) == {"start", "end"}
    assert report["model"]["name"] == "synthetic-tiny"
    assert report["model"]["num_kv_heads"] == 2
    assert report["engine"]["prefix_reuse"] is False
    assert report["options"]["lengths"] == [256, 128]
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"latency-{name}.png" for name in ("first-token", "gap", "prefill-parts", "decode-parts")}
    printed = capsys.readouterr().out
    assert "synthetic profiles, made from random tokens: kascade, top_theta" in printed
    assert "seconds to first token" in printed


FEW = ("--new-tokens", "2", "--scheme", "dense,streaming", "--no-parts")


def test_settings_that_are_no_flags_here_are_not_taken_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_AUDIT_RATE", "1")
    monkeypatch.setenv("FOVEATE_MAX_CONTEXT", "16")
    assert bench(tmp_path, "--lengths", "40", "--new-tokens", "2", "--repeats", "1", "--scheme", "dense") == 0
    engine = report_of(tmp_path)["engine"]
    assert (engine["audit_rate"], engine["max_context"]) == (0, None)


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    real, asked = time_request, []

    def fails_in_the_middle(engine, prompt, *args, **kwargs):
        asked.append(len(prompt))
        if len(asked) == 6:  # two of them warm up
            raise KeyboardInterrupt
        return real(engine, prompt, *args, **kwargs)

    monkeypatch.setattr(latency, "time_request", fails_in_the_middle)
    arguments = ("--lengths", "64,96", "--repeats", "2", *FEW)
    assert bench(tmp_path, *arguments) == 130
    lines = [json.loads(line) for line in (tmp_path / latency.FILE).read_text().splitlines()[1:]]
    assert [(line["length"], line["repeat"], line["label"]) for line in lines] == [
        (64, 0, "dense"), (64, 0, "streaming"), (64, 1, "dense")
    ], "schemes take turns within a round"  # fmt: skip
    assert bench(tmp_path, *arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / latency.FILE).read_text().splitlines()[1:]]
    keys = [(line["length"], line["repeat"], line["label"]) for line in lines]
    assert len(keys) == len(set(keys)) == 8
    before = len(asked)
    assert bench(tmp_path, *arguments) == 0
    assert len(asked) == before, "nothing was left to do"


def test_results_of_another_model_are_not_mixed_in(tmp_path, capsys):
    assert bench(tmp_path, "--lengths", "32", "--repeats", "1", *FEW) == 0
    assert bench(tmp_path, "--lengths", "32", "--repeats", "1", *FEW, "--vocab", "300") == 1
    assert "another fingerprint" in capsys.readouterr().err
    assert bench(tmp_path, "--lengths", "32", "--repeats", "1", *FEW, "--vocab", "300", "--fresh") == 0


def test_prompts_beyond_the_limit_are_skipped_and_told(tmp_path, monkeypatch, capsys):
    real, asked = time_request, []

    def slow(engine, prompt, new_tokens, scheme, **kwargs):
        asked.append((scheme.name, len(prompt)))
        if scheme.name == "dense" and len(prompt) == 64 and "limit_seconds" in kwargs:
            raise TooLong(kwargs["limit_seconds"], 32)
        timing = real(engine, prompt, new_tokens, scheme, **{**kwargs, "limit_seconds": None})
        return timing if scheme.name == "dense" else _lasting(timing, 3.0)

    monkeypatch.setattr(latency, "time_request", slow)
    arguments = ("--lengths", "32,64,128", "--repeats", "1", *FEW)
    assert bench(tmp_path, *arguments, "--max-seconds", "4") == 0
    report = report_of(tmp_path)
    measured = {(cell["label"], cell["length"]) for cell in report["cells"]}
    assert measured == {("dense", 32), ("streaming", 32)}
    reasons = {(item["label"], item["length"]): item["reason"] for item in report["skipped"]}
    assert reasons["dense", 64] == "cut off after 4 s, 32 prompt tokens done"
    assert reasons["dense", 128] == "64 tokens took longer than 4 s"
    assert reasons["streaming", 64] == "the first token of 32 tokens took 3 s, so this one may take 6 s or more"
    assert ("streaming", 64) not in asked
    assert "skipped: dense at 64 tokens: cut off" in capsys.readouterr().out
    asked.clear()
    assert bench(tmp_path, *arguments, "--max-seconds", "4") == 0
    assert not asked, "what took too long is not tried again"
    assert bench(tmp_path, *arguments, "--max-seconds", "7") == 0
    assert ("streaming", 64) in asked, "unless it may take longer now"
    assert ("dense", 64) in asked


def test_a_watched_run_that_took_too_long_says_nothing_of_plain_ones(tmp_path, monkeypatch):
    real = time_request

    def slow(engine, prompt, new_tokens, scheme, clock=None, **kwargs):
        if clock is not None:
            raise TooLong(kwargs["limit_seconds"], 16)
        return real(engine, prompt, new_tokens, scheme, **{**kwargs, "limit_seconds": None})

    monkeypatch.setattr(latency, "time_request", slow)
    arguments = ("--lengths", "32,64", "--new-tokens", "2", "--scheme", "dense", "--max-seconds", "100")
    for repeats in ("1", "2"):
        assert bench(tmp_path, *arguments, "--repeats", repeats) == 0
        report = report_of(tmp_path)
        assert [(cell["length"], cell["repeats"]) for cell in report["cells"]] == [
            (32, int(repeats)),
            (64, int(repeats)),
        ]
        assert [(item["length"], item["what"]) for item in report["skipped"]] == [(32, "parts"), (64, "parts")]


def _lasting(timing, seconds):
    return type(timing)(seconds, timing.gaps_seconds, timing.usage, timing.prefill_parts, timing.decode_parts)


def test_a_length_beyond_the_context_is_left_out(tmp_path, capsys):
    assert bench(tmp_path, "--lengths", "32,131072", "--repeats", "1", *FEW) == 0
    assert [cell["length"] for cell in report_of(tmp_path)["cells"]] == [32, 32]
    assert "131072 tokens left out: the model's context has room for 131070" in capsys.readouterr().err
    assert bench(tmp_path, "--lengths", "131072", "--repeats", "1", *FEW) == 1


def test_a_model_from_disk_without_a_profile_says_so(model_dir, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("Nothing is so firmly believed as what we least know. " * 20)
    arguments = ["--lengths", "64", "--repeats", "1", "--new-tokens", "2", "--scheme", "dense,kascade"]
    arguments += ["--dtype", "float32", "--kv-cache-gib", "0.02", "--no-parts", "--text", str(book)]
    assert cli.main(["bench", "latency", model_dir, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not run: kascade: kascade needs a profile" in printed
    assert "| dense |" in printed
    assert "written to" not in printed


def test_a_policy_that_fails_lets_the_others_go_on(tmp_path, monkeypatch, capsys):
    from foveate.sparse_attn.schemes.streaming import Streaming

    def broken(*_):
        raise RuntimeError("no such page")

    monkeypatch.setattr(Streaming, "select_prefill", broken)
    assert bench(tmp_path, "--lengths", "600", "--repeats", "2", *FEW) == 0
    report = report_of(tmp_path)
    assert [cell["label"] for cell in report["cells"]] == ["dense"]
    [failed] = report["unavailable"]
    assert "no such page" in failed["reason"]


def test_without_matplotlib_the_report_is_written_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "foveate.server.bench.plots", None)
    assert bench(tmp_path, "--lengths", "32", "--repeats", "1", *FEW) == 0
    assert "pip install 'foveate[bench]'" in capsys.readouterr().out
    assert report_of(tmp_path)["cells"]


def test_throughput_of_a_batch(tmp_path, capsys):
    arguments = ("--requests", "3", "--lengths", "40,60", "--new-tokens", "4", "--repeats", "2")
    assert bench(tmp_path, *arguments, "--scheme", "dense,kascade", what="throughput") == 0
    report = report_of(tmp_path, "throughput")
    assert [cell["label"] for cell in report["cells"]] == ["dense", "kascade"]
    for cell in report["cells"]:
        assert [run["prompt_tokens"] for run in cell["runs"]] == [140, 140]
        assert [run["completion_tokens"] for run in cell["runs"]] == [12, 12]
        assert cell["tokens_per_second"] == pytest.approx(152 / cell["seconds"])
    assert report["synthetic_profiles"] == ["kascade"]
    assert "3 prompts of 40 and 60 tokens" in capsys.readouterr().out


def test_synthetic_profiles_are_kept_and_forgotten(tmp_path, capsys):
    arguments = ("--lengths", "40", "--new-tokens", "1", "--repeats", "1", "--no-parts", "--scheme", "composed,kascade")
    assert bench(tmp_path, *arguments) == 0
    file = tmp_path / "synthetic-kascade.safetensors"
    made = file.stat().st_mtime_ns
    assert bench(tmp_path, *arguments) == 0
    assert file.stat().st_mtime_ns == made
    assert bench(tmp_path, *arguments, "--fresh") == 0
    assert file.stat().st_mtime_ns != made
    policy = '{"scheme": "composed", "prefill": "kascade", "decode": "top_theta"}'
    assert bench(tmp_path, *arguments, "--policy", policy, "--vocab", "300", "--fresh", what="latency") == 0
    report = report_of(tmp_path)
    assert sorted(report["synthetic_profiles"]) == ["kascade", "top_theta"], "also those of a policy's parts"
    assert report["unavailable"] == []


# Timing one request


def test_a_request_is_cut_off_at_its_limit_and_the_engine_goes_on(loaded):
    engine = Engine(loaded, EngineOptions("tiny", max_batch_tokens=16, kv_cache_gib=0.05, prefix_reuse=False))
    try:
        scheme = engine.build_scheme({"scheme": "dense"})
        prompt = random_prompt(0, "long", loaded.vocab_size, 20_000)
        with pytest.raises(TooLong) as cut:
            time_request(engine, prompt, 4, scheme, limit_seconds=0.1)
        assert 0 <= cut.value.processed < 20_000
        seen = []
        timing = time_request(engine, prompt[:100], 4, scheme, limit_seconds=60, on_progress=seen.append)
        assert sum(seen) == 100
        assert (len(timing.gaps_seconds), timing.usage.completion_tokens) == (3, 4)
        assert engine.snapshot().pages_used == 0
    finally:
        engine.shutdown(0)


# Policies and prompts


def given(**values):
    return Namespace(**{"scheme": None, "option": [], "policy": [], "default_schemes": ["dense", "quest"], **values})


def test_which_policies_are_measured():
    assert wanted(given()) == [{"scheme": "dense"}, {"scheme": "quest"}]
    policy = {"scheme": "streaming", "budget_tokens": 64}
    assert wanted(given(policy=[policy, policy])) == [policy]
    found = wanted(given(scheme=["dense", "streaming"], option=["budget_tokens=9"], policy=[policy]))
    assert found == [{"scheme": "dense"}, {"scheme": "streaming", "budget_tokens": 9}, policy]
    assert wanted(given(default_schemes=None)) == []
    with pytest.raises(SchemeConfigError, match="'nosuch'"):
        wanted(given(option=["nosuch=1"]))


def test_prompts_come_from_the_seed():
    assert random_prompt(0, 64, 300, 64) == random_prompt(0, 64, 300, 64)
    assert random_prompt(0, 64, 300, 64) != random_prompt(1, 64, 300, 64)
    assert set(random_prompt(0, 1, 12, 999)) == {10, 11}
    assert set(random_prompt(0, 1, 4, 999)) == {3}


def test_letters_stand_for_tokens():
    tokenizer = LetterTokenizer()
    stream = Detokenizer(tokenizer, [1, 2], SamplingParams())
    ids = [5, 300, 151_935]
    assert "".join(stream.push(token) for token in ids) + stream.flush() == tokenizer.decode(ids)
    assert len(tokenizer.decode(ids)) == 3


# The command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["latency"], "name a MODEL"),
        (["latency", "m", "--synthetic", "tiny"], "not both"),
        (["latency", "m", "--vocab", "9"], "--vocab goes with --synthetic"),
        (["latency", "--synthetic", "tiny", "--profile", "p"], "profiles are made"),
        (["latency", "--synthetic", "tiny", "--text", "f"], "--text needs a MODEL"),
        (["latency", "--synthetic", "9b"], "invalid choice: '9b'"),
        (["latency", "m", "--lengths", "1,x"], "'x' is not a whole number above 0"),
        (["latency", "m", "--scheme", "dense,nosuch"], "there is no scheme 'nosuch'"),
        (["latency", "m", "--policy", "{"], "not valid JSON"),
        (["latency", "m", "--max-seconds", "nan"], "'nan' is not a number above 0"),
        (["throughput", "m", "--requests", "0"], "'0' is not a whole number"),
        (["serve"], "--url"),
        (["serve", "--url", "u", "--rate", "1,-2"], "'-2' is not a number above 0"),
        (["ops", "--ops", "prefill,nosuch"], "there is no op 'nosuch'"),
        (["ops", "--share", "2"], "'2' is not a number from 0 to 1"),
        ([], "WHAT"),
    ],
)
def test_wrong_arguments_are_told(monkeypatch, capsys, arguments, said):
    monkeypatch.delenv("FOVEATE_MODEL", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *arguments])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("what", ["latency", "throughput", "serve", "ops"])
def test_help_teaches_by_examples(capsys, what):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", what, "--help"])
    assert end.value.code == 0
    assert f"foveate bench {what}" in capsys.readouterr().out.split("examples:")[1]


def test_a_key_is_not_in_the_report(monkeypatch):
    import torch

    from foveate.server.bench import serve
    from foveate.server.bench.report import Report

    seen = []
    monkeypatch.setattr(serve, "run", lambda given: seen.append(given) or 0)
    assert cli.main(["bench", "serve", "--url", "u", "--api-key", "secret", "--lengths", "64"]) == 0
    report = Report("serve", seen[0], torch.device("cpu"))
    assert "secret" not in json.dumps(report._about)
    assert (report._about["options"]["url"], report._about["options"]["lengths"]) == ("u", [64])


def test_a_text_that_is_too_short_is_told_before_anything_is_measured(model_dir, tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    out = tmp_path / "out"
    assert (
        cli.main(["bench", "latency", str(model_dir), "--lengths", "16,64", "--text", str(text), "-o", str(out)]) == 1
    )
    assert "short.txt has" in capsys.readouterr().err
    assert not (out / latency.FILE).exists()


@pytest.mark.parametrize(
    ("device", "said"),
    [("nonsense", "choose auto, cpu, cuda"), ("mps", "choose auto"), ("cuda:99", "this torch can use")],
)
@pytest.mark.parametrize(
    "what", [["latency", "--synthetic", "tiny", "--lengths", "16"], ["ops"]], ids=["latency", "ops"]
)
def test_a_device_that_is_not_there_is_told(capsys, what, device, said):
    assert cli.main(["bench", *what, "--device", device]) == 1
    assert said in capsys.readouterr().err
