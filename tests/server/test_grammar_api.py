"""Constrained output and tools over HTTP, from a tiny random model."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from foveate.server.app import create_app
from foveate.server.engine import Engine
from foveate.server.settings import Settings

from .conftest import LocalClient

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
FIELD = "response_format.json_schema.schema"


def tool(**function):
    return {"type": "function", "function": function}


TOOLS = [
    tool(name="find", description="Finds.", parameters=SCHEMA),
    tool(name="now"),
]
HI = [{"role": "user", "content": "Hi"}]
# It reads tools and writes next to nothing of them: the model has room for 512 bytes.
TEMPLATE = "{% if tools %}+{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def api(model_dir):
    settings = Settings(model=model_dir, dtype="float32", page_size=16, kv_cache_gib=0.02)
    engine = Engine.load(settings)
    engine.tokenizer.chat_template = TEMPLATE
    blanks = {str(engine.tokenizer.encode(text)[0]): -100 for text in " \n"}
    clients = {}

    def post(path="/v1/chat/completions", parser="auto", **body):
        if parser not in clients:
            app = create_app(engine, settings.model_copy(update={"tool_parser": parser}))
            clients[parser] = LocalClient(app, raise_server_exceptions=False)
            clients[parser].__enter__()
        subject = {"messages": HI} if "chat" in path else {"prompt": "Hi"}
        return clients[parser].post(path, json={**subject, "max_tokens": 200, "seed": 1, "logit_bias": blanks, **body})

    yield post
    for client in clients.values():
        client.__exit__(None, None, None)
    engine.shutdown(0)


def text_of(response):
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["text"] if "text" in choice else choice["message"]["content"]


def fits_abc(text):
    assert re.fullmatch("a[bc]{3}", text)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"response_format": FORMAT}, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: jsonschema.validate(json.loads(text), SCHEMA)),
        ({"structured_outputs": {"regex": r"\d{3}-\d{4}"}}, lambda text: re.fullmatch(r"\d{3}-\d{4}", text)[0]),
        ({"guided_regex": "[ab]{4}"}, lambda text: re.fullmatch("[ab]{4}", text)[0]),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, ["red", "blue"].index),
        ({"guided_choice": ["red", "blue"]}, ["red", "blue"].index),
        ({"structured_outputs": {"grammar": 'root ::= "a" ("b" | "c"){3}'}}, fits_abc),
        ({"guided_grammar": 'start: "a" ("b" | "c")~3'}, fits_abc),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_every_field_constrains(api, path, fields, fits):
    fits(text_of(api(path, **fields)))


def test_json_object_is_an_object(api):
    choice = api(response_format={"type": "json_object"}).json()["choices"][0]
    text = choice["message"]["content"]
    assert text.startswith("{")
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, FIELD),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, FIELD),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": "x", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "[a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a" * 5000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_json": '{"const": "\\ud800"}'}, "guided_json"),
        ({"guided_grammar": "root ::= root"}, "guided_grammar"),
        ({"guided_regex": "a", "response_format": FORMAT}, "guided_regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
        ({"tools": [tool(name="a", parameters={"type": "array"})]}, "tools[0].function.parameters"),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0]"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(api, fields, param):
    response = api(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].split(".literal")[0].split(".NamedChoice")[0] == param, error


FORCED = ["required", {"type": "function", "function": {"name": "find"}}]


@pytest.mark.parametrize("choice", ["auto", *FORCED], ids=["auto", "required", "named"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "structured_outputs.grammar"),
    ],
    ids=["regex", "choice", "grammar"],
)
def test_beside_tools_only_json_may_be_asked_for(api, choice, fields, param):
    response = api(tools=TOOLS, tool_choice=choice, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "invalid_grammar")
    assert "with tools an answer can only be constrained to JSON" in error["message"]


@pytest.mark.parametrize("choice", FORCED, ids=["required", "named"])
def test_a_form_has_nothing_to_say_beside_a_forced_call(api, choice):
    forms = ({}, {"response_format": FORMAT}, {"response_format": {"type": "json_object"}}, {"guided_json": SCHEMA})
    said = []
    for form in forms:
        response = api(tools=TOOLS, tool_choice=choice, **form)
        assert response.status_code == 200, response.text
        said.append([call["function"] for call in response.json()["choices"][0]["message"]["tool_calls"]])
    assert said[0]
    assert said == said[:1] * len(forms)


def test_a_strict_tool_must_be_one_that_can_be_held_to(api):
    def forced(strict):
        parameters = {"type": "object", "properties": {"a": {"type": "boolean", "not": {}}}, "required": ["a"]}
        function = {"name": "f", "strict": strict, "parameters": parameters}
        return api(tools=[{"type": "function", "function": function}], tool_choice="required", max_tokens=20)

    assert forced(False).status_code == 200
    assert forced(True).status_code == 400
    error = forced(True).json()["error"]
    assert error["param"] == "tools"
    assert error["message"].startswith("tools: f: ")
    assert "start:" not in error["message"]  # how the server wrote it says nothing to a caller


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": r"(?=a)b"},
        {"type": "number", "multipleOf": 0.07},
        {"enum": [2**53 + 1]},
        {"$ref": "http://127.0.0.1/schema"},
        {"enum": ["a", "<|end|>"]},
    ],
    ids=["look-ahead", "multiple", "whole-number", "remote", "special-token"],
)
def test_what_a_tool_that_is_not_strict_cannot_be_held_to_is_let_go(api, schema):
    loose = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tools = [tool(name="loose", parameters=loose), TOOLS[0]]
    response = api(tools=tools, tool_choice="required", max_tokens=100)
    assert response.status_code == 200, response.text
    named = {"type": "function", "function": {"name": "find"}}
    response = api(tools=tools, tool_choice=named)  # the other is held to as before
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    response = api(tools=[tool(name="loose", parameters=loose, strict=True)], tool_choice="required")
    assert response.status_code == 400
    assert "loose" in response.json()["error"]["message"]


@pytest.mark.parametrize("parser", ["auto", "hermes", "llama3_json", "mistral"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_forced_calls(api, events_of, parser, stream):
    named = {"type": "function", "function": {"name": "find"}}
    response = api(parser=parser, tools=TOOLS, tool_choice=named, stream=stream, n=2)
    assert response.status_code == 200, response.text
    if stream:
        events = [event["choices"][0] for event in events_of(response)]
        for index in range(2):
            mine = [event for event in events if event["index"] == index]
            calls = [call for event in mine for call in event["delta"].get("tool_calls", ())]
            assert calls[0]["function"] == {"name": "find", "arguments": ""}
            assert calls[0]["type"] == "function"
            assert len(calls) > 2, "arguments come as they grow"
            assert {call["index"] for call in calls} == {0}
            assert [key for call in calls[1:] for key in call] == ["index", "function"] * (len(calls) - 1)
            jsonschema.validate(json.loads("".join(call["function"]["arguments"] for call in calls)), SCHEMA)
            assert [event["finish_reason"] for event in mine] == [None] * (len(mine) - 1) + ["tool_calls"]
            assert "".join(event["delta"].get("content", "") for event in mine) == ""
        return
    for choice in response.json()["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "find"
        assert re.fullmatch("[a-zA-Z0-9]{9}" if parser == "mistral" else "call_[0-9a-f]{24}", call["id"])
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def test_required_calls_something(api):
    message = api(tools=TOOLS, tool_choice="required", parallel_tool_calls=False).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] in ("find", "now")
    several = api(tools=[TOOLS[1]], tool_choice="required", temperature=2).json()["choices"][0]["message"]
    assert 1 <= len(several["tool_calls"]) <= 16
    assert all(json.loads(call["function"]["arguments"]) == {} for call in several["tool_calls"])
    assert len({call["id"] for call in several["tool_calls"]}) == len(several["tool_calls"])


def test_a_schema_may_speak_of_what_looks_like_a_token_id(api):
    parameters = {"type": "object", "properties": {"a": {"const": "<[999999]>"}}, "required": ["a"]}
    message = api(tools=[tool(name="f", parameters=parameters)], tool_choice="required", max_tokens=200)
    assert message.status_code == 200, message.text
    for call in message.json()["choices"][0]["message"]["tool_calls"]:
        assert json.loads(call["function"]["arguments"])["a"] == "<[999999]>"


def test_a_call_that_is_cut_short_is_told_as_far_as_it_came(api):
    choice = api(tools=TOOLS[:1], tool_choice="required", max_tokens=40).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")


def test_with_tools_an_answer_may_be_json_or_calls(api):
    for seed in range(4):
        choice = api(tools=TOOLS, response_format=FORMAT, seed=seed).json()["choices"][0]
        if choice["finish_reason"] == "tool_calls":
            assert choice["message"]["tool_calls"]
        elif choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
