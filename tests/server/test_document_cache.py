"""Pages that outlive their engine: the same answers as cold, for the right requests only, whatever the disk does."""

from __future__ import annotations

import errno
import os
import queue
import random
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.kv_cache.disk import FOLDER, PageStore
from foveate.kv_cache.disk_format import pack_tokens
from foveate.kv_cache.page_bytes import PageBytes
from foveate.kv_cache.prefix import page_keys
from foveate.server import document_cache, document_identity, document_loads
from foveate.server.engine import Engine
from foveate.server.exceptions import InvalidRequest
from foveate.server.options import EngineOptions
from foveate.server.request import Delta, Failed, Finished, GenerationRequest, Progress, SamplingParams
from foveate.sparse_attn import registry
from foveate.sparse_attn.protocol import Phase

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PAGE = 16
PAGE_BYTES = 2 * 2 * PAGE * 16 * 2 * 4  # layers, KV heads, tokens, channels, K and V, float32


@pytest.fixture
def start(model_dir, tmp_path):
    """Starts an engine over the cache of this test; the one before is stopped first."""
    engines: list[Engine] = []

    def make(model: str = model_dir, *, beside: bool = False, **options):
        if not beside:
            stop(engines)
        options = {"dtype": "float32", "page_size": PAGE, "kv_cache_gib": 0.02, "cache_dir": str(tmp_path), **options}
        engines.append(Engine.load(EngineOptions(model, **options)))
        return engines[-1]

    yield make
    stop(engines)


def stop(engines):
    while engines:
        engine = engines.pop()
        engine.shutdown(30)
        assert engine.snapshot().pages_used == 0
        assert not engine.documents.parked


def prompt_of(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def submit(engine, prompt, attention=None, salt="", sampling=GREEDY):
    events = queue.SimpleQueue()
    request = GenerationRequest(uuid.uuid4().hex, prompt, sampling, engine.build_scheme(attention), events.put, salt)
    engine.submit(request)
    return request.request_id, events


def collect(events):
    """``(tokens, cached tokens)`` of a request, or the error it ended with."""
    tokens = []
    while True:
        event = events.get(timeout=60)
        if isinstance(event, Delta):
            tokens += event.token_ids
        elif isinstance(event, Finished):
            return tokens, event.usage.cached_tokens
        elif isinstance(event, Failed):
            return event.error, 0


def ask(engine, prompt, attention=None, salt=""):
    return collect(submit(engine, prompt, attention, salt)[1])


def settle(engine):
    """Waits until what is to be kept is kept."""
    deadline = time.monotonic() + 60
    while engine.documents._saves.is_busy:
        assert time.monotonic() < deadline
        engine._ring()
        time.sleep(0.005)


def files(tmp_path) -> list[Path]:
    return sorted((tmp_path / FOLDER).glob("*.run"))


def test_a_prompt_that_is_nobody_elses_leaves_nothing(start, tmp_path):
    """Neither in memory nor on disk, with many choices neither."""
    engine, prompt = start(), prompt_of(403)
    for sampling in (GREEDY, SamplingParams(temperature=1.0, max_tokens=20, n=3, seed=1)):
        assert collect(submit(engine, prompt, salt=None, sampling=sampling)[1])[1] == 0
    settle(engine)
    assert files(tmp_path) == []
    assert len(engine.cache.prefix) == 0
    assert ask(engine, prompt)[1] == 0


POLICIES = [
    {"scheme": name} for name in registry.names() if not registry.load(name).calibrated and name != "composed"
] + [{"scheme": "composed", "prefill": "dense", "decode": "quest"}]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["scheme"])
def test_the_next_engine_answers_from_disk_as_the_first_did(start, tmp_path, policy):
    prompt = prompt_of(403)
    engine = start(max_batch_tokens=64)
    tile = engine.build_scheme(policy).for_phase(Phase.PREFILL).tile
    cold = ask(engine, prompt, policy)
    assert cold[1] == 0
    assert ask(engine, prompt, policy)[0] == cold[0]
    tokens, cached = ask(start(max_batch_tokens=64), prompt, policy)
    assert tokens == cold[0]
    assert 400 - max(tile, PAGE) <= cached <= 400
    assert start().documents.counts()["disk_files"] == len(files(tmp_path)) == 1


def test_a_longer_prompt_begins_with_the_kept_one(start, tmp_path):
    prompt = prompt_of(400)
    ask(start(), prompt[:300])
    engine = start()
    warm = ask(engine, prompt)
    assert warm[1] == 288
    settle(engine)
    assert len(files(tmp_path)) == 2
    assert ask(start(), prompt) == (warm[0], 384)


def test_what_is_not_of_this_request_is_not_used(start, model_dir, tmp_path_factory, monkeypatch):
    prompt = prompt_of(200)
    policy = {"scheme": "streaming", "budget_tokens": 64}
    cold = ask(start(), prompt, policy, salt="a")
    engine = start()
    assert ask(engine, prompt, policy, salt="b")[1] == 0, "salt"
    assert ask(engine, prompt, None, salt="a")[1] == 0, "scheme"
    assert ask(engine, prompt, {**policy, "budget_tokens": 65}, salt="a")[1] == 0, "option"
    assert ask(engine, [7, *prompt[1:]], policy, salt="a")[1] == 0, "tokens"
    assert ask(start(page_size=32), prompt, policy, salt="a")[1] == 0, "page size"
    assert ask(start(dtype="bfloat16"), prompt, policy, salt="a")[1] == 0, "element type"
    other = tmp_path_factory.mktemp("other")
    for path in Path(model_dir).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(other / "model.safetensors")
    name = next(name for name in sorted(weights) if "down_proj" in name)
    weights[name][-1, -1] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert ask(start(str(other)), prompt, policy, salt="a")[1] == 0, "one weight"
    with monkeypatch.context() as patch:
        patch.setattr(document_identity, "__version__", "0.0.0")
        assert ask(start(), prompt, policy, salt="a")[1] == 0, "version"
    assert ask(start(), prompt, policy, salt="a") == (cold[0], 192)


@pytest.mark.parametrize("place", ["header", "first", "middle", "last"])
def test_a_damaged_file_costs_its_pages_and_no_answer(start, tmp_path, place):
    prompt = prompt_of(400)
    cold = ask(start(), prompt)
    engine = start()  # it knows of the file before the damage
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    begin = len(data) - 25 * PAGE_BYTES
    at = {"header": 200, "first": begin, "middle": begin + 12 * PAGE_BYTES, "last": begin + 24 * PAGE_BYTES - 1}[place]
    data[at] ^= 4
    path.write_bytes(data)
    tokens, cached = ask(engine, prompt)
    assert tokens == cold[0]
    assert cached == {"header": 0, "first": 0, "middle": 12 * PAGE, "last": 23 * PAGE}[place]
    assert engine.documents.counts()["disk_corrupt_files"] == 1
    assert ask(start(), prompt) == (cold[0], 24 * PAGE), "what was damaged is written anew"


def test_a_file_that_goes_while_the_server_runs_is_computed(start, tmp_path):
    prompt = prompt_of(300)
    cold = ask(start(), prompt)
    engine = start()
    for path in files(tmp_path):
        path.unlink()
    assert ask(engine, prompt) == (cold[0], 0)
    assert engine.documents.counts()["disk_corrupt_files"] == 0


def test_a_full_disk_fails_no_request(start, tmp_path, monkeypatch, caplog):
    engine = start()

    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        answers = [ask(engine, prompt_of(200, seed)) for seed in range(4)]
        settle(engine)
    assert all(len(tokens) == 8 for tokens, _ in answers)
    assert files(tmp_path) == []
    assert len([line for line in caplog.records if "cannot write" in line.message]) == 1


def test_a_directory_that_cannot_be_used_fails_no_request(start, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    engine = start(cache_dir=str(tmp_path / "file"))
    assert len(ask(engine, prompt_of(200))[0]) == 8
    assert ask(engine, prompt_of(200))[1] == 192, "memory is as it was"
    assert len([line for line in caplog.records if "no pages are kept" in line.message]) == 1


def test_a_disk_that_hangs_is_waited_for_only_so_long(start, monkeypatch, caplog):
    prompts = [prompt_of(300), prompt_of(300, 1)]
    first = start()
    cold = [ask(first, prompt) for prompt in prompts]
    engine = start()
    gate, reads = threading.Event(), []
    monkeypatch.setattr(document_loads, "STALL_SECONDS", 0.1)

    def hang(*arguments):
        reads.append(arguments)
        gate.wait(60)
        return []

    monkeypatch.setattr(PageStore, "read", hang)
    assert ask(engine, prompts[0]) == (cold[0][0], 0)
    assert "the disk gave nothing" in caplog.text
    asked = len(reads)
    assert asked > 0
    assert ask(engine, prompts[1]) == (cold[1][0], 0)
    assert len(reads) == asked, "it is not asked again at once"
    gate.set()


@pytest.fixture
def held_reads(monkeypatch):
    """``(reading, gate)``: set when a file was read, and what its pages wait for then."""
    reading, gate, real = threading.Event(), threading.Event(), PageStore.read

    def slow(*arguments):
        pages = real(*arguments)
        reading.set()
        assert gate.wait(60)
        return pages

    monkeypatch.setattr(PageStore, "read", slow)
    return reading, gate


def test_a_request_that_goes_while_its_pages_come_leaves_nothing(start, held_reads):
    prompt = prompt_of(300)
    cold = ask(start(), prompt)
    engine, (reading, gate) = start(), held_reads
    request_id, events = submit(engine, prompt)
    assert reading.wait(60)
    assert engine.snapshot().waiting == 1
    others = ask(engine, prompt_of(100, 5))
    assert len(others[0]) == 8, "requests that need nothing from disk go on meanwhile"
    engine.abort(request_id)
    assert isinstance(collect(events)[0], Exception)
    assert engine.snapshot().waiting == 0
    gate.set()
    assert ask(engine, prompt) == (cold[0], 288)


def test_many_requests_for_one_document_read_it_once(start):
    prompt = prompt_of(400)
    cold = ask(start(), prompt)
    engine = start(max_running=3)
    waiting = [submit(engine, prompt)[1] for _ in range(12)]
    assert [collect(events) for events in waiting] == [(cold[0], 384)] * 12
    assert engine.documents.counts()["disk_hit_tokens"] == 384


def test_documents_far_beyond_the_pool(start):
    prompts = [prompt_of(300, seed) for seed in range(12)]
    engine = start(kv_cache_gib=0.0002)  # 26 pages: one document at a time
    assert 19 <= engine.cache.allocator.num_pages < 38
    cold = []
    for prompt in prompts:  # pages that are evicted before they were copied are not kept
        cold.append(ask(engine, prompt)[0])
        settle(engine)
    engine = start(kv_cache_gib=0.0002)
    waiting = [submit(engine, prompt)[1] for prompt in prompts * 2]
    warm = [collect(events) for events in waiting]
    assert [tokens for tokens, _ in warm] == cold * 2
    assert sum(cached for _, cached in warm) > 12 * 288 / 2


def test_more_prompts_at_once_than_can_be_copied_at_once(start, monkeypatch, tmp_path):
    prompts = [prompt_of(200, seed) for seed in range(20)]
    monkeypatch.setattr("foveate.server.document_saves.BUFFER_BYTES", 1)
    monkeypatch.setattr("foveate.server.document_saves.RUN_BYTES", 20_000)
    engine = start()
    waiting = [submit(engine, prompt)[1] for prompt in prompts]
    cold = [collect(events)[0] for events in waiting]
    settle(engine)
    assert len(files(tmp_path)) > 20
    engine = start()
    waiting = [submit(engine, prompt)[1] for prompt in prompts]
    assert [collect(events) for events in waiting] == [(tokens, 192) for tokens in cold]


def test_two_engines_on_one_directory(start):
    prompts = [prompt_of(300, seed) for seed in range(4)]
    one, two = start(), start(beside=True)
    cold = [ask(one, prompt)[0] for prompt in prompts]
    settle(one)
    two.documents._store.refresh()  # as it does every few seconds
    assert [ask(two, prompt) for prompt in prompts] == [(tokens, 288) for tokens in cold]
    one.documents.delete(None)
    assert [ask(two, prompt)[0] for prompt in prompts] == cold


def test_the_bound_is_kept(start, tmp_path):
    engine = start(cache_disk_gib=300_000 / 2**30)
    for seed in range(8):
        ask(engine, prompt_of(300, seed))
        settle(engine)
    assert 0 < sum(path.stat().st_size for path in files(tmp_path)) <= 300_000
    assert engine.documents.counts()["disk_evicted_files"] > 0
    assert ask(start(cache_disk_gib=300_000 / 2**30), prompt_of(300, 7))[1] == 288


def test_of_a_document_larger_than_the_bound_the_beginning_is_kept(start, monkeypatch):
    monkeypatch.setattr("foveate.server.document_saves.BUFFER_BYTES", 1)
    monkeypatch.setattr("foveate.server.document_saves.RUN_BYTES", 1)  # a file per page
    bound = {"cache_disk_gib": 10 * (PAGE_BYTES + 2 * 4096) / 2**30}
    real, writes = PageStore.write, []

    def count(*arguments):
        writes.append(real(*arguments))
        return writes[-1]

    monkeypatch.setattr(PageStore, "write", count)
    prompt = prompt_of(403)
    engine = start(**bound)
    cold = ask(engine, prompt)
    settle(engine)
    kept = sum(writes)
    assert 10 <= kept <= 15
    assert writes == [True] * kept + [False], "what nobody would find is not even tried"
    assert engine.documents.counts()["disk_evicted_files"] == 0
    assert ask(start(**bound), prompt) == (cold[0], kept * PAGE)


def test_short_prompts_may_be_left_out(start, tmp_path):
    engine = start(cache_min_tokens=200)
    ask(engine, prompt_of(199))
    ask(engine, prompt_of(10))
    settle(engine)
    assert files(tmp_path) == []
    ask(engine, prompt_of(200))
    settle(engine)
    assert len(files(tmp_path)) == 1


def test_what_is_deleted_is_gone_from_disk_and_memory(start, tmp_path):
    engine = start()
    shared, other = prompt_of(400), prompt_of(200, 9)
    longer = [*shared[:320], *prompt_of(80, 3)]
    for prompt in (shared, longer, other):
        ask(engine, prompt)
        settle(engine)
    entries = {entry["tokens"]: entry for entry in engine.documents.describe(10)["data"]}
    assert sorted(entries) == [192, 400]
    newest = engine.documents.describe(1, engine.documents.describe(1)["data"][0]["id"])["data"][0]
    assert newest["tokens"] == 400
    engine.documents.delete(newest["id"])
    assert ask(engine, longer)[1] == 320, "only what it had for itself"
    with pytest.raises(KeyError):
        engine.documents.delete("0" * 32)
    settle(engine)
    assert len(engine.documents.delete(None)) == 3
    assert files(tmp_path) == []
    assert [ask(engine, prompt)[1] for prompt in (shared, other)] == [0, 0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first-first", "second-first"])
def test_of_two_questions_about_one_document_each_can_be_deleted(start, tmp_path, order):
    """The second goes on from the middle of the file that the first one wrote."""
    engine, document = start(), prompt_of(320)
    prompts = [[*document, *prompt_of(83, 1)], [*document, *prompt_of(99, 2)]]
    for prompt in prompts:
        ask(engine, prompt)
        settle(engine)
    ids = {entry["tokens"]: entry["id"] for entry in engine.documents.describe(10)["data"]}
    assert sorted(ids) == [400, 416]
    first, second = ([ids[400], ids[416]][index] for index in order)
    engine.documents.delete(first)
    assert [entry["id"] for entry in engine.documents.describe(10)["data"]] == [second]
    assert ask(engine, prompts[order[1]])[1] == (400, 416)[order[1]], "in memory"
    gone = pack_tokens(prompts[order[0]][320:336])
    assert all(gone not in path.read_bytes() for path in files(tmp_path))
    engine.documents.delete(second)
    assert files(tmp_path) == []
    assert engine.documents.describe(10)["data"] == []
    assert [ask(engine, prompt)[1] for prompt in prompts] == [0, 320]


def test_deleting_one_question_leaves_the_other_to_the_next_engine(start):
    engine, document = start(), prompt_of(320)
    one, two = [*document, *prompt_of(83, 1)], [*document, *prompt_of(99, 2)]
    ask(engine, one)
    settle(engine)
    answer = ask(engine, two)[0]
    settle(engine)
    (found,) = [item for item in engine.documents._store.documents() if item.tokens == 400]
    keys = page_keys(one, found.runs[0].header.namespace, PAGE)
    engine.documents.delete(found.id)
    assert [engine.cache.prefix.page_of(key) is not None for key in keys] == [True] * 20 + [False] * 5
    engine = start()
    assert ask(engine, two) == (answer, 416)
    assert engine.documents.counts()["disk_corrupt_files"] == 0
    assert ask(start(), one)[1] == 320


def test_a_load_of_what_is_deleted_is_given_up(start, held_reads):
    prompt = prompt_of(300)
    cold = ask(start(), prompt)
    engine, (reading, gate) = start(), held_reads
    _, events = submit(engine, prompt)
    assert reading.wait(60)
    engine.documents.delete(None)
    gate.set()
    assert collect(events) == (cold[0], 0)


def test_what_is_brought_in_while_its_file_goes_is_not_found_afterwards(start, monkeypatch):
    prompt = prompt_of(400)
    ask(start(), prompt)
    engine = start()
    real, found = PageStore.remove, []

    def remove(store, names):
        found.append(ask(engine, prompt)[1])
        return real(store, names)

    with monkeypatch.context() as patch:
        patch.setattr(PageStore, "remove", remove)
        engine.documents.delete(None)
    assert found == [384]
    assert ask(engine, prompt)[1] == 0


def test_pages_with_bad_logits_are_not_kept(start, tmp_path, monkeypatch):
    engine = start()
    real = engine._stepper.runner.run

    def spoilt(chunks):
        result = real(chunks)
        return replace(result, logits=torch.full_like(result.logits, torch.nan))

    with monkeypatch.context() as patch:
        patch.setattr(engine._stepper.runner, "run", spoilt)
        assert isinstance(ask(engine, prompt_of(200))[0], Exception)
    settle(engine)
    assert files(tmp_path) == []
    cold = ask(engine, prompt_of(200))
    engine = start()
    with monkeypatch.context() as patch:
        real = engine._stepper.runner.run
        patch.setattr(engine._stepper.runner, "run", spoilt)
        assert isinstance(ask(engine, prompt_of(200))[0], Exception)
    engine.documents._saves.run_exclusively(lambda: None).result(60)
    assert files(tmp_path) == [], "pages that led to bad logits go from disk"
    assert ask(engine, prompt_of(200)) == (cold[0], 0)


def test_progress_tells_of_pages_from_disk(start):
    prompt = prompt_of(400)
    ask(start(), prompt)
    _, events = submit(start(), prompt)
    first = next(event for event in iter(lambda: events.get(timeout=60), None) if isinstance(event, Progress))
    assert (first.total, first.cached) == (400, 384)


def test_reuse_must_be_on(start):
    with pytest.raises(InvalidRequest, match="prefix reuse"):
        start(prefix_reuse=False)


def test_a_document_that_is_all_in_memory_is_in_use_too(start, tmp_path, monkeypatch):
    """Its file must not look as if nobody had asked for it: the bound would take it first."""
    engine, prompt = start(), prompt_of(400)
    ask(engine, prompt)
    settle(engine)
    (path,) = files(tmp_path)
    now = [time.monotonic() + 1000]
    monkeypatch.setattr(document_cache.time, "monotonic", lambda: now[0])
    for _ in range(2):  # and again after a while, not only the first time
        os.utime(path, (1, 1))
        now[0] += 2 * document_cache.TOUCH_SECONDS
        assert ask(engine, prompt)[1] == 384
        engine.documents._saves.run_exclusively(lambda: None).result(60)
        assert path.stat().st_mtime > 1


def test_of_a_prompt_with_a_page_that_is_not_finite_the_pages_before_it_are_kept(start, tmp_path, monkeypatch):
    engine, prompt = start(), prompt_of(400)
    real = PageBytes.copy_out
    seen = []

    def copy_out(layout, page, target):
        real(layout, page, target)
        seen.append(page)
        if len(seen) == 8:
            target[:4].copy_(torch.tensor([float("nan")]).view(torch.uint8))

    monkeypatch.setattr(PageBytes, "copy_out", copy_out)
    ask(engine, prompt)
    settle(engine)
    again = start()
    assert again.documents.counts()["disk_corrupt_files"] == 0
    assert ask(again, prompt)[1] == 7 * PAGE
