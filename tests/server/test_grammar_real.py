"""Constrained output and tools with the demo model, which has a real vocabulary of 49,152 tokens."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from foveate.server.app import create_app
from foveate.server.engine import Engine
from foveate.server.settings import Settings

from .conftest import LocalClient

PERSON = {
    "$defs": {"tag": {"enum": ["friend", "colleague"]}},
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 12},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["name", "born", "tags"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Describe Ada Lovelace as JSON."}]
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def api(smollm_dir):
    settings = Settings(model=str(smollm_dir), kv_cache_gib=0.2)
    engine = Engine.load(settings)
    with LocalClient(create_app(engine, settings), raise_server_exceptions=False) as client:
        yield lambda path, **body: client.post(path, json={"seed": 1, "max_tokens": 120, **body}).json()
    engine.shutdown(0)


def test_every_answer_under_a_schema_validates(api):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for choice in api("/v1/chat/completions", messages=ASK, response_format=form, n=3)["choices"]:
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


def test_every_answer_under_a_regex_matches(api):
    pattern = r"(19|20)\d{2}-(0[1-9]|1[0-2])-[0-3]\d: [A-Z][a-zé]{2,9}(, [^\s,]{1,8})?\."
    answer = api("/v1/completions", prompt="The day was ", structured_outputs={"regex": pattern}, n=4, temperature=1.5)
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop"
        assert re.fullmatch(pattern, choice["text"]), choice["text"]


def test_a_forced_call_names_what_was_asked_for(api):
    messages = [{"role": "user", "content": "What is the weather in Paris in Celsius?"}]
    tools = [{"type": "function", "function": WEATHER}]
    answer = api("/v1/chat/completions", messages=messages, tools=tools, tool_choice="required", temperature=0)
    calls = answer["choices"][0]["message"]["tool_calls"]
    arguments = json.loads(calls[0]["function"]["arguments"])
    jsonschema.validate(arguments, WEATHER["parameters"])
    assert arguments["city"].startswith("Paris")
    assert answer["choices"][0]["finish_reason"] in ("tool_calls", "length")
