"""The scheduler alone: real block tables, no model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.server.request import SamplingParams
from foveate.server.scheduler import REREAD_TOKENS

from .scheduler_runs import make_scheduler, make_sequence, step


def test_long_prompts_go_in_chunks_of_the_step():
    scheduler = make_scheduler(room=32)
    scheduler.add(make_sequence(range(75), 0))
    assert [step(scheduler)[0].count for _ in range(4)] == [32, 32, 11, 1]


def test_decoding_comes_before_prompts():
    scheduler = make_scheduler(room=32)
    scheduler.add(make_sequence(range(10), 1))
    step(scheduler)
    scheduler.add(make_sequence(range(75), 0))  # older, but still a prompt
    assert [chunk.count for chunk in step(scheduler)] == [1, 31]
    assert [chunk.count for chunk in step(scheduler)] == [1, 31]


def test_who_passes_a_blocked_prompt_adds_up_to_no_more_than_it():
    scheduler = make_scheduler(pages=8, room=128)
    first = make_sequence(range(60), 0)
    scheduler.add(first)
    step(scheduler)
    big = make_sequence(range(100), 1)
    scheduler.add(big)
    step(scheduler)
    assert big.wait.is_blocked
    passed = []
    for arrival in range(2, 40):
        small = make_sequence(range(9), arrival)
        scheduler.add(small)
        step(scheduler)
        if small.table is None:
            break
        passed.append(small)
        scheduler.remove(small)
    assert len(passed) == 100 // 9
    scheduler.remove(first)
    assert {chunk.sequence for chunk in step(scheduler)} == {big, small}


def test_max_running_bounds_the_batch():
    scheduler = make_scheduler(running=2)
    for arrival in range(4):
        scheduler.add(make_sequence(range(3), arrival))
    assert len(step(scheduler)) == 2
    assert len(scheduler.waiting) == 2


def test_every_choice_of_a_request_takes_a_seat():
    scheduler = make_scheduler(running=4)
    first, second, third = (make_sequence(range(3), arrival, n=n) for arrival, n in enumerate((3, 2, 1)))
    for sequence in (first, second, third):
        scheduler.add(sequence)
    assert {chunk.sequence for chunk in step(scheduler)} == {first, third}  # it may pass what finds no seats
    assert scheduler.waiting == [second]
    assert {chunk.sequence for chunk in step(scheduler)} == {first, third, second}  # the first is an answer by now


@pytest.mark.parametrize("n", [2, 9], ids="n{}".format)
def test_who_passes_a_request_of_many_choices_adds_up_to_no_more_than_it(n):
    """There is always one seat or another for those who need one, never several."""
    scheduler = make_scheduler(running=4, room=64)
    running = [make_sequence(range(3), arrival) for arrival in range(4)]
    many = make_sequence(range(20), 4, n=n)
    for sequence in (*running, many):
        scheduler.add(sequence)
    step(scheduler)
    passed = 0
    for arrival in range(5, 40):
        scheduler.add(make_sequence(range(3), arrival))
        scheduler.remove(running.pop(0))
        came = [chunk.sequence for chunk in step(scheduler) if chunk.start == 0]
        if many in came:
            break
        running += came
        passed += len(came)
    assert many in came
    assert 0 < passed <= 20 // 3


def test_more_choices_than_seats_run_alone():
    scheduler = make_scheduler(running=4)
    many, one = make_sequence(range(3), 0, n=9), make_sequence(range(3), 1)
    scheduler.add(many)
    scheduler.add(one)
    assert [chunk.sequence for chunk in step(scheduler)] == [many]


def test_the_youngest_is_preempted_and_computed_again():
    scheduler = make_scheduler(pages=4, room=64)
    old, young = make_sequence(range(30), 0), make_sequence(range(100, 130), 1)
    scheduler.add(old)
    scheduler.add(young)
    while young.table is not None or not scheduler.preemptions:
        step(scheduler)
    assert old.table is not None
    assert scheduler.waiting == [young]
    assert young.num_computed == 0
    kept = list(young.tokens)
    scheduler.remove(old)
    chunk = step(scheduler)[0]
    assert chunk.sequence is young
    assert chunk.count == len(kept)


def test_a_shared_prefix_is_not_computed_twice():
    scheduler = make_scheduler(prefix=True, room=256)
    scheduler.add(make_sequence(range(100), 0))
    step(scheduler)
    again = make_sequence(range(100), 1)
    scheduler.add(again)
    assert [chunk.count for chunk in step(scheduler)] == [1, 100 - 96]
    assert again.group.cached_tokens == 96
    other = make_sequence(range(100), 2, namespace=b"another policy")
    scheduler.add(other)
    assert step(scheduler)[-1].count == 100


@pytest.mark.parametrize(
    ("pages", "document", "common", "own"),
    [(16, 192, 96, 25), (29, 400, 160, 9)],
    ids=["much-of-it-was-there", "little-of-it-was-there"],
)
def test_who_waits_comes_in_when_the_common_prefix_is_complete(pages, document, common, own):
    """It did not fit when it was asked; of the pages that it lacks beside those that it shares now there are enough."""
    scheduler = make_scheduler(pages=pages, room=32, prefix=True)
    first, second = make_sequence(range(document), 0), make_sequence([*range(common), *range(500, 500 + own)], 1)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    while first.num_generated == 0:
        step(scheduler)
        assert second.table is None
    assert (scheduler.cache.available, second.wait.is_blocked) == (4, True)
    step(scheduler)
    assert second.table is not None
    assert second.group.cached_tokens == common


def test_what_a_preempted_prompt_had_computed_itself_is_no_cached_token():
    scheduler = make_scheduler(pages=16, room=64, prefix=True)
    batch, urgent = make_sequence(range(200), 0, priority=5), make_sequence(range(300, 364), 1)
    scheduler.add(batch)
    step(scheduler)
    step(scheduler)
    scheduler.add(urgent)
    step(scheduler)
    assert scheduler.preemptions == 1
    scheduler.remove(urgent)
    step(scheduler)
    assert batch.table.num_cached > 0
    assert batch.group.cached_tokens == 0


@pytest.mark.parametrize("prefix", [False, True], ids=["no-reuse", "reuse"])
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    answers=st.integers(1, 30),
    pages=st.integers(8, 20),
    room=st.integers(1, 64),
)
@settings(max_examples=60)
def test_every_request_ends_and_no_page_is_left(prefix, lengths, answers, pages, room):
    scheduler = make_scheduler(pages=pages, room=room, running=4, prefix=prefix)
    sequences = [make_sequence(range(length), arrival) for arrival, length in enumerate(lengths)]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        chunks = step(scheduler)
        assert chunks, "work is waiting, but nothing is computed"
        assert sum(chunk.count for chunk in chunks) <= room
        for chunk in chunks:
            if chunk.sequence.num_generated >= answers:
                scheduler.remove(chunk.sequence)
    assert not scheduler.has_work
    assert all(sequence.num_generated == answers for sequence in sequences)
    assert scheduler.cache.num_pages_in_use == 0


def test_prompts_are_cut_between_tiles_where_that_leaves_any():
    scheduler = make_scheduler(room=40, prefix=True)
    scheduler.add(make_sequence(range(100), 0.0, tile=32))
    assert [(chunk.start, chunk.count) for _ in range(4) for chunk in step(scheduler)] == [
        (0, 32), (32, 32), (64, 36), (100, 1),
    ]  # fmt: skip
    tight = make_scheduler(room=20)
    tight.add(make_sequence(range(100), 0.0, tile=32))
    assert [(chunk.start, chunk.count) for _ in range(3) for chunk in step(tight)] == [(0, 20), (20, 12), (32, 20)]


def test_a_cached_prefix_ends_between_tiles():
    scheduler = make_scheduler(room=100, prefix=True)
    for arrival in (0.0, 1.0):
        sequence = make_sequence(range(60), arrival, tile=32)
        scheduler.add(sequence)
        chunks = step(scheduler)
        scheduler.remove(sequence)
    assert [(chunk.start, chunk.count) for chunk in chunks] == [(32, 28)]


@pytest.mark.parametrize("done", [0, 1, 15, 16, 31, 38])
def test_the_position_whose_logits_are_wanted_next_is_never_taken_from_the_cache(done):
    sequence = make_sequence(range(40), 0)
    sequence.group.request.sampling = SamplingParams(prompt_logprobs=0)
    sequence.group.num_scored = done
    reused = len(sequence.reusable_tokens) - 1  # ``open`` leaves the last one out
    assert reused == done


def test_all_may_come_from_the_cache_once_all_is_scored():
    sequence = make_sequence(range(40), 0)
    sequence.group.request.sampling = SamplingParams(prompt_logprobs=0)
    sequence.group.num_scored = 39
    sequence.tokens += [7, 8]
    assert sequence.reusable_tokens == sequence.tokens


def test_a_long_answer_is_read_again_a_few_tokens_at_a_time():
    scheduler = make_scheduler(pages=64, room=512)
    sequence = make_sequence(range(40), 0)
    sequence.tokens += [7] * 200
    scheduler.add(sequence)
    chunks = []
    while sequence.num_remaining > 1 or not chunks:
        chunks += [(chunk.start, chunk.count) for chunk in step(scheduler)]
    assert chunks[0] == (0, 40), "the prompt alone"
    assert all(count <= REREAD_TOKENS for _, count in chunks[1:])
    assert sum(count for _, count in chunks) >= 240


def test_who_waits_for_pages_needs_fewer_once_the_common_document_is_in():
    """A second question is let in beside the answer to the first, though the whole of it would never fit."""
    scheduler = make_scheduler(pages=24, room=64, prefix=True)
    document = list(range(256))  # 16 pages
    first, second = (make_sequence([*document, 1000 + index], index) for index in range(2))
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    for _ in range(8):
        step(scheduler)
    assert first.num_generated > 1
    assert second.num_generated > 0


@pytest.mark.parametrize("waited", [0, 1], ids="waited{}".format)
def test_who_waits_is_as_short_as_the_document_that_came_in_makes_it(waited):
    """Steps take turns between the oldest and the shortest: after one of the two waits it is the latter's."""
    scheduler = make_scheduler(pages=64, room=32, running=1, prefix=True)
    first, second, other = (
        make_sequence(tokens, arrival)
        for arrival, tokens in enumerate((range(192), [*range(192), *range(500, 508)], range(600, 700)))
    )
    scheduler.add(first)
    step(scheduler)
    for sequence in (second, other):
        scheduler.add(sequence)
    while first.num_generated <= waited:
        step(scheduler)
    scheduler.remove(first)
    assert [(chunk.sequence, chunk.count) for chunk in step(scheduler)] == [(second, 8)]
