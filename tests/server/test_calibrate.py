"""``foveate calibrate``: from a checkpoint to a profile that is served, whatever happens on the way."""

from __future__ import annotations

import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import foveate
from foveate.patches.profiles import profiles_for, shipped
from foveate.server import calibrate, cli
from foveate.server.calibration_text import documents, windows
from foveate.server.llm import LLM
from foveate.server.options import EngineOptions
from foveate.server.request import SamplingParams
from foveate.sparse_attn import registry
from foveate.sparse_attn.errors import CalibrationMissing, ProfileError
from foveate.sparse_attn.profile import Profile

# Of so few tokens these options leave something to choose.
SMALL = ("--option", "top_tokens=8", "--option", "sink_tokens=2", "--option", "window_tokens=8")
KASCADE = ("--scheme", "kascade", "--samples", "4", "--tokens", "100", "--dtype", "float32", *SMALL)


def run(model, output, *options):
    return cli.main(["calibrate", str(model), *KASCADE, "-o", str(output), *options])


POLICY = {"scheme": "kascade", "anchors": 1, "budget_tokens": 8, "sink_tokens": 2, "window_tokens": 8}
POLICY |= {"dense_tail_tokens": 0}
PROMPT = list(range(1, 120)) * 2


def served(model_dir, profile_file):
    with LLM(model_dir, profile=[str(profile_file)], dtype="float32", kv_cache_gib=0.01) as llm:
        [answer] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), POLICY)
    return answer


@pytest.fixture(scope="module")
def profile_file(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "kascade.safetensors"
    assert run(model_dir, path) == 0
    return path


def test_a_profile_is_written_and_served(model_dir, profile_file):
    profile = Profile.load(profile_file)
    assert profile.scheme == "kascade"
    assert profile.options["samples"] == 4
    assert profile.options["sample_tokens"] == 100
    assert profile.tensors["anchors.2"].tolist() == [0, 1]
    assert list(profile_file.parent.iterdir()) == [profile_file], "nothing else is left"
    answer = served(model_dir, profile_file)
    assert answer.usage.scheme == "kascade"
    assert 0 < answer.usage.keys_read_fraction < 0.8


def test_a_model_attached_with_a_profile_answers_as_the_served_one(model_dir, profile_file):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with foveate.attach(model, POLICY, profile=[profile_file]) as attached:
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert 0 < attached.keys_read_fraction < 0.8
    assert ids[0, len(PROMPT) :].tolist() == list(served(model_dir, profile_file).token_ids)
    with pytest.raises(ValueError, match="has its own profile"):
        foveate.attach(model, registry.build("dense"), profile=[profile_file])
    with pytest.raises(CalibrationMissing, match=r"profile=\[PROFILE\]"):
        foveate.attach(model, "kascade")


def test_the_same_call_makes_the_same_profile(model_dir, profile_file, tmp_path):
    assert run(model_dir, tmp_path / "again") == 0
    assert Profile.load(tmp_path / "again").digest == Profile.load(profile_file).digest


def test_options_and_text_change_it(model_dir, profile_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    given = ("--text", str(text), "--option", "anchors=1", "--option", "top_tokens=7")
    assert run(model_dir, tmp_path / "other", *given) == 0
    before, after = Profile.load(profile_file), Profile.load(tmp_path / "other")
    assert (after.options["anchors"], after.options["chosen_anchors"], after.options["top_tokens"]) == (1, 1, 7)
    assert after.data_hash != before.data_hash


class Killed(BaseException):
    """As abrupt as a signal: no handler for errors catches it."""


def test_stopped_and_run_again_it_is_the_same(model_dir, profile_file, tmp_path, monkeypatch, capsys):
    output, plain, begun = tmp_path / "profile", calibrate._run, []

    def dies(*arguments):
        begun.append(1)
        for done, count in enumerate(plain(*arguments)):
            if len(begun) == 3 and done == 1:
                raise Killed
            yield count

    monkeypatch.setattr(calibrate, "_run", dies)
    with pytest.raises(Killed):
        run(model_dir, output)
    assert not output.exists()
    partial = tmp_path / "profile.partial"
    assert Profile.load(partial).options["done"] == 2
    with pytest.raises(ProfileError, match="not a scheme"):
        profiles_for(Profile.load(partial).model, [partial])
    begun.clear()
    monkeypatch.setattr(calibrate, "_run", lambda *arguments: begun.append(1) or plain(*arguments))
    assert run(model_dir, output) == 0
    assert len(begun) == 2, "only the samples that were missing"
    assert Profile.load(output).digest == Profile.load(profile_file).digest
    assert not partial.exists()
    assert "afresh" not in capsys.readouterr().err


def test_killed_by_a_signal_and_run_again_it_is_the_same(model_dir, profile_file, tmp_path):
    output, partial = tmp_path / "profile", tmp_path / "profile.partial"
    command = [sys.executable, "-m", "foveate.server", "calibrate", str(model_dir), *KASCADE, "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() or output.exists()
    assert run(model_dir, output) == 0
    assert Profile.load(output).digest == Profile.load(profile_file).digest


@pytest.mark.parametrize("left", ["damaged", "of-other-options"])
def test_what_another_run_left_is_not_gone_on_from(left, model_dir, profile_file, tmp_path, capsys):
    partial = tmp_path / "profile.partial"
    if left == "damaged":
        partial.write_bytes(b"no such file")
    else:
        found = Profile.load(profile_file)
        options = {"anchors": 2, "done": 3}
        Profile("kascade (unfinished)", found.model, options, found.data_hash, found.tensors).save(partial)
    assert run(model_dir, tmp_path / "profile") == 0
    assert "starting afresh" in capsys.readouterr().err
    assert Profile.load(tmp_path / "profile").digest == Profile.load(profile_file).digest


def test_a_profile_of_another_model_is_refused(profile_file, model_dir, tmp_path):
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path)
    with pytest.raises(ProfileError, match="made for another model: weights"):
        LLM(str(tmp_path), profile=[str(profile_file)], kv_cache_gib=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--scheme", "dense"), "dense reads no profile; calibrate one of: .*kascade"),
        (("--scheme", "nothing"), "unknown attention scheme"),
        (("--option", "nonsense=1"), "unknown option nonsense; there are: .*top_tokens"),
        (("--option", "top_tokens=0"), "top_tokens"),
        (("--option", "top_tokens"), "NAME=VALUE"),
        (("--tokens", "513"), "context, 512"),
        (("--tokens", "64"), "more than 64 tokens"),
        (("--option", "top_tokens=90"), "kascade needs samples of at least 101 tokens"),
        (("--samples", "0"), "at least 1 sample"),
        (("--text", "/nosuch/text"), "nosuch"),
        (("-o", "/nosuch/profile"), "no directory"),
        (("-o", "/tmp"), "Is a directory: '/tmp'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_said(options, said, model_dir, tmp_path, capsys):
    assert run(model_dir, tmp_path / "profile", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("foveate: ") or "\nfoveate: " in error
    assert re.search(said, error)
    assert not list(tmp_path.iterdir())


def test_an_option_is_looked_at_before_the_weights_are_read(model_dir, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model_dir, copy)
    (copy / "model.safetensors").unlink()
    assert run(str(copy), tmp_path / "profile", "--option", "nonsense=1") == 1
    assert "unknown option nonsense" in capsys.readouterr().err


def test_a_disk_that_fills_is_said(model_dir, tmp_path, monkeypatch, capsys):
    save = Profile.save

    def save_on_a_full_disk(profile, path):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            save(profile, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(Profile, "save", save_on_a_full_disk)
    assert run(model_dir, tmp_path / "profile") == 1
    assert "profile.partial cannot be written: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_that_are_no_flags_here_are_not_taken_from_the_environment(profile_file, tmp_path, monkeypatch):
    seen = []

    def load(options):
        seen.append(options)
        raise ValueError("seen enough")

    monkeypatch.setattr(calibrate, "config_of", load)  # what it does first
    for name, value in {"QUANTIZATION": "int8", "PROFILE": str(profile_file), "CACHE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"FOVEATE_{name}", value)
    monkeypatch.setenv("FOVEATE_MAX_CONTEXT", "16")
    monkeypatch.setenv("FOVEATE_KV_DTYPE", "int8")
    assert run("model", tmp_path / "out") == 1
    assert seen == [EngineOptions("model", dtype="float32")]


def test_a_text_too_short_is_refused(model_dir, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("short", encoding="utf-8")
    assert run(model_dir, tmp_path / "profile", "--text", str(text)) == 1
    assert "the text has 5 tokens" in capsys.readouterr().err


def test_windows_are_spread_over_the_text():
    assert windows(list(range(100)), [7], 11, 3) == [[7, *range(start, start + 10)] for start in (0, 45, 90)]
    assert windows(list(range(10)), [], 10, 1) == [list(range(10))]


def test_documents_have_the_length_asked_for_and_end_in_answers():
    def encode(text):
        return list(text.encode())

    found = documents(encode, [1, 2], 3000, 2)
    assert found == documents(encode, [1, 2], 3000, 2)
    assert [len(ids) for ids in found] == [3000, 3000]
    assert found[0] != found[1]
    for ids in found:
        assert ids[:2] == [1, 2]
        text = bytes(ids[2:]).decode()
        question = text.rstrip("\n").rpartition("\n")[2]
        code = question.rpartition(" ")[2]
        assert text.count(code) == 2, "the document holds what its last question asks"
    assert len(documents(encode, [], 40, 1)[0]) == 40


@pytest.mark.parametrize("path", shipped(), ids=lambda path: path.stem)
def test_profiles_that_come_with_the_package_are_sound(path):
    profile = Profile.load(path)
    assert path.stat().st_size < 300_000
    scheme = registry.build(profile.scheme, {profile.scheme: profile})
    assert len(scheme.roles(profile.model["num_layers"])) == profile.model["num_layers"]


def test_the_packaged_model_needs_no_profile_to_be_given(smollm_dir):
    with LLM(str(smollm_dir), kv_cache_gib=0.1) as llm:
        assert llm.engine.build_scheme({"scheme": "kascade"}).profile is not None
    model = AutoModelForCausalLM.from_pretrained(smollm_dir)
    with foveate.attach(model, "kascade") as attached:
        assert attached.scheme.profile is not None
