"""``foveate eval``: policies, trials that are kept, teacher forcing, reports, and a tiny model from end to end."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from foveate.server import cli
from foveate.server.engine import Engine
from foveate.server.evaluation import forced, report
from foveate.server.evaluation.policies import Refused, build, choices, label, labels_of
from foveate.server.evaluation.tasks import TASKS, Depths, Prompt, Turn
from foveate.server.evaluation.text import read_text
from foveate.server.evaluation.trials import Said, Trial, Trials
from foveate.server.journal import OtherResults
from foveate.server.llm import LLM
from foveate.server.loader import load
from foveate.server.options import EngineOptions
from foveate.server.request import SamplingParams
from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import CalibrationMissing, SchemeConfigError

from ..sparse_attn.cases import PROFILES, tight

LENGTH = 1024
DEPTHS = (0.1, 0.5, 0.9)
STREAMING = {"scheme": "streaming", "budget_tokens": 64}


@pytest.fixture(scope="module")
def long_dir(model_dir, tmp_path_factory):
    """The tiny model, with room for the tasks: its tokens are bytes."""
    path = tmp_path_factory.mktemp("long")
    AutoModelForCausalLM.from_pretrained(model_dir, max_position_embeddings=2048).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def loaded(long_dir):
    loaded = load(EngineOptions(long_dir, dtype="float32"))
    with loaded.attached:
        yield loaded


@pytest.fixture(scope="module")
def ids():
    return random.Random(0).choices(range(256), k=300)


def evaluate(path, *arguments, output):
    return cli.main(["eval", path, "--dtype", "float32", "--samples", "1", "-o", str(output), *arguments])


# Policies


def test_each_scheme_runs_at_each_budget_and_dense_runs_first():
    names = [attention["scheme"] for attention in choices(["streaming", "dense"], {}, [], [64, 128])]
    assert names == ["dense", "streaming", "streaming"]
    found = choices(["streaming"], {"sink_tokens": 8}, [], [64])
    assert found == [{"scheme": "dense"}, {"scheme": "streaming", "sink_tokens": 8, "budget_tokens": 64}]


def test_named_schemes_are_measured_without_their_dense_tail():
    [_, found] = choices(["kascade"], {}, [], [64])
    assert found == {"scheme": "kascade", "dense_tail_tokens": 0, "budget_tokens": 64}
    [_, found] = choices(["kascade"], {"dense_tail_tokens": 32}, [], [64])
    assert found["dense_tail_tokens"] == 32
    assert choices(["dense"], {"dense_tail_tokens": 32}, [], [64]) == [{"scheme": "dense"}]


def test_a_task_that_a_policy_did_not_run_leaves_its_panel_empty(tmp_path):
    heatmap = pytest.importorskip("foveate.server.evaluation.heatmap")
    cells = [
        report.Cell(task, 2048, 0.5, {"scheme": scheme}, scheme, scheme, 1, {"score": 1.0}, 1.0, None)
        for task, scheme in [("needle", "dense"), ("multikey", "dense"), ("needle", "streaming")]
    ]
    [path] = heatmap.draw(tmp_path, cells)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_policies_that_share_a_label_are_told_apart():
    """The same words with another profile, or with the defaults of another version, are not the same policy."""
    found = labels_of([("aaaaaaaa", STREAMING), ("bbbbbbbb", STREAMING), ("cccccccc", {"scheme": "dense"})])
    name = label(STREAMING)
    assert found == {"aaaaaaaa": f"{name} [aaaaaa]", "bbbbbbbb": f"{name} [bbbbbb]", "cccccccc": "dense"}


def test_a_policy_keeps_its_own_budget():
    assert choices([], {}, [STREAMING], [512])[1:] == [STREAMING]
    assert choices(["streaming"], {}, [STREAMING], [64])[1:] == [STREAMING], "the same policy runs once"


def test_an_option_that_no_scheme_has_is_refused():
    with pytest.raises(SchemeConfigError, match="'nosuch'"):
        choices(["streaming"], {"nosuch": 1}, [], [])


def test_a_scheme_without_its_profile_is_put_aside():
    def make(attention):
        if attention["scheme"] == "streaming":
            raise CalibrationMissing("streaming")
        return registry.build(attention["scheme"])

    made, [refused] = build([{"scheme": "dense"}, {"scheme": "streaming"}], make)
    assert [policy.label for policy in made] == ["dense"]
    assert "foveate calibrate MODEL --scheme streaming" in refused.reason


def test_labels_and_digests_tell_policies_apart():
    assert label({**STREAMING, "sink_tokens": 8}) == "streaming 64 sink_tokens=8"
    policies, _ = build([STREAMING, {**STREAMING, "sink_tokens": 4}, {**STREAMING, "sink_tokens": 8}], _build)
    assert policies[0].digest == policies[1].digest, "4 is the default"
    assert policies[0].digest != policies[2].digest


def _build(attention):
    options = dict(attention)
    return registry.build(options.pop("scheme"), **options)


# Trials


def trial(sample=0, score=1.0, task="needle", depth=0.5, attention=None, **values):
    attention = attention or {"scheme": "dense"}
    measured = values or {"score": score}
    depths = () if depth is None else (depth,)
    said = tuple(Said("a", "b", bool(score), at) for at in depths)
    return Trial(task, 2048, depths, sample, attention, label(attention), measured, 0.5, None, said)


def test_trials_are_found_again(tmp_path):
    first = Trials(tmp_path, {"model": "m", "seed": 0})
    first.add(trial(0))
    first.add(trial(1, 0.0))
    again = Trials(tmp_path, {"model": "m", "seed": 0})
    assert list(again) == [trial(0), trial(1, 0.0)]
    assert trial(1).key in again
    assert trial(2).key not in again


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    first = Trials(tmp_path, {})
    first.add(trial(0))
    first.add(trial(1))
    file = tmp_path / "trials.jsonl"
    file.write_text(file.read_text()[:-30])
    again = Trials(tmp_path, {})
    assert list(again) == [trial(0)]
    again.add(trial(1))
    assert len(list(Trials(tmp_path, {}))) == 2


def test_results_of_another_model_are_not_mixed_in(tmp_path):
    Trials(tmp_path, {"model": "m", "seed": 0}).add(trial())
    with pytest.raises(OtherResults, match="another seed"):
        Trials(tmp_path, {"model": "m", "seed": 1})
    assert not list(Trials(tmp_path, {"model": "m", "seed": 1}, fresh=True))


# Teacher forcing


@pytest.mark.parametrize("chunk", [1000, 64, 37])
def test_loss_is_that_of_transformers(long_dir, loaded, ids, chunk):
    model = AutoModelForCausalLM.from_pretrained(long_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, 149:-1]
    want = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[150:]))
    got, fraction = forced.loss(loaded, registry.build("dense"), ids, 150, chunk)
    assert got == pytest.approx(float(want), abs=1e-4)
    assert fraction == 1.0


def test_a_text_has_no_dense_tail(loaded, ids):
    plain, tailed = (registry.build("streaming", budget_tokens=64, dense_tail_tokens=tail) for tail in (0, 200))
    assert forced.loss(loaded, tailed, ids, 150, 64) == forced.loss(loaded, plain, ids, 150, 64)
    assert forced.loss(loaded, plain, ids, 150, 64)[1] < 0.5
    share = {"query_block_tokens": 32, "key_block_tokens": 16, "density": 0.2, "sink_tokens": 0, "window_tokens": 0}
    plain, tailed = (registry.build("dhsa_block", **share, dense_tail_tokens=tail) for tail in (0, 200))
    assert forced.loss(loaded, tailed, ids, 150, 64) == forced.loss(loaded, plain, ids, 150, 64)


@pytest.mark.parametrize("attention", [{"scheme": "dense"}, {**STREAMING, "dense_tail_tokens": 20}], ids=label)
def test_an_answer_is_the_engines_own(long_dir, ids, attention):
    options = EngineOptions(long_dir, dtype="float32", max_batch_tokens=64, max_running=1)
    loaded = load(options)
    with LLM.over(Engine(loaded, options)) as llm:
        got = forced.answer(loaded, _build(attention), ids, 12, 64)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        [want] = llm.generate([ids], params, attention)
    assert got.tokens == list(want.token_ids)
    # The engine does not compute the last token that it draws, and neither does this.
    assert got.keys_read_fraction == pytest.approx(want.usage.keys_read_fraction)


def groups_seen(seen):
    """A hook of a model that notes who chooses for whom, and what it is told of their prompts."""

    def note(model, args, given):
        seen.append(
            [
                (
                    group.phase,
                    group.scheme and (group.scheme.name, group.scheme.options),
                    (group.start, group.owners, group.wanted),
                    (group.rows.host_context_lens, group.rows.host_query_lens, group.rows.host_prompt_lens),
                )
                for group in given["foveate_step"].step.groups
            ]
        )

    return note


@pytest.mark.parametrize("tail", [0, 20])
@pytest.mark.parametrize("name", registry.names())
def test_a_policy_chooses_what_it_does_in_the_engine(long_dir, ids, name, tail):
    """Among them those that look at the length of the prompt; of ``dhsa_block``, whose budget is a share of it."""
    options = EngineOptions(long_dir, dtype="float32", max_batch_tokens=64, max_running=1)
    loaded = replace(load(options), profiles=PROFILES)
    attention = {"scheme": name, **tight(name)}
    if name == "composed":
        attention["prefill"] = {**attention["prefill"], "dense_tail_tokens": tail}
    else:
        attention["dense_tail_tokens"] = tail
    if name == "dhsa_block":
        attention |= {"budget_tokens": 0, "density": 0.3}
    with LLM.over(Engine(loaded, options)) as llm:
        scheme = llm.engine.build_scheme(attention)
        seen, expected = [], []
        with loaded.model.register_forward_pre_hook(groups_seen(seen), with_kwargs=True):
            got = forced.answer(loaded, scheme, ids, 12, 64)
        with loaded.model.register_forward_pre_hook(groups_seen(expected), with_kwargs=True):
            [want] = llm.generate([ids], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), attention)
    assert seen == expected
    assert len(seen) == 16
    assert got.tokens == list(want.token_ids)
    assert got.keys_read_fraction == pytest.approx(want.usage.keys_read_fraction)
    assert (got.keys_read_fraction < 0.95) == (name != "dense")


def test_agreement_by_hand():
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    other = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    found = forced.agreement(forced.Answer([0, 2], dense.log(), 1.0), forced.Answer([0, 2], other.log(), 0.5))
    assert found["match"] == 0.5
    assert found["kl"] == pytest.approx(float((dense * (dense / other).log()).sum()) / 2, abs=1e-6)


def test_dense_agrees_with_itself_and_streaming_less(loaded, ids):
    dense = forced.answer(loaded, registry.build("dense"), ids, 20, 64)
    again = forced.answer(loaded, registry.build("dense"), ids, 20, 64, dense.tokens)
    assert forced.agreement(dense, again) == {"match": 1.0, "kl": 0.0}
    sparse = forced.answer(loaded, _build(STREAMING), ids, 20, 64, dense.tokens)
    assert sparse.tokens == dense.tokens
    assert forced.agreement(dense, sparse)["kl"] > 0.01


def test_questions_are_read_behind_the_answers(long_dir, loaded, monkeypatch):
    """All that was read, in one pass of transformers, gives every token that was answered."""
    calls = []
    read = forced.Reader.read

    def recording(self, given, first=0):
        calls.append(list(given))
        return read(self, given, first)

    monkeypatch.setattr(forced.Reader, "read", recording)
    tokenizer = loaded.tokenizer
    prompt = TASKS["multiquery"].write(random.Random(0), tokenizer.encode, LENGTH, DEPTHS)
    said, fraction = forced.converse(loaded, registry.build("dense"), prompt, 128, tokens=LENGTH)
    assert fraction == 1.0
    assert len(said) == len(prompt.turns)
    assert calls[0] == tokenizer.encode(prompt.text)
    assert [call[1:] for call in calls[1:] if len(call) > 1] == [tokenizer.encode(t.text) for t in prompt.turns[1:]]
    model = AutoModelForCausalLM.from_pretrained(long_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        best = model(torch.tensor([[token for call in calls for token in call]])).logits[0].argmax(-1).tolist()
    ends = list(accumulate(len(call) for call in calls))
    assert [best[end - 1] for end in ends[:-1]] == [call[0] for call in calls[1:]]


def test_a_question_is_about_the_word_that_was_answered(loaded):
    asked = []

    class Tokenizer:
        def encode(self, text, add_special_tokens):
            asked.append(text)
            return [65] * 4

        def decode(self, ids):
            return " Lisbon." if len(asked) < 3 else "..."

    turns = (Turn("?", "Lisbon", 3), Turn("In {}:", "silk", 3), Turn("On {}:", "cobra", 3), Turn("{}?", "1", 3))
    talker = replace(loaded, tokenizer=Tokenizer())
    said, _ = forced.converse(talker, registry.build("dense"), Prompt("Text?", turns), 128, tokens=64)
    assert asked == ["Text?", "In Lisbon:", "On Lisbon:"]
    assert said == [" Lisbon.", " Lisbon.", "..."], "no word, no further question"


def test_text_comes_in_pieces_with_what_the_model_expects_before_it(tmp_path, tokenizer):
    file = tmp_path / "text.txt"
    file.write_text("abcdefgh" * 10, encoding="utf-8")
    text = read_text(file, tokenizer)
    piece = text.piece(random.Random(0), 16)
    assert tokenizer.decode(piece) in "abcdefgh" * 10
    assert len(piece) == 16
    with pytest.raises(ValueError, match=r"text\.txt has 80 tokens, 81 are needed"):
        text.piece(random.Random(0), 81)
    assert len(read_text(None, tokenizer).ids) > 100_000


# Reports


def test_cells_are_means_over_samples_and_depths():
    trials = [trial(0, 1.0, depth=0.1), trial(1, 0.0, depth=0.1), trial(0, 1.0, depth=0.9)]
    fine = report.cells(trials, by_depth=True)
    assert [(cell.depth, cell.trials, cell.values["score"]) for cell in fine] == [(0.1, 2, 0.5), (0.9, 1, 1.0)]
    [coarse] = report.cells(trials, by_depth=False)
    assert (coarse.depth, coarse.trials, str(coarse)) == (None, 3, "67 (50)")


def test_facts_asked_for_in_turn_are_told_apart_by_depth():
    said = (Said("a", "a", True, 0.9), Said("b", "c", False, 0.1), Said("d", "d", True, 0.5))
    several = Trial("multiquery", 2048, DEPTHS, 0, STREAMING, "x", {"score": 2 / 3}, 0.25, None, said)
    fine = report.cells([several], by_depth=True)
    assert [(cell.depth, cell.trials, cell.values["score"]) for cell in fine] == [(0.1, 1, 0), (0.5, 1, 1), (0.9, 1, 1)]
    [coarse] = report.cells([several], by_depth=False)
    assert (coarse.task, coarse.depth, coarse.trials, str(coarse)) == ("multiquery-3", None, 1, "67 (25)")
    alone = Trial("multiquery", 2048, (0.5,), 0, STREAMING, "x", {"score": 1.0}, 0.25, None, said[2:])
    assert [cell.trials for cell in report.cells([several, alone], by_depth=False)] == [1, 1], "one fact is easier"


def test_perplexity_is_that_of_the_mean_loss():
    trials = [trial(0, task="perplexity", depth=None, loss=1.0), trial(1, task="perplexity", depth=None, loss=3.0)]
    [cell] = report.cells(trials, by_depth=True)
    assert cell.values["perplexity"] == pytest.approx(7.389056)


def test_table_has_a_row_per_policy_and_a_column_per_length():
    trials = [trial(), trial(attention=STREAMING, score=0.0)]
    assert report.table(report.cells(trials, by_depth=False)).splitlines()[2:] == [
        "| needle | 2048 |",
        "| --- | ---: |",
        "| dense | 100 (50) |",
        "| streaming 64 | 0 (50) |",
    ]


def test_without_matplotlib_all_but_the_pictures_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "foveate.server.evaluation.heatmap", raising=False)
    trials = Trials(tmp_path, {"model": "m"})
    trials.add(trial())
    told = report.write_report(tmp_path, trials, [Refused(STREAMING, "no profile")])
    assert "pip install 'foveate[eval]'" in told
    assert "not run: streaming 64: no profile" in told
    assert "| dense | 100 (50) |" in told
    assert (tmp_path / "results.json").exists()
    assert not list(tmp_path.glob("*.png"))


# From end to end


def test_a_tiny_model_from_end_to_end(long_dir, tmp_path, capsys):
    arguments = ["--policy", json.dumps(STREAMING), "--lengths", "1024,4096", "--depths", "0.5", "--audit-rate", "1"]
    assert evaluate(long_dir, *arguments, output=tmp_path) == 0
    out, err = capsys.readouterr()
    assert "4096 tokens left out: the context is 2048" in err
    assert "written to" in out.splitlines()[-1]
    result = json.loads((tmp_path / "results.json").read_text())
    assert (result["format"], result["version"], result["seed"], result["unavailable"]) == ("foveate-eval", 2, 0, [])
    assert set(result["fingerprint"]) >= {"model_type", "weights"}
    found = {(cell["task"], label(cell["attention"])): cell for cell in result["cells"]}
    assert set(found) == {(task, name) for task in TASKS for name in ("dense", "streaming 64")}
    measures = {"perplexity": {"loss", "perplexity"}, "agreement": {"match", "kl"}}
    for (task, name), cell in found.items():
        assert set(cell) == {
            "task", "length", "depth", "attention", "label", "digest", "trials", "values", "keys_read_fraction",
            "mass_kept",
        }  # fmt: skip
        assert (cell["length"], cell["trials"]) == (LENGTH, 1)
        assert cell["depth"] == (None if TASKS[task].depths is Depths.NONE else 0.5)
        assert set(cell["values"]) == measures.get(task, {"score"})
        assert (cell["keys_read_fraction"] == 1.0) == (name == "dense")
    assert found["agreement", "dense"]["values"] == {"match": 1.0, "kl": 0.0}
    assert found["needle", "dense"]["mass_kept"] == 1.0
    assert 0 < found["needle", "streaming 64"]["mass_kept"] < 1
    picture = (tmp_path / "heatmap-streaming.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000


def test_a_document_cache_of_the_environment_is_left_alone(long_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEATE_CACHE_DIR", str(tmp_path / "cache"))
    arguments = ["--tasks", "needle", "--lengths", str(LENGTH), "--depths", "0.5", "--scheme", "dense"]
    assert evaluate(long_dir, *arguments, output=tmp_path / "results") == 0
    assert not (tmp_path / "cache").exists()


def test_a_report_that_cannot_be_written_loses_no_trial(long_dir, tmp_path, capsys):
    arguments = ["--tasks", "needle", "--lengths", str(LENGTH), "--depths", "0.5", "--scheme", "dense"]
    (tmp_path / report.FILE).mkdir()
    assert evaluate(long_dir, *arguments, output=tmp_path) == 1
    assert "every trial is kept: the same command writes them up" in capsys.readouterr().err
    (tmp_path / report.FILE).rmdir()
    assert evaluate(long_dir, *arguments, output=tmp_path) == 0
    assert "| dense |" in capsys.readouterr().out


def test_a_second_run_adds_what_is_missing(long_dir, tmp_path, capsys):
    arguments = ["--tasks", "needle", "--lengths", str(LENGTH), "--depths", "0.5"]
    assert evaluate(long_dir, *arguments, "--scheme", "dense", output=tmp_path) == 0
    before = (tmp_path / "trials.jsonl").read_text()
    assert evaluate(long_dir, *arguments, "--policy", json.dumps(STREAMING), output=tmp_path) == 0
    after = (tmp_path / "trials.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    assert "| dense |" in capsys.readouterr().out
    assert evaluate(long_dir, *arguments, "--seed", "1", output=tmp_path) == 1
    assert "another seed" in capsys.readouterr().err


def test_every_registered_scheme_is_evaluated_or_says_what_it_lacks(long_dir, tmp_path):
    arguments = ["--tasks", "needle,agreement", "--lengths", str(LENGTH), "--depths", "0.5", "--budgets", "64"]
    assert evaluate(long_dir, *arguments, output=tmp_path) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    run = {cell["attention"]["scheme"] for cell in result["cells"]}
    unavailable = {item["attention"]["scheme"]: item["reason"] for item in result["unavailable"]}
    assert run | set(unavailable) == set(registry.names())
    for name, reason in unavailable.items():
        assert registry.load(name).calibrated, reason
        assert "foveate calibrate" in reason


def test_a_scheme_that_breaks_breaks_only_itself(long_dir, tmp_path, capsys, monkeypatch):
    def broken(self, *args):
        raise RuntimeError("out of order")

    monkeypatch.setattr(registry.load("streaming"), "select_prefill", broken)
    arguments = ["--tasks", "needle,perplexity", "--lengths", str(LENGTH), "--policy", json.dumps(STREAMING)]
    assert evaluate(long_dir, *arguments, output=tmp_path) == 0
    assert "not run: streaming 64: RuntimeError: out of order" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert {cell["task"] for cell in result["cells"]} == {"needle", "perplexity"}
    assert {cell["attention"]["scheme"] for cell in result["cells"]} == {"dense"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "nosuch"], "there is no scheme 'nosuch'; there are: dense, streaming"),
        (["--tasks", "needle,nosuch"], "there is no task 'nosuch'; there are: needle"),
        (["--lengths", "0"], "'0' is not a whole number above 0"),
        (["--depths", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--policy", "{bad"], "not valid JSON"),
        (["--policy", "{}"], "a policy is"),
        (["--audit-rate", "2"], "--audit-rate: "),
    ],
)
def test_wrong_flags_are_named(capsys, arguments, words, tmp_path):
    with pytest.raises(SystemExit) as end:
        evaluate("m", *arguments, output=tmp_path)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_prompts_that_cannot_be_made_are_told_before_anything_is_computed(long_dir, capsys, tmp_path):
    depths = ",".join(str(number / 40) for number in range(36))
    assert evaluate(long_dir, "--lengths", "2048", "--depths", depths, output=tmp_path) == 1
    assert "36 facts in a document are too many" in capsys.readouterr().err
    assert not (tmp_path / "trials.jsonl").exists()


@pytest.mark.parametrize("wrong", ["output", "text"])
def test_files_that_are_wrong_are_told_before_the_model_is_loaded(wrong, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_bytes(b"\xff")
    given = {"output": tmp_path / "out"} | {wrong: file}
    text = ["--text", str(given["text"])] if "text" in given else []
    assert evaluate("/no/such/model", *text, output=given["output"]) == 1
    error = capsys.readouterr().err
    assert "such/model" not in error
    assert ("File exists" if wrong == "output" else "utf-8") in error


@pytest.mark.parametrize(("task", "least"), [("agreement", 33), ("perplexity", 2)])
def test_lengths_with_no_room_for_a_text_are_told(task, least, long_dir, capsys, tmp_path):
    arguments = ["--tasks", task, "--scheme", "dense", "--lengths"]
    assert evaluate(long_dir, *arguments, f"{least - 1},64", output=tmp_path) == 1
    assert f"{least - 1} tokens have no room for {task}, which needs {least} at least" in capsys.readouterr().err
    assert not (tmp_path / "trials.jsonl").exists()
    assert evaluate(long_dir, *arguments, str(least), output=tmp_path) == 0
    assert "not run" not in capsys.readouterr().out


def test_what_cannot_run_at_all_ends_with_its_reason(long_dir, capsys, tmp_path):
    assert evaluate(long_dir, "--lengths", "4096", output=tmp_path) == 1
    short = tmp_path / "short.txt"
    short.write_text("too short")
    arguments = ["--lengths", str(LENGTH), "--text", str(short)]
    assert evaluate(long_dir, *arguments, "--tasks", "agreement", output=tmp_path) == 1
    assert evaluate(long_dir, *arguments, "--option", "nosuch=1", output=tmp_path) == 1
    err = capsys.readouterr().err
    assert "give a longer --text" in err
    assert "none of the schemes chosen has an option 'nosuch'" in err
