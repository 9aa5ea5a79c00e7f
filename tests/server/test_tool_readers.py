"""Reading calls out of text that comes in pieces: calls are found, and what is almost one stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.server.tools.calls import CallArguments, CallBegins, Content
from foveate.server.tools.families import FAMILIES, family_of
from foveate.server.tools.readers import ForcedReader, reader_of

NAMES = {"get_weather", "f"}
CALL = {"name": "f", "arguments": {"a": 'x}"]</tool_call>', "ü": [1, {"b": None}]}}
ONE = json.dumps(CALL)
LLAMA = json.dumps({"name": "f", "parameters": CALL["arguments"]})


def read(reader, pieces):
    """The text, and the calls with their arguments as objects."""
    parts = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    text, calls = "", []
    for part in parts:
        if isinstance(part, Content):
            text += part.text
        elif isinstance(part, CallBegins):
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            calls[-1][1] += part.text
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


def cut(text, places):
    places = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


F = ("f", CALL["arguments"])
EMPTY = ("get_weather", {})
CALLS = {
    "hermes": [
        (f"<tool_call>\n{ONE}\n</tool_call>", "", [F]),
        (f"Let me see. <tool_call>{ONE}</tool_call>\n<tool_call>\n{ONE}\n</tool_call>", "Let me see. \n", [F, F]),
        (f"<tool_call>\n{ONE}", "", [F]),  # the end of the answer may stand for the end of the call
        (f"<tool_call>{ONE}</tool_call> and so on", " and so on", [F]),
        ('<tool_call>{"arguments": {}, "name": "get_weather"}</tool_call>', "", [EMPTY]),
        (f"<tool_call><tool_call>{ONE}</tool_call>", "<tool_call>", [F]),
    ],
    "mistral": [
        (f"[TOOL_CALLS][{ONE}]", "", [F]),
        (f"Well.[TOOL_CALLS] [{ONE}, {ONE}]", "Well.", [F, F]),
        ("[TOOL_CALLS]get_weather[ARGS]{}", "", [EMPTY]),
        (f"[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{json.dumps(F[1])}[TOOL_CALLS]get_weather{{}}", "", [F, EMPTY]),
    ],
    "llama3_json": [
        (LLAMA, "", [F]),
        (f"<|python_tag|>{LLAMA}; {LLAMA}", "", [F, F]),
        ('\n{"type": "function", "name": "get_weather", "parameters": {}}\n', "", [EMPTY]),
    ],
    "plain": [(ONE, "", [F]), (f"{ONE}\n{ONE}", "", [F, F]), (f" [{ONE}]", "", [F])],
}
TEXTS = {
    "hermes": [
        "Use <tool_call> to call.",
        "<tool_cal>",
        "<",
        "a < b <tool",
        f"<tool_call>{ONE}<tool_call",
        f"<tool_call>{ONE} x",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": ["f"]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": [-1e999]}}</tool_call>',
        "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
        '<tool_call>{"name": "f", "arguments": {}',
        "<tool_call>",
        "<tool_call>\n" + " " * 400,
        "<tool_call>__import__('os').system('x')</tool_call>",
        "<tool_call>" + '{"a":' * 3000 + "1" + "}" * 3000 + "</tool_call>",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALL]",
        f"[TOOL_CALLS][{ONE}",
        "[TOOL_CALLS]unknown{}",
        f"[TOOL_CALLS][{ONE}, 3]",
        "[TOOL_CALLS]f says hello",
        "[TOOL_CALLS]" + "x" * 400,
        "[TOOL_CALLS][]",
        "[TOOL_CALLS]f[ARGS]{'a': 1}",
        '[TOOL_CALLS]f[ARGS]{"a": 1e999}',
    ],
    "llama3_json": [
        "No.",
        f"It is {LLAMA}",
        f"{LLAMA} is my answer",
        f"{LLAMA}; and",
        '{"name": "unknown", "parameters": {}}',
        '{"name": "f", "parameters"',
        "{",
        "<|python",
        "<|python_tag|>print(1)",
        "",
        "  ",
    ],
    "plain": ['{"answer": 42}', "[1, 2]", "{ not JSON }", f"{ONE} {{", "[]"],
}


def cases(table):
    return [pytest.param(family, case, id=f"{family}-{n}") for family in table for n, case in enumerate(table[family])]


@pytest.mark.parametrize(("family", "case"), cases(CALLS))
@settings(max_examples=20)
@given(places=st.lists(st.integers(0, 500), max_size=12))
def test_calls_are_found_however_the_text_is_cut(family, case, places):
    text, content, calls = case
    assert read(reader_of(FAMILIES[family], NAMES, forced=False), cut(text, places)) == (content, calls)


@pytest.mark.parametrize(("family", "text"), cases(TEXTS))
def test_what_is_almost_a_call_is_text(family, text):
    for pieces in ([text], list(text), cut(text, range(0, len(text), 3))):
        assert read(reader_of(FAMILIES[family], NAMES, forced=False), pieces) == (text, [])


PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "f", "unknown", ONE, LLAMA, "{", "}", "[", "]",
     '"', "\\", " ", "\n", ";", "<|python_tag|>", "x", '{"name": "f", "arguments": {}}', "NaN", "ü"]
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@given(pieces=st.lists(PIECES, max_size=12), places=st.lists(st.integers(0, 200), max_size=8))
def test_no_text_is_lost_or_made_up(family, pieces, places):
    """Cutting changes nothing; without a call the text is the text; and a call takes away no more than itself."""
    text = "".join(pieces)
    whole = read(reader_of(FAMILIES[family], NAMES, forced=False), [text])
    assert read(reader_of(FAMILIES[family], NAMES, forced=False), cut(text, places)) == whole
    content, calls = whole
    if not calls:
        assert content == text
    rest = iter(text)
    assert all(char in rest for char in content), "content is a part of the text, in order"
    assert len(text) - len(content) <= sum(len(json.dumps(a)) + 120 for _, a in calls) + text.count(" ") + text.count(
        "\n"
    )


@settings(max_examples=50)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(["f", "get_weather"]), st.dictionaries(st.text(), st.text() | st.integers())),
        min_size=1,
        max_size=3,
    ),
    places=st.lists(st.integers(0, 500), max_size=12),
    family=st.sampled_from(list(FAMILIES.values())),
)
def test_forced_calls_go_out_as_they_grow(calls, places, family):
    written = [f'{{"name": "{name}", "{family.arguments}": {json.dumps(given, indent=1)}}}' for name, given in calls]
    begin, end = (family.begin + "\n", "\n" + family.end) if family.end else ("", "")
    text = family.between.join(begin + one + end for one in written)
    text = f"{family.begin}[{text}]" if family.listed else text
    assert read(ForcedReader(), cut(text, places)) == ("", calls)


def test_forced_arguments_do_not_wait_for_their_end():
    reader = ForcedReader()
    parts = reader.push('<tool_call>\n{"name": "f", "arguments": {"a": "long')
    assert parts == [CallBegins("f"), CallArguments('{"a": "long')]


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "plain"),
        ("{% if tools %}<tools>...<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call>\n<function=NAME>{% endif %}", "plain"),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama3_json"),
    ],
)
def test_the_template_tells_the_family(template, family):
    assert family_of(template).name == family
