"""Constrained answers of a tiny random model: they satisfy their grammar, whatever else a request asks for."""

from __future__ import annotations

import json
import queue
import re
import uuid
from dataclasses import replace
from functools import partial

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.server.engine import Engine
from foveate.server.exceptions import NoTokenLeft
from foveate.server.grammar.matcher import GrammarState
from foveate.server.grammar.source import choice_source, grammar_source, json_source, regex_source
from foveate.server.grammar.store import Grammars
from foveate.server.llm import LLM
from foveate.server.options import EngineOptions
from foveate.server.request import Delta, Failed, Finished, GenerationRequest, SamplingParams

PROMPT = "Once upon a time"
SMALL_GIB = 0.0005
# A random model likes blanks as much as anything else: without this, answers would seldom end within the context.
NO_BLANKS = {}


def make(model_dir, **options):
    options = {"dtype": "float32", "page_size": 16, "kv_cache_gib": 0.02, **options}
    return LLM.over(Engine.load(EngineOptions(model_dir, **options)))


@pytest.fixture(scope="module")
def llm(model_dir):
    with make(model_dir) as llm:
        for text in (" ", "\n"):
            NO_BLANKS[llm.engine.tokenizer.encode(text)[0]] = -100.0
        yield llm


@pytest.fixture(scope="module")
def compiled(llm):
    grammars = Grammars(llm.engine.tokenizer, llm.engine.vocab_size)
    yield grammars.compile_now
    grammars.close()


def run(llm, grammar, prompts=(PROMPT,), **params):
    params = {"max_tokens": 300, "seed": 1, **params}
    return llm.generate(list(prompts), SamplingParams(grammar=grammar, **params))


def at_once(engine, requests):
    """The texts of several requests that run together."""
    events = queue.SimpleQueue()
    made = []
    for number, (prompt, params) in enumerate(requests):
        ids = engine.tokenize(prompt, True)
        sink = partial(lambda number, event: events.put((number, event)), number)
        made.append(GenerationRequest(str(uuid.uuid4()), ids, params, engine.default_scheme, sink))
    engine.submit(*made)
    texts, left = [""] * len(requests), len(requests)
    while left:
        number, event = events.get(timeout=120)
        assert not isinstance(event, Failed), event
        if isinstance(event, Delta):
            texts[number] += event.text
        left -= isinstance(event, Finished)
    return texts


def schemas():
    words = st.text('abé"\\\n世', max_size=4)
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.tuples(st.integers(-50, 50), st.integers(0, 60)).map(
            lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
        ),
        st.integers(0, 6).map(lambda length: {"type": "string", "maxLength": length}),
        st.lists(st.one_of(words, st.integers(-5, 5), st.booleans()), min_size=1, max_size=3).map(
            lambda values: {"enum": values}
        ),
        words.map(lambda word: {"const": word}),
        st.just({"type": "string", "pattern": "^[a-c]{1,3}-[0-9]$"}),
    )

    def objects(inner):
        def build(properties, needed):
            required = [name for name, need in zip(properties, needed, strict=False) if need]
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

        names = st.text("xyz é", min_size=1, max_size=3)
        return st.builds(build, st.dictionaries(names, inner, max_size=3), st.lists(st.booleans(), max_size=3))

    def arrays(inner):
        return st.tuples(inner, st.integers(0, 2)).map(
            lambda pair: {"type": "array", "items": pair[0], "minItems": pair[1], "maxItems": 2}
        )

    def either(inner):
        return st.lists(inner, min_size=1, max_size=2).map(lambda several: {"anyOf": several})

    return st.recursive(
        leaves,
        lambda inner: st.one_of(objects(inner), arrays(inner), either(inner)),
        max_leaves=5,
    )


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=schemas(), seed=st.integers(0, 2**32), temperature=st.sampled_from([0, 1, 2]))
def test_every_answer_under_a_schema_parses_and_validates(llm, compiled, schema, seed, temperature):
    grammar = compiled(json_source(schema, "p"))
    (answer,) = run(llm, grammar, seed=seed, temperature=temperature, logit_bias=NO_BLANKS)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), schema)


def patterns():
    atoms = st.sampled_from(["a", "[b-d]", r"\d", "é", "(?:xy|z)", "世", r"\.", "[^a-z]", "/"])
    repeated = st.tuples(atoms, st.sampled_from(["", "?", "{1,3}", "{2}"])).map("".join)
    return st.lists(repeated, min_size=1, max_size=4).map("".join)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.lists(patterns(), min_size=1, max_size=2).map("|".join), seed=st.integers(0, 2**32))
def test_every_answer_under_a_regex_matches(llm, compiled, pattern, seed):
    for answer in run(llm, compiled(regex_source(pattern, "p")), seed=seed, n=2):
        assert answer.finish_reason == "stop"
        assert re.fullmatch(pattern, answer.text), answer.text


def test_choices_of_one_request_go_their_own_ways(llm, compiled):
    answers = run(llm, compiled(regex_source("[a-f]{8}", "p")), n=8, temperature=2.0)
    texts = [answer.text for answer in answers]
    assert all(re.fullmatch("[a-f]{8}", text) for text in texts)
    assert len(set(texts)) > 4


def test_neighbours_are_as_alone(llm, compiled):
    prompts = [PROMPT, "Call me Ishmael.", "It was"]
    free = SamplingParams(seed=3, max_tokens=20)
    bound = replace(free, grammar=compiled(regex_source("[0-9]{12}", "p")))
    alone = [[llm.generate([prompt], params)[0].text for prompt in prompts] for params in (free, bound)]
    together = at_once(llm.engine, [(prompt, params) for params in (free, bound) for prompt in prompts])
    assert together == alone[0] + alone[1]


@pytest.mark.parametrize("ignore_eos", [False, True], ids=["eos", "ignore-eos"])
@pytest.mark.parametrize("min_tokens", [0, 40])
def test_the_grammar_ends_the_answer(llm, compiled, ignore_eos, min_tokens):
    """Neither ``ignore_eos`` nor ``min_tokens`` can ask for more than the grammar has."""
    eos = llm.engine.tokenizer.eos_token_id
    params = {"ignore_eos": ignore_eos, "min_tokens": min_tokens, "logit_bias": {eos: 100.0}}
    (answer,) = run(llm, compiled(regex_source("ab{3}c", "p")), **params)
    assert (answer.text, answer.finish_reason) == ("abbbc", "stop")
    assert len(answer.token_ids) == answer.usage.completion_tokens == 5


def test_the_text_may_end_only_where_the_grammar_accepts(llm, compiled):
    eos = llm.engine.tokenizer.eos_token_id
    grammar = compiled(regex_source("(ab){0,20}", "p"))
    always = {"logit_bias": {eos: 100.0}, "temperature": 0}
    assert run(llm, grammar, **always)[0].text == ""
    assert run(llm, grammar, min_tokens=3, **always)[0].text == "abab"  # after three tokens it cannot end yet
    assert run(llm, grammar, ignore_eos=True, **always)[0].text == "ab" * 20
    assert run(llm, grammar, stop_token_ids=(eos,), ignore_eos=True, **always)[0].text == ""


def test_stop_strings_end_before_the_grammar_does(llm, compiled):
    (answer,) = run(llm, compiled(regex_source("ab{3}cd{3}", "p")), stop=("cd",))
    assert (answer.text, answer.finish_reason) == ("abbb", "stop")
    (answer,) = run(llm, compiled(regex_source("ab{3}cd{3}", "p")), stop=("cd",), min_tokens=7)
    assert answer.text == "abbbcddd"
    # A stop string that had begun when the grammar ended is text.
    (answer,) = run(llm, compiled(regex_source("ab{3}c", "p")), stop=("cd",))
    assert answer.text == "abbbc"


def test_max_tokens_cuts(llm, compiled):
    (answer,) = run(llm, compiled(regex_source("a{50}", "p")), max_tokens=7)
    assert (answer.text, answer.finish_reason) == ("aaaaaaa", "length")
    (answer,) = run(llm, compiled(regex_source("a{7}", "p")), max_tokens=7)
    assert (answer.text, answer.finish_reason) == ("aaaaaaa", "stop")


def test_a_bias_cannot_break_the_grammar(llm, compiled):
    token = llm.engine.tokenizer.encode("x")[0]
    (answer,) = run(llm, compiled(regex_source("[a-z]{5}", "p")), logit_bias={token: 100.0}, temperature=0)
    assert answer.text == "xxxxx"
    (answer,) = run(llm, compiled(regex_source("[a-w]{5}", "p")), logit_bias={token: 100.0})
    assert re.fullmatch("[a-w]{5}", answer.text)


def test_a_dead_end_fails_its_request_alone(llm, compiled, monkeypatch):
    grammar = compiled(regex_source("ab{30}", "p"))
    plain = SamplingParams(seed=5, max_tokens=10)
    want = llm.generate([PROMPT], plain)[0].text
    mask = GrammarState.mask

    def dead(self, vocab_size):
        found = mask(self, vocab_size)
        return found * (self._num_read < 4)

    monkeypatch.setattr(GrammarState, "mask", dead)
    with pytest.raises(NoTokenLeft, match="grammar"):
        run(llm, grammar)
    assert llm.generate([PROMPT], plain)[0].text == want
    monkeypatch.undo()
    assert run(llm, grammar)[0].text == "a" + "b" * 30
    assert llm.engine.snapshot().running == 0


def test_preempted_answers_keep_their_place(llm, model_dir, compiled):
    """A pool of few pages: answers are put back and computed again, and not one token is drawn anew."""
    sources = [
        json_source(
            {
                "type": "array",
                "items": {"type": "integer", "maximum": 99, "minimum": 0},
                "minItems": 12,
                "maxItems": 20,
            },
            "p",
        ),
        regex_source("([a-f][0-9]){30}", "p"),
        grammar_source('root ::= ("ab" | "cd" | "e"){25,40}', "p"),
        choice_source(["x" * 60, "y" * 60, "xy" * 30], "p"),
    ]
    grammars = [compiled(source) for source in sources]

    requests = [
        (f"{number} {PROMPT * 3}", SamplingParams(grammar=grammar, seed=number, max_tokens=120, logit_bias=NO_BLANKS))
        for number, grammar in enumerate(grammars * 3)
    ]
    roomy = at_once(llm.engine, requests)
    with make(model_dir, prefix_reuse=False, kv_cache_gib=SMALL_GIB, step_seconds=1e3) as tight:
        cramped = at_once(tight.engine, requests)
        preempted = tight.engine.snapshot().preemptions
    assert cramped == roomy
    assert preempted > 0
    assert all(re.fullmatch("([a-f][0-9]){30}", text) for text in roomy[1::4])
