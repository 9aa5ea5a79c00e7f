"""Who is served when: turns between short and old prompts, priority, steps of bounded time. No model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.server.loader import load
from foveate.server.options import EngineOptions
from foveate.server.pace import Pace, context_of_equal_cost
from foveate.server.scheduler import LEAST_TOKENS

from .scheduler_runs import Unhurried, make_scheduler, make_sequence, step


def steps_until(scheduler, condition, most=5000):
    """Steps until ``condition`` holds."""
    for number in range(most):
        if condition():
            return number
        step(scheduler)
    raise AssertionError("it did not happen")


def has_drawn(sequence):
    return lambda: sequence.num_generated > 0


def test_a_short_prompt_passes_a_long_one_within_two_steps():
    scheduler = make_scheduler(pages=1000, room=32)
    long = make_sequence(range(8000), 0)
    scheduler.add(long)
    for _ in range(5):
        step(scheduler)
    short = make_sequence(range(30), 1)
    scheduler.add(short)
    assert steps_until(scheduler, has_drawn(short)) <= 2


class Hurried(Unhurried):
    """A pace by which 40 tokens of prompt take as long as a step may."""

    room = 40


@pytest.mark.parametrize(("priority", "most"), [(0, 40), (-1, 40), (1, 512)], ids=["equal", "sooner", "later"])
def test_a_long_prompt_holds_back_while_a_short_one_waits(priority, most):
    scheduler = make_scheduler(pages=1000, room=512, pace=Hurried())
    long, short = make_sequence(range(8000), 0), make_sequence(range(30), 1, priority=priority)
    scheduler.add(long)
    assert [chunk.count for chunk in step(scheduler)] == [512]
    scheduler.add(short)
    counts = []
    for _ in range(2):
        counts += [chunk.count for chunk in step(scheduler) if chunk.sequence is long]
    assert counts
    assert max(counts) == most
    assert bool(short.num_generated) == (priority <= 0)


def test_a_prompt_that_fits_into_a_step_is_not_cut_for_its_own_sake():
    scheduler = make_scheduler(pages=1000, room=512, pace=Hurried())
    scheduler.add(make_sequence(range(8000), 0))
    step(scheduler)
    short = make_sequence(range(400), 1)
    scheduler.add(short)
    assert steps_until(scheduler, has_drawn(short)) <= 2


def test_a_long_prompt_holds_back_for_nobody_behind_another():
    scheduler = make_scheduler(pages=2000, room=512, pace=Hurried())
    long = make_sequence(range(8000), 0)
    for sequence in (long, make_sequence(range(8000), 1, priority=5), make_sequence(range(30), 2, priority=3)):
        scheduler.add(sequence)
    assert [step(scheduler)[0].count for _ in range(4)] == [512] * 4


def test_a_long_prompt_holds_back_for_nobody_without_a_seat():
    scheduler = make_scheduler(pages=1000, room=512, running=1, pace=Hurried())
    long = make_sequence(range(8000), 0)
    scheduler.add(long)
    step(scheduler)
    scheduler.add(make_sequence(range(30), 1))
    assert [chunk.count for _ in range(4) for chunk in step(scheduler)] == [512] * 4


def test_a_long_prompt_holds_back_for_nobody_who_cannot_come_in():
    scheduler = make_scheduler(pages=64, room=128, pace=Hurried())
    scheduler.add(make_sequence(range(1000), 0))
    step(scheduler)
    waiting = make_sequence(range(100), 1)
    scheduler.add(waiting)
    steps_until(scheduler, lambda: waiting.wait.is_blocked)
    assert [chunk.count for chunk in step(scheduler)] == [128]


def test_the_oldest_prompt_gets_half_of_the_room_whatever_comes():
    scheduler = make_scheduler(pages=1000, room=32, running=64)
    long = make_sequence(range(3200), 0)
    scheduler.add(long)
    arrival = 0
    while not long.num_generated:
        arrival += 1
        assert arrival <= 201, "an endless stream of short prompts starves the long one"
        short = make_sequence(range(32), arrival)
        scheduler.add(short)
        for chunk in step(scheduler):
            if chunk.sequence is not long and chunk.sequence.num_generated:
                scheduler.remove(chunk.sequence)


def test_requests_with_a_common_document_wait_for_the_first_to_compute_it():
    scheduler = make_scheduler(pages=1000, room=64, prefix=True)
    document = list(range(1000))
    sequences = [make_sequence([*document, 2000 + index], index) for index in range(8)]
    for sequence in sequences:
        scheduler.add(sequence)
    computed = 0
    while not all(sequence.num_generated for sequence in sequences):
        computed += sum(chunk.count for chunk in step(scheduler) if chunk.count > 1)
    assert computed < 1000 + 8 * (16 + 64)


def test_a_prompt_that_is_in_the_cache_counts_as_short():
    scheduler = make_scheduler(pages=1000, room=64, prefix=True)
    first = make_sequence(range(2000), 0)
    scheduler.add(first)
    steps_until(scheduler, has_drawn(first))
    scheduler.remove(first)
    cold, warm = make_sequence(range(3000, 7000), 1), make_sequence(range(2000), 2)
    scheduler.add(cold)
    step(scheduler)
    scheduler.add(warm)
    assert steps_until(scheduler, has_drawn(warm)) <= 2


class TestPriority:
    def test_smaller_goes_first_whatever_its_age_and_length(self):
        scheduler = make_scheduler(pages=1000, room=32)
        old = make_sequence(range(100), 0)
        urgent = make_sequence(range(1000), 1, priority=-1)
        scheduler.add(old)
        scheduler.add(urgent)
        steps_until(scheduler, has_drawn(urgent))
        assert old.num_computed < 32, "beside the rest of one step it got nothing"

    def test_a_waiting_request_takes_the_pages_of_a_worse_one(self):
        scheduler = make_scheduler(pages=8, room=64, running=4)
        idle = make_sequence(range(120), 0, priority=5)
        scheduler.add(idle)
        step(scheduler)
        urgent = make_sequence(range(60), 1, priority=1)
        scheduler.add(urgent)
        step(scheduler)
        assert urgent.table is not None
        assert scheduler.waiting == [idle]

    def test_a_waiting_request_takes_the_seat_of_a_worse_one(self):
        scheduler = make_scheduler(pages=64, running=2)
        sequences = [make_sequence(range(10), arrival, priority=3) for arrival in range(2)]
        for sequence in sequences:
            scheduler.add(sequence)
        step(scheduler)
        urgent = make_sequence(range(10), 9)
        scheduler.add(urgent)
        step(scheduler)
        assert scheduler.running == [urgent, sequences[0]]

    def test_nobody_is_preempted_where_that_would_not_be_enough(self):
        scheduler = make_scheduler(pages=8, room=128, running=4)
        sequences = [make_sequence(range(60), 0), make_sequence(range(30), 1, priority=5)]
        for sequence in sequences:
            scheduler.add(sequence)
        step(scheduler)
        scheduler.add(make_sequence(range(100), 2, priority=1))
        step(scheduler)
        assert scheduler.running == sequences
        assert scheduler.preemptions == 0

    def test_equal_priorities_never_preempt_to_come_in(self):
        scheduler = make_scheduler(pages=8, room=128, running=2)
        scheduler.add(make_sequence(range(100), 5))
        step(scheduler)
        scheduler.add(make_sequence(range(100), 0))
        step(scheduler)
        assert scheduler.preemptions == 0


REQUEST = st.tuples(
    st.integers(1, 110),  # prompt
    st.integers(1, 12),  # answer
    st.integers(0, 60),  # step of arrival
    st.integers(-1, 1),  # priority
    st.sampled_from([1, 32]),  # tile
)


@given(
    requests=st.lists(REQUEST, min_size=1, max_size=14),
    pages=st.integers(8, 24),
    room=st.integers(1, 64),
    running=st.integers(1, 5),
    prefix=st.booleans(),
    pace_room=st.sampled_from([0.0, 5.0, 40.0, float("inf")]),
    seed=st.integers(0, 3),
)
@settings(max_examples=150)
def test_every_request_ends_in_bounded_time(requests, pages, room, running, prefix, pace_room, seed):
    """Whatever arrives whenever: all end, no page stays in use, and the queue stays in order."""

    class Fixed(Pace):
        room = pace_room

    scheduler = make_scheduler(pages, room, running, prefix, Fixed(1.0, 100.0))
    coming = sorted(requests, key=lambda request: request[2])
    answers, ended, number = {}, 0, 0
    work = sum(prompt + answer for prompt, answer, *_ in requests)
    # A step computes a token at least, and a preemption costs at most what was computed so far.
    most = 60 + 40 * work
    while coming or scheduler.has_work:
        while coming and coming[0][2] <= number:
            prompt, answer, arrival, priority, tile = coming.pop(0)
            sequence = make_sequence(
                range(seed * len(coming), seed * len(coming) + prompt), arrival, tile=tile, priority=priority
            )
            answers[id(sequence)] = answer
            scheduler.add(sequence)
        had_work = scheduler.has_work
        chunks = step(scheduler)
        assert chunks or not had_work, "work was left lying"
        assert sum(chunk.count for chunk in chunks) <= room
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda item: item.order)
        assert scheduler.running == sorted(scheduler.running, key=lambda item: item.order)
        assert len(scheduler.running) <= running
        for chunk in chunks:
            if chunk.sequence.num_generated >= answers[id(chunk.sequence)]:
                scheduler.remove(chunk.sequence)
                ended += 1
        number += 1
        assert number < most
    assert ended == len(requests)
    assert scheduler.cache.num_pages_in_use == 0


@given(
    shorts=st.lists(st.integers(2, 64), min_size=1, max_size=6),
    length=st.integers(100, 800),
    room=st.integers(8, 64),
)
@settings(max_examples=60)
def test_waiting_is_bounded_for_the_long_and_for_the_short(shorts, length, room):
    """One long prompt among an endless stream of short ones.

    Every other step goes to the oldest, so nobody waits for more than twice the work that was there
    before it. A last token that is left of a cut prompt counts as an answer: it takes a place at once.
    """
    scheduler = make_scheduler(pages=400, room=room, running=300)
    steps_for = {}  # sequence -> (step of its arrival, most steps)
    living, number = [], 0

    def arrive(prompt):
        sequence = make_sequence(range(prompt), number)
        living.append(sequence)
        work = sum(item.num_remaining for item in living)
        steps_for[sequence] = number, 2 * -(-work // (room - 2)) + 2
        scheduler.add(sequence)
        return sequence

    long = arrive(length)
    while not long.num_generated:
        # As many tokens as fit beside the long one: more than that no scheduler could serve.
        if sum(item.num_remaining for item in scheduler.waiting) < room // 2:
            arrive(shorts[number % len(shorts)])
        step(scheduler)
        number += 1
        for sequence in list(living):
            arrived, most = steps_for[sequence]
            if sequence.num_generated:
                living.remove(sequence)
                scheduler.remove(sequence)
            assert number - arrived <= most


class TestPace:
    """A machine whose step costs ``fixed + token * (1 + start / equal)`` seconds."""

    def run(self, pace, *, fixed, token, equal, context=0, tokens=None, rows=1, steps=30):
        """Seconds of each of ``steps`` steps in which a prompt goes on beside an answer."""
        scheduler = make_scheduler(pages=10_000, room=512, running=64, pace=pace)
        for arrival in range(rows):
            scheduler.add(make_sequence([1], arrival))
        step(scheduler)
        long = make_sequence(range(150_000), rows)
        scheduler.add(long)
        seconds = []
        for _ in range(steps):
            chunks = step(scheduler)
            cost = fixed
            for chunk in chunks:
                if chunk.count > 1:
                    cost += token * chunk.count * (1 + (chunk.start + chunk.count / 2) / equal)
            pace.observe(chunks, cost)
            seconds.append(cost)
        return seconds, long

    @pytest.mark.parametrize("fixed", [0.0, 0.02, 0.08], ids="fixed-{}".format)
    @pytest.mark.parametrize("token", [1e-5, 6e-4, 5e-3], ids="token-{}".format)
    @pytest.mark.parametrize("equal", [300, 3000, 30_000], ids="equal-{}".format)
    def test_steps_come_to_the_asked_time(self, fixed, token, equal):
        """Also where the pace was told that attention costs ten times less or more than it does."""
        seconds, long = self.run(Pace(0.25, 3000), fixed=fixed, token=token, equal=equal, steps=60)
        assert max(seconds[10:]) <= 0.25 * 1.35 or max(seconds[10:]) <= fixed + 1.4 * LEAST_TOKENS * token * (
            1 + long.num_computed / equal
        )
        if max(seconds[10:]) < 0.25 * 0.8:
            assert 512 * token * (1 + long.num_computed / equal) < 0.25, "there was time for larger chunks"

    def test_chunks_shrink_as_the_context_grows(self):
        scheduler = make_scheduler(pages=10_000, room=512, pace=(pace := Pace(0.25, 3000)))
        scheduler.add(make_sequence([1], 0))
        step(scheduler)
        scheduler.add(make_sequence(range(100_000), 1))
        counts = []
        while not counts or sum(counts) < 30_000:
            chunks = step(scheduler)
            *_, chunk = chunks
            counts.append(chunk.count)
            pace.observe(chunks, 0.03 + 6e-4 * chunk.count * (1 + (chunk.start + chunk.count / 2) / 3000))
        assert counts[20] > 4 * counts[-1] > 0

    def test_answers_that_take_long_leave_prompts_half_of_the_time(self):
        pace = Pace(0.25, 3000)
        scheduler = make_scheduler(pages=10_000, room=512, pace=pace)
        scheduler.add(make_sequence([1], 0))
        for _ in range(5):
            pace.observe(step(scheduler), 1.0)
        scheduler.add(make_sequence(range(100_000), 1))
        for _ in range(20):
            chunks = step(scheduler)
            count = chunks[-1].count
            pace.observe(chunks, 1.0 + 4e-3 * count * (1 + (chunks[-1].start + count / 2) / 3000))
        assert 100 < count < 260

    def test_prompts_alone_are_not_bounded(self):
        pace = Pace(0.001, 3000)
        scheduler = make_scheduler(pages=1000, room=512, pace=pace)
        scheduler.add(make_sequence(range(5000), 0))
        for _ in range(4):
            chunks = step(scheduler)
            pace.observe(chunks, 1.0)
            assert [chunk.count for chunk in chunks] == [512]

    def test_a_tile_is_not_cut_by_the_pace(self):
        pace = Pace(0.001, 3000)
        scheduler = make_scheduler(pages=1000, room=512, pace=pace)
        scheduler.add(make_sequence([1], 0))
        step(scheduler)
        scheduler.add(make_sequence(range(1000), 1, tile=128))
        for number in range(4):
            chunks = step(scheduler)
            pace.observe(chunks, 1.0)
            assert (chunks[-1].start, chunks[-1].count) == (128 * number, 128)

    def test_the_rate_of_prompt_tokens_forgets(self):
        pace = Pace(0.25, 3000)
        assert pace.tokens_per_second == 0
        scheduler = make_scheduler(pages=1000, room=100, pace=pace)
        scheduler.add(make_sequence(range(1000), 0))
        for _ in range(10):
            pace.observe(step(scheduler), 0.5)
        assert pace.tokens_per_second == pytest.approx(200, rel=0.02)
        for _ in range(200):
            pace.observe(step(scheduler), 1.0)
        assert pace.tokens_per_second < 5

    @pytest.mark.parametrize("quantization", ["none", "int8"])
    def test_a_token_costs_what_its_linear_layers_multiply(self, model_dir, quantization):
        """Also where the weights are packed or quantised, and no parameters any more."""
        loaded = load(EngineOptions(model_dir, dtype="bfloat16", quantization=quantization))
        attention, mlp = 64 * (2 * 64 + 2 * 32), 3 * 64 * 96
        assert context_of_equal_cost(loaded) == pytest.approx((attention + mlp) / (2 * 4 * 16))
        loaded.attached.detach()
