"""Calls of functions in ``/v1/responses`` over a scripted engine: items, events, and how they come back as input."""

from __future__ import annotations

import json

import pytest
from openai import OpenAI
from openai.types.responses import Response

from .live_server import LiveServer
from .test_responses_api import events_of, prompt_of
from .test_tools_api import ARGUMENTS, HERMES, WEATHER, hermes

__all__ = ["hermes"]  # a fixture

TOOLS = [{"type": "function", **WEATHER}]
CALL = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "dry"}


def post(client, **body):
    return client.post("/v1/responses", json={"input": "Rain in Rome?", "tools": TOOLS, **body})


def test_calls_are_items(hermes, engine):
    engine.script = f"Let me look.\n\n{HERMES}\n{HERMES}"
    body = post(hermes).json()
    Response.model_validate(body)
    message, first, second = body["output"]
    assert message["content"][0]["text"] == "Let me look."
    assert {item["status"] for item in body["output"]} == {body["status"]} == {"completed"}
    assert [item["type"] for item in (first, second)] == ["function_call"] * 2
    assert json.loads(first["arguments"]) == json.loads(second["arguments"]) == ARGUMENTS
    assert first["name"] == "get_weather"
    assert len({first["call_id"], second["call_id"], first["id"], second["id"], message["id"]}) == 5
    assert (body["tool_choice"], body["tools"][0]["name"]) == ("auto", "get_weather")
    assert "TOOLS" in prompt_of(engine)
    assert len(post(hermes, parallel_tool_calls=False).json()["output"]) == 2


def test_events_of_calls(hermes, engine):
    engine.script = f"Well.\n{HERMES}"
    events = events_of(post(hermes, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    ended = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert ended == events[-1]["response"]["output"]
    places = {event["item_id"]: event["output_index"] for event in events if "item_id" in event}
    assert places == {item["id"]: place for place, item in enumerate(ended)}
    deltas = [event["delta"] for event in events if event["type"].endswith("arguments.delta")]
    assert json.loads("".join(deltas)) == json.loads(ended[1]["arguments"]) == ARGUMENTS


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("script", ["Use <tool_call>!", HERMES[:-20], " \n "])
def test_what_is_no_call_is_text(hermes, engine, stream, script):
    engine.script = script
    response = post(hermes, stream=stream, include=["message.output_text.logprobs"])
    body = events_of(response)[-1]["response"] if stream else response.json()
    (message,) = body["output"]
    (part,) = message["content"]
    assert part["text"] == script
    assert len(part["logprobs"]) == len(script)


@pytest.mark.parametrize("script", ["Well.\n" + HERMES, HERMES + "\nDone."], ids=["text-first", "call-first"])
def test_log_probabilities_are_those_of_the_text_beside_a_call(hermes, engine, script):
    engine.script = script
    asked = {"include": ["message.output_text.logprobs"]}
    whole = post(hermes, **asked).json()["output"]
    streamed = events_of(post(hermes, stream=True, **asked))[-1]["response"]["output"]
    told = [
        [
            (part["text"], [entry["token"] for entry in part["logprobs"]])
            for item in output
            for part in item.get("content", ())
        ]
        for output in (whole, streamed)
    ]
    assert told[0] == told[1]
    ((text, tokens),) = told[0]
    assert text.strip() in ("Well.", "Done.")
    assert "".join(tokens).strip() == text.strip()


def test_a_call_that_is_cut_off_is_incomplete(hermes, engine):
    engine.script = HERMES
    body = post(hermes, tool_choice="required", max_output_tokens=60).json()
    (call,) = body["output"]
    assert (body["status"], call["status"], call["type"]) == ("incomplete", "incomplete", "function_call")


def test_without_a_choice_of_tools_nothing_is_a_call(hermes, engine):
    body = post(hermes, tool_choice="none").json()
    assert body["output"][0]["content"][0]["text"] == HERMES
    assert "TOOLS" not in prompt_of(engine)


def test_calls_and_results_are_read_as_in_chat(hermes, engine):
    said = {"role": "assistant", "content": "Let me look."}
    given = [{"role": "user", "content": "Rain?"}, said, CALL, {**CALL, "call_id": "c2"}, RESULT]
    assert post(hermes, input=given).status_code == 200
    prompt = engine.requests[-1].prompt_token_ids
    function = {"name": CALL["name"], "arguments": CALL["arguments"]}
    calls = [{"id": name, "type": "function", "function": function} for name in ("c1", "c2")]
    chat = [given[0], {**said, "tool_calls": calls}, {"role": "tool", "tool_call_id": "c1", "content": "dry"}]
    hermes.post("/v1/chat/completions", json={"messages": chat, "tools": [{"type": "function", "function": WEATHER}]})
    assert engine.requests[-1].prompt_token_ids == prompt
    parts = {**RESULT, "output": [{"type": "input_text", "text": "dry"}]}
    post(hermes, input=[*given[:-1], parts])
    assert engine.requests[-1].prompt_token_ids == prompt


def test_a_forced_call_is_held_to_the_schema(hermes, engine):
    post(hermes, tool_choice={"type": "function", "name": "get_weather"})
    assert engine.requests[-1].sampling.grammar is not None
    tools = [{"type": "function", "name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}]
    response = post(hermes, tools=tools, tool_choice="required")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def test_the_openai_client_goes_round(hermes, engine):
    server = LiveServer(engine)
    try:
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            asked = {"model": engine.model_name, "tools": TOOLS}
            turns = [{"role": "user", "content": "Rain?"}]
            with client.responses.stream(**asked, input=turns) as stream:
                final = stream.get_final_response()
            (call,) = final.output
            assert json.loads(call.arguments) == ARGUMENTS
            engine.script = "It is dry."
            result = {"type": "function_call_output", "call_id": call.call_id, "output": "dry"}
            assert client.responses.create(**asked, input=[*turns, call, result]).output_text == "It is dry."
            assert f"FOR {call.call_id}" in prompt_of(engine)
    finally:
        server.stop()
