"""Compiling grammars: bounds, hostile ones, the cache; and masks against plain enumeration."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.server.grammar import store, trial
from foveate.server.grammar.compile import ascii_digits
from foveate.server.grammar.source import (
    MAX_DEPTH,
    MAX_GRAMMAR_BYTES,
    MAX_OPTIONS,
    MAX_REGEX_CHARS,
    MAX_SCHEMA_BYTES,
    GrammarRefused,
    choice_source,
    grammar_source,
    json_source,
    regex_source,
)
from foveate.server.grammar.store import Grammars, GrammarsUnavailable

VOCAB = 300


@pytest.fixture(scope="module")
def grammars(tokenizer):
    grammars = Grammars(tokenizer, VOCAB, seconds=2)
    yield grammars
    grammars.close()


def tokens_of(mask):
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def accepts(grammars, tokenizer, source, text):
    """Whether ``text`` is a whole answer, token by token as the sampler sees it."""
    state = grammars.compile_now(source).begin()
    output = []
    for token in tokenizer.encode(text):
        if token not in tokens_of(state.mask(VOCAB)):
            return False
        output.append(token)
        state.read(output)
    return state.accepts


NAMES = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "patternProperties": {"^x": {"type": "integer"}},
    "additionalProperties": {"type": "string"},
}
ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws  # a comment with "quotes" and ::=
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t]*
"""


@pytest.mark.parametrize(
    ("source", "yes", "no"),
    [
        (regex_source(r"\d{3}-\d{4}", "x"), ["123-4567"], ["123-456", "123-45678", "abc"]),
        (regex_source(r"^(ab|é/)+$", "x"), ["ab", "é/ab"], ["", "a", "ba"]),
        (choice_source(["yes", "no", 'a "b"\n\\', "世界"], "x"), ["yes", 'a "b"\n\\', "世界"], ["ye", "yesno", ""]),
        (json_source({"type": "object"}, "x"), ["{}", '{"a": [1, null]}', '{\n  "a": "ü"\n}'], ["[]", '{"a":1', "{}x"]),
        (json_source('{"enum": [1, "x"]}', "x"), ["1", '"x"'], ["x", "2"]),
        (json_source(True, "x"), ["1", "[]"], ["", "a"]),
        (grammar_source('root ::= "a" (" b" | " c"){2,3}', "x"), ["a b c"], ["a b", "a b c b c"]),
        (grammar_source('start: "x" NUM\nNUM: /[0-9]+/', "x"), ["x12"], ["x"]),
        (json_source(NAMES, "x"), ['{"a": 1, "b": "\\n"}'], ['{"\\u0061": "x"}', '{"\\u0078y": "x"}']),
        (json_source({"const": "a\x01"}, "x"), ['"a\\u0001"'], ['"a"']),
        (json_source({"const": 2**53, "default": 2**53 + 1}, "x"), [str(2**53)], [str(2**53 + 2)]),
        (json_source({"properties": {f"p{n}": {"type": "null"} for n in range(600)}}, "x"), ['{"p599": null}'], ["{"]),
        (grammar_source(ARITHMETIC, "x"), ["a+1=2\n", "a1*(b -c)= 12\n"], ["a+=2\n", "a=1"]),
        (grammar_source("root ::= num num\nnum ::= [0-9]+", "x"), ["12", "123"], ["1", ""]),
        (grammar_source('root ::= "ab" "c" "x" | "abcd" | . "."', "x"), ["abcx", "abcd", "\n."], ["abc", "ab"]),
        (grammar_source(r'root ::= [\u0041-\u005a]+ "\u006142\U0001F98A\\\""', "x"), ['BZa42🦊\\"'], ["Ba42🦊"]),
        (grammar_source(r"root ::= [+--] [&&b] [a~~] [^\]/]", "x"), [",&~x", "+ba["], ["*&~x", ",&~]", ",&~/"]),
        (grammar_source('root ::= Ws-1 ws_1\nWs-1 ::= "a"\nws_1 ::= "b" | root', "x"), ["ab", "aab"], ["ba"]),
    ],
    ids=[
        "regex", "anchored", "choice", "object", "schema-text", "any", "gbnf", "lark", "escaped-names", "control",
        "whole-float", "many-properties", "arithmetic", "number-twice", "prefix", "by-number", "class", "equal-names",
    ],
)  # fmt: skip
def test_what_a_grammar_accepts(grammars, tokenizer, source, yes, no):
    assert [text for text in yes if not accepts(grammars, tokenizer, source, text)] == []
    assert [text for text in no if accepts(grammars, tokenizer, source, text)] == []


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        (r"\d{3}", "[0-9]{3}"),
        (r"\\d", r"\\d"),
        (r"[\d.]+\D", r"[0-9.]+\D"),
        (r"[^\d]\d", r"[^\d][0-9]"),
        (r"[a\]\d]\d", r"[a\]0-9][0-9]"),
        (r"[[:alpha:]\d]\d", r"[[:alpha:]0-9][0-9]"),
        (r"\[\d\]", r"\[[0-9]\]"),
        ("\\", "\\"),
    ],
)
def test_digits_are_those_that_every_reader_knows(pattern, want):
    assert ascii_digits(pattern) == want


@given(options=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
def test_choices_are_taken_to_the_letter(grammars, tokenizer, options):
    options = [option for option in options if option.isprintable()] or ["a"]
    source = choice_source(options, "x")
    for text in [*options, *(option[:-1] for option in options), options[0] + options[-1]]:
        assert accepts(grammars, tokenizer, source, text) == (text in options), text


def test_blanks_in_json_are_bounded(grammars, tokenizer):
    source = json_source({"type": "array", "items": {"type": "integer"}}, "x")
    assert accepts(grammars, tokenizer, source, "[\n" + " " * 40 + "1]")
    assert not accepts(grammars, tokenizer, source, "[\n" + " " * 41 + "1]")
    assert not accepts(grammars, tokenizer, source, "[\n\n1]")


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "write",
    [
        lambda: json_source({"description": "x" * MAX_SCHEMA_BYTES}, "p"),
        lambda: json_source('"' + "x" * MAX_SCHEMA_BYTES, "p"),
        lambda: json_source("{", "p"),
        lambda: json_source("[" * 50_000, "p"),
        lambda: json_source(3, "p"),
        lambda: json_source(False, "p"),
        lambda: json_source(nested(MAX_DEPTH), "p"),
        lambda: json_source({"enum": [float("inf")]}, "p"),
        lambda: json_source('{"maximum": -1e999}', "p"),
        lambda: json_source('{"minimum": NaN}', "p"),
        lambda: json_source({"enum": [2**53 + 1]}, "p"),
        lambda: json_source({"properties": {"default": {"const": {"title": 2**63}}}}, "p"),
        lambda: json_source({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "p"),
        lambda: json_source({"anyOf": [{"minimum": -0.5, "exclusiveMaximum": 0}]}, "p"),
        lambda: json_source({"prefixItems": [{}], "additionalItems": False}, "p"),
        lambda: regex_source("a" * (MAX_REGEX_CHARS + 1), "p"),
        lambda: choice_source([], "p"),
        lambda: choice_source([""], "p"),
        lambda: choice_source(["x"] * (MAX_OPTIONS + 1), "p"),
        lambda: choice_source(["x" * MAX_GRAMMAR_BYTES], "p"),
        lambda: grammar_source("#" * (MAX_GRAMMAR_BYTES + 1), "p"),
    ],
)
def test_what_is_too_large_or_cannot_be_held_to_is_refused_unread(write):
    with pytest.raises(GrammarRefused) as caught:
        write()
    assert caught.value.param == "p"


@pytest.mark.parametrize(
    "source",
    [
        regex_source("([a-z", "p"),
        regex_source("(?=a)b", "p"),
        regex_source(r"\bfoo\b", "p"),
        regex_source("(a?){2000}a{2000}", "p"),
        json_source({"type": "foo"}, "p"),
        json_source({"not": {}}, "p"),
        json_source({"x-guidance": {"lenient": True}, "not": {}}, "p"),
        json_source({"$ref": "http://127.0.0.1/schema"}, "p"),
        json_source({"$ref": "#/nowhere"}, "p"),
        json_source({"$ref": "#"}, "p"),
        grammar_source("root ::= root", "p"),
        grammar_source("root ::= (", "p"),
        grammar_source("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000, "p"),
        grammar_source('%import "/etc/passwd"\nstart: "a"', "p"),
        grammar_source("", "p"),
        regex_source("\ud800", "p"),
    ],
    ids=[
        "unclosed", "look-ahead", "word-boundary", "explosive", "no-type", "not", "lenient-by-itself", "remote",
        "dangling", "only-itself", "endless", "gbnf", "gbnf-deep", "import", "empty", "surrogate",
    ],
)  # fmt: skip
def test_bad_grammars_are_refused_by_name(grammars, source):
    with pytest.raises(GrammarRefused) as caught:
        grammars.compile_now(source)
    assert caught.value.param == "p"
    assert 0 < len(str(caught.value)) <= 300
    assert not re.search(r"0x[0-9a-f]{6}|\n|File \"", str(caught.value))


def test_one_of_that_cannot_be_held_to_is_told_with_the_way_out(grammars):
    numbers = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
    with pytest.raises(GrammarRefused, match=r"^oneOf .* clearly disjoint; use anyOf$"):
        grammars.compile_now(json_source({"properties": {"a": numbers}}, "p"))


# The first makes the compiler run for minutes, the second overflows its stack, which ends the process.
HOSTILE = {
    "slow": lambda: json_source({"allOf": [{"type": "string", "pattern": f"{i}.*x.{{30}}y"} for i in range(500)]}, "p"),
    "deadly": lambda: grammar_source(
        "start: a0\n" + "\n".join(f'a{i}: "x" | a{i + 1}' for i in range(3000)) + '\na3000: "y"', "p"
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_grammar_that_hangs_or_kills_the_compiler_costs_its_request_alone(grammars, tokenizer, kind):
    began = time.monotonic()
    with pytest.raises(GrammarRefused, match="too complex"):
        grammars.compile_now(HOSTILE[kind]())
    assert time.monotonic() - began < 60  # 2 s and what a busy machine adds; unbounded, the slow one takes minutes
    assert accepts(grammars, tokenizer, regex_source(f"{kind}", "p"), kind)


@pytest.mark.parametrize(
    "write",
    [
        lambda token: choice_source([f"a{token}", "b"], "x"),
        lambda token: regex_source("a" + re.escape(token), "x"),
        lambda token: json_source({"enum": [1, f"x {token} y"]}, "x"),
        lambda token: json_source({"type": "string", "pattern": re.escape(token)}, "x"),
        lambda token: json_source({"type": "object", "properties": {token: {}}, "required": [token]}, "x"),
    ],
    ids=["choice", "regex", "enum", "pattern", "property"],
)
def test_text_of_a_special_token_is_refused_at_once(grammars, tokenizer, write):
    """It would be taken for the token, and the answer would end in the middle with an error."""
    token = tokenizer.eos_token
    with pytest.raises(GrammarRefused, match=re.escape(f"it holds {token}, a special token")):
        grammars.compile_now(write(token))


def test_remarks_in_a_schema_may_name_special_tokens(grammars, tokenizer):
    schema = {"type": "object", "description": f"never write {tokenizer.eos_token}"}
    assert accepts(grammars, tokenizer, json_source(schema, "x"), "{}")


def test_a_grammar_is_compiled_once(tokenizer, monkeypatch):
    monkeypatch.setattr(store, "MAX_CACHED", 3)
    grammars = Grammars(tokenizer, VOCAB)
    try:
        first = grammars.compile_now(regex_source("a", "p"))
        assert grammars.compile_now(regex_source("a", "q")) is first
        for pattern in "bcd":
            grammars.compile_now(regex_source(pattern, "p"))
        assert len(grammars._cached) == 3
        assert grammars.compile_now(regex_source("a", "p")) is not first
        monkeypatch.setattr(store, "MAX_CACHED_BYTES", 20)
        grammars.compile_now(regex_source("x" * 15, "p"))
        assert len(grammars._cached) <= 4
        assert grammars._cached_bytes == sum(len(text) for _, text in grammars._cached) <= 20
    finally:
        grammars.close()


def test_requests_wait_for_their_grammar_without_blocking_the_loop(grammars):
    async def main():
        ticks = 0
        task = asyncio.ensure_future(grammars.compile(HOSTILE["slow"]()))
        while not task.done():
            await asyncio.sleep(0.02)
            ticks += 1
        with pytest.raises(GrammarRefused):
            await task
        return ticks

    assert asyncio.run(main()) > 4


def test_other_kinds_of_tokenizers_are_told_apart():
    class Slow:
        pass

    with pytest.raises(GrammarsUnavailable):
        Grammars(Slow(), 10).load()


def test_a_tokenizer_of_another_kind_is_read_once(tokenizer, monkeypatch):
    reads = []

    def unknown(*given):
        reads.append(given)
        raise ValueError("x")

    monkeypatch.setattr(store, "tokenizer_of", unknown)
    grammars = Grammars(tokenizer, VOCAB)
    for _ in range(3):
        with pytest.raises(GrammarsUnavailable, match="kind of tokenizer"):
            grammars.compile_now(regex_source("a", "p"))
    assert len(reads) == 1


def test_the_process_that_tries_grammars_gets_no_secrets(tokenizer, monkeypatch):
    monkeypatch.setenv("FOVEATE_API_KEY", "secret")
    grammars = Grammars(tokenizer, VOCAB)
    try:
        grammars.compile_now(regex_source("a", "p"))
        process = grammars._guard._process
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            assert b"FOVEATE" not in file.read()
    finally:
        grammars.close()
    assert process.poll() is not None


def test_the_process_does_not_outlive_a_server_that_was_killed(tokenizer):
    """Neither idle, when its input ends, nor in the middle of a compilation, when its own clock runs out."""
    grammars = Grammars(tokenizer, VOCAB)
    grammars.compile_now(regex_source("a", "p"))
    process = grammars._guard._process
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    process.stdout.close()
    grammars._guard._process = None
    source = Path(trial.__file__).read_text(encoding="utf-8").replace("_ORPHAN_SECONDS = 30.0", "_ORPHAN_SECONDS = 0.5")
    hostile = HOSTILE["slow"]()
    lines = [grammars._guard._tokenizer, {"kind": hostile.kind, "text": hostile.text}]
    given = "".join(json.dumps(line) + "\n" for line in lines)
    code = source.replace("from .compile", "from foveate.server.grammar.compile")
    ended = subprocess.run([sys.executable, "-c", code], input=given.encode(), capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGALRM
    grammars.close()


def test_ids_beyond_the_tokenizer_are_never_allowed(grammars, tokenizer):
    mask = grammars.compile_now(regex_source("(?s:.*)", "p")).begin().mask(VOCAB)
    assert max(tokens_of(mask)) < 256  # the bytes; neither control tokens, nor the 42 ids without a token
    assert len(mask) == -(-VOCAB // 32)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2},
        {"properties": {"exclusiveMinimum": {"const": 1}, "maximum": {"const": 1}}},
        {"properties": {"prefixItems": {"const": 1}, "additionalItems": {"const": 1}}},
        {"type": "number", "default": 2**53 + 1, "examples": [2**64]},
    ],
    ids=["unit", "integers", "bounds-by-name", "items-by-name", "remarks"],
)
def test_schemas_like_those_that_cannot_be_held_to_are_taken(grammars, schema):
    grammars.compile_now(json_source(schema, "x"))


def test_a_form_without_any_text_is_said_to_be_one(grammars):
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}
    with pytest.raises(GrammarRefused, match=r"^no text satisfies it$"):
        grammars.compile_now(json_source(endless, "p"))
