"""The tasks of ``foveate eval``: made from a seed, of the length asked, with the facts where they belong."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from foveate.server.evaluation.document import Planted, compose
from foveate.server.evaluation.filler import sentences
from foveate.server.evaluation.tasks import TASKS, Depths, Prompt, Turn

WRITTEN = [name for name, task in TASKS.items() if task.write]


DEPTHS = {Depths.NONE: (), Depths.EACH: (0.5,), Depths.ALL: (0.1, 0.35, 0.65, 0.9)}


def make(tokenizer, name, length=4096, depths=None, seed=0):
    depths = DEPTHS[TASKS[name].depths] if depths is None else depths
    return TASKS[name].write(random.Random(seed), tokenizer.encode, length, depths)


def total(tokenizer, prompt):
    """Tokens of document, questions and answers."""
    later = [turn.text.format(before.answer) for before, turn in pairwise(prompt.turns)]
    asked = sum(len(tokenizer.encode(text)) for text in [prompt.text, *later])
    return asked + sum(turn.tokens for turn in prompt.turns)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_prompt_is_made_by_its_seed_alone(tokenizer, name):
    assert make(tokenizer, name, seed=3) == make(tokenizer, name, seed=3)
    assert make(tokenizer, name, seed=3) != make(tokenizer, name, seed=4)


@pytest.mark.parametrize("length", [2048, 4096, 10_000])
@pytest.mark.parametrize("name", WRITTEN)
def test_prompt_and_answers_are_as_long_as_asked(tokenizer, name, length):
    for seed in range(3):
        assert 0.98 * length <= total(tokenizer, make(tokenizer, name, length, seed=seed)) <= length


def words(text):
    """About a token per word, behind the token that every text begins with."""
    return ["<s>", *re.findall(r" ?\w+|\W", text)]


def marked_words(text):
    """As Llama's first tokenizer has it: a space before every text, which is a token where there is one already."""
    return words(f" {text}") if text else ["<s>"]


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("encode", [words, marked_words])
@pytest.mark.parametrize("name", WRITTEN)
def test_tokens_that_every_text_begins_with_count_once(name, encode, length):
    prompt = TASKS[name].write(random.Random(0), encode, length, DEPTHS[TASKS[name].depths])
    later = [turn.text.format(before.answer) for before, turn in pairwise(prompt.turns)]
    asked = len(encode(prompt.text)) + sum(len(encode(text)) - 1 for text in later)
    assert length - 30 <= asked + sum(turn.tokens for turn in prompt.turns) <= length
    assert all(turn.tokens <= len(encode(turn.answer)) + 4 for turn in prompt.turns)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", [name for name in WRITTEN if TASKS[name].depths is Depths.EACH])
def test_the_fact_stands_at_its_depth(tokenizer, name, depth):
    prompt = make(tokenizer, name, 10_000, (depth,))
    [turn] = prompt.turns
    assert turn.depth == depth
    assert stands(tokenizer, prompt, turn) == pytest.approx(depth, abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_facts_stand_at_each_depth_and_are_asked_for_in_any_order(tokenizer, seed):
    depths = (0.0, 0.1, 0.37, 0.5, 0.9, 1.0)
    prompt = make(tokenizer, "multiquery", 20_000, depths, seed)
    asked = [turn.depth for turn in prompt.turns]
    assert sorted(asked) == sorted(depths)
    assert asked != sorted(depths), "these seeds"
    for turn in prompt.turns:
        assert stands(tokenizer, prompt, turn) == pytest.approx(turn.depth, abs=0.03)


def stands(tokenizer, prompt, turn):
    """Where the fact that a turn asks for is in the document, 0 to 1."""
    document = prompt.text.removesuffix(prompt.turns[0].text)
    fact = turn.text.removeprefix("\n\nReminder. ") + f" {turn.answer}."
    assert document.count(fact) == 1
    around = len(tokenizer.encode(document)) - len(tokenizer.encode(fact))
    return len(tokenizer.encode(document[: document.index(fact)])) / around


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", WRITTEN)
def test_every_answer_is_in_the_document_once_and_nowhere_else(tokenizer, name, seed):
    prompt = make(tokenizer, name, seed=seed)
    document = prompt.text.removesuffix(prompt.turns[0].text)
    for number, turn in enumerate(prompt.turns):
        subject = prompt.turns[number - 1].answer if number else ""
        fact = turn.text.format(subject).removeprefix("\n\nReminder. ") + f" {turn.answer}."
        assert document.count(fact) == 1
    assert prompt.turns[-1].answer not in document.replace(fact, "")
    assert not any(turn.found(prompt.turns[0].text) for turn in prompt.turns)


def test_keys_and_codes_of_a_prompt_differ(tokenizer):
    for seed in range(20):
        turns = make(tokenizer, "multiquery", seed=seed).turns
        assert len({turn.answer for turn in turns}) == len({turn.text for turn in turns}) == 4


def test_filler_holds_nothing_that_is_asked_for(tokenizer):
    stream = sentences(random.Random(0))
    text = " ".join(next(stream) for _ in range(2000))
    assert not any(character.isdigit() for character in text)
    answers = {turn.answer for name in WRITTEN for seed in range(10) for turn in make(tokenizer, name, seed=seed).turns}
    assert not any(Turn("", answer, 1).found(text) for answer in answers)


def test_facts_at_the_same_place_keep_their_order(tokenizer):
    planted = [Planted(0.5, "First."), Planted(0.5, "Second."), Planted(0.2, "Before.")]
    text = compose(random.Random(0), tokenizer.encode, 1000, planted, "Head. ", " Tail")
    assert text.startswith("Head. ")
    assert text.endswith(" Tail")
    assert text.index("Before.") < text.index("First.") < text.index("Second.")


def test_too_short_a_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no room"):
        make(tokenizer, "multiquery", 200)


def test_more_facts_than_there_are_places_are_refused(tokenizer):
    with pytest.raises(ValueError, match="36 facts in a document are too many: there are 35"):
        make(tokenizer, "multiquery", 10_000, [0.5] * 36)


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (["123", "45"], 1.0),
        (["It is 123.", "no"], 0.5),
        (["1234", "a45"], 0.0),
        (["0123", "45th"], 0.0),
        (["123"], 0.5),
        ([], 0.0),
    ],
    ids=["bare", "in-a-sentence", "longer", "part-of-a-word", "not-reached", "nothing"],
)
def test_score_is_the_share_of_answers_contained(said, score):
    assert Prompt("", (Turn("", "123", 5), Turn("", "45", 5))).score(said) == score


@pytest.mark.parametrize(
    ("said", "score"), [(["a", "b", "c"], 1), (["a", "x", "c"], 1 / 3), (["x", "b", "c"], 0), (["a"], 1 / 3)], ids=str
)
def test_a_chain_ends_at_its_first_wrong_link(said, score):
    turns = Turn("", "a", 5), Turn("The {} is", "b", 5), Turn("The {} has", "c", 5)
    assert Prompt("", turns).score(said) == pytest.approx(score)
