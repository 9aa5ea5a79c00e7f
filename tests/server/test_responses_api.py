"""``POST /v1/responses``: the object, the order of its events, what is refused."""

from __future__ import annotations

import json

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from foveate.server.exceptions import BadLogits

ANSWER = "Grüße, 世界! 🦊 data: [DONE]\n\ndata: x"
PATH = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)


def post(client, **body):
    return client.post(PATH, json={"input": "Hi", **body})


def events_of(response):
    """Each event has its type in a line of its own, and its number; nothing comes after the last."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.content.split(b"\n\n")
    assert blocks.pop() == b""
    events = []
    for block in blocks:
        kind, data = block.split(b"\n")
        events.append(json.loads(data.removeprefix(b"data: ")))
        assert kind == b"event: " + events[-1]["type"].encode()
        EVENT.validate_python(events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def prompt_of(engine):
    return engine.tokenizer.decode(engine.requests[-1].prompt_token_ids)


def test_whole(client, engine):
    body = post(client, instructions="Be brief.", metadata={"a": "b"}, user="me", top_p=0.5).json()
    Response.model_validate(body)
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "fake-model")
    assert body["id"].startswith("resp-")
    (message,) = body["output"]
    assert message["content"] == [{"type": "output_text", "text": ANSWER, "annotations": [], "logprobs": []}]
    assert (message["role"], message["status"]) == ("assistant", "completed")
    assert body["store"] is False
    assert (body["instructions"], body["metadata"], body["user"], body["top_p"]) == ("Be brief.", {"a": "b"}, "me", 0.5)
    tokens = len(ANSWER.encode())
    usage = body["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (len(engine.requests[0].prompt_token_ids), tokens)
    assert usage["total_tokens"] == usage["input_tokens"] + tokens
    assert usage["attention"]["scheme"] == "dense"
    assert engine.pages_used == 0


def test_cut_off_by_its_limit(client):
    body = post(client, max_output_tokens=3).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    events = events_of(post(client, max_output_tokens=3, stream=True))
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["status"] == "incomplete"


def test_messages_become_a_chat(client, engine):
    given = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One"}]},
        {
            "type": "message",
            "id": "msg-1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Two", "annotations": []}],
        },
        {"role": "user", "content": "Three"},
    ]
    assert post(client, input=given, instructions="First.").status_code == 200
    assert prompt_of(engine) == (
        "<|im_start|>system\nFirst.<|im_end|>\n<|im_start|>system\nRules.<|im_end|>\n"
        "<|im_start|>user\nOne<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>\n"
        "<|im_start|>user\nThree<|im_end|>\n<|im_start|>assistant\n"
    )
    as_chat = [{"role": "system", "content": "First."}, {"role": "user", "content": "Hi"}]
    client.post("/v1/chat/completions", json={"messages": as_chat})
    chat = engine.requests[-1].prompt_token_ids
    post(client, instructions="First.")
    assert engine.requests[-1].prompt_token_ids == chat


def test_events_in_their_order(client):
    events = events_of(post(client, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 5
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event["delta"] for event in events if event["type"].endswith("text.delta")) == ANSWER
    assert events[-4]["text"] == events[-3]["part"]["text"] == ANSWER
    assert events[-2]["item"] == events[-1]["response"]["output"][0]
    assert events[0]["response"]["status"] == "in_progress"
    assert len({event["item_id"] for event in events if "item_id" in event}) == 1


def test_the_last_event_is_the_answer_in_one_piece(client):
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "request_id": "mine"}
    whole = post(client, **asked).json()
    last = events_of(post(client, **asked, stream=True))[-1]["response"]
    for body in (whole, last):
        body["output"][0]["id"] = body["created_at"] = None
    assert last == whole
    assert whole["id"] == "resp-mine"
    assert len(whole["output"][0]["content"][0]["logprobs"]) == len(ANSWER.encode())
    assert len(whole["output"][0]["content"][0]["logprobs"][0]["top_logprobs"]) == 2


def test_a_failure_ends_a_stream_as_failed(client, engine):
    engine.fail = BadLogits("at 0x7f00")
    events = events_of(post(client, stream=True))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {
        "code": "server_error",
        "message": "The model gave values that are not finite.",
    }
    assert "0x7f00" not in json.dumps(events)
    response = post(client)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "bad_logits")
    assert engine.pages_used == 0


def test_what_the_server_adds_travels_along(client, engine):
    response = post(client, attention={"scheme": "streaming"}, seed=5, top_k=3, stop="x", cache_salt="s", temperature=0)
    assert response.json()["usage"]["attention"]["scheme"] == "streaming"
    sampling = engine.requests[0].sampling
    assert (sampling.seed, sampling.top_k, sampling.stop, sampling.temperature) == (5, 3, ("x",), 0)
    assert sampling.max_tokens is None


USER = {"role": "user", "content": "Hi"}
REFUSED = {
    "no-input": ({"input": None}, "input"),
    "input-empty": ({"input": ""}, "input"),
    "input-empty-list": ({"input": []}, "input"),
    "input-number": ({"input": 5}, "input"),
    "input-texts": ({"input": ["Hi"]}, "input[0]"),
    "item-of-a-tool": ({"input": [USER, {"type": "computer_call_output", "output": "x"}]}, "input[1].type"),
    "result-of-nothing": ({"input": [USER, {"type": "function_call_output", "output": "x"}]}, "input[1].call_id"),
    "result-number": ({"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, "input[0].output"),
    "call-without-name": ({"input": [{"type": "function_call", "call_id": "c", "arguments": ""}]}, "input[0].name"),
    "item-reference": ({"input": [{"type": "item_reference", "id": "msg-1"}]}, "input[0].type"),
    "role": ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    "image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
    "content-number": ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    "messages-many": ({"input": [USER] * 2049}, "input"),
    "input-long": ({"input": "é" * 8 * 4096}, "input"),
    "previous": ({"previous_response_id": "resp-1"}, "previous_response_id"),
    "conversation": ({"conversation": "conv-1"}, "conversation"),
    "store": ({"store": True}, "store"),
    "background": ({"background": True}, "background"),
    "prompt": ({"prompt": {"id": "p"}}, "prompt"),
    "context": ({"context_management": [{"type": "compaction"}]}, "context_management"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "tools": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "tools-twice": ({"tools": [{"type": "function", "name": "a"}] * 2}, "tools"),
    "tool-name": ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    "tool-as-in-chat": ({"tools": [{"type": "function", "function": {"name": "a"}}]}, "tools[0].name"),
    "tool_choice-word": ({"tool_choice": "any"}, "tool_choice"),
    "tool_choice-nobody": (
        {"tools": [{"type": "function", "name": "a"}], "tool_choice": {"type": "function", "name": "b"}},
        "tool_choice",
    ),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice"),
    "max_tool_calls": ({"max_tool_calls": 1}, "max_tool_calls"),
    "include": ({"include": ["file_search_call.results"]}, "include[0]"),
    "top_logprobs-alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs-21": ({"top_logprobs": 21}, "top_logprobs"),
    "max_output_tokens": ({"max_output_tokens": 0}, "max_output_tokens"),
    "max_tokens-of-chat": ({"max_tokens": 5}, "max_tokens"),
    "messages-of-chat": ({"messages": [USER]}, "messages"),
    "n-of-chat": ({"n": 2}, "n"),
    "text-format": ({"text": {"format": {"type": "grammar"}}}, "text.format"),
    "text-schema": (
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
        "text.format.schema",
    ),
    "text-schema-missing": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    "text-number": ({"text": 5}, "text"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "summary": ({"reasoning": {"summary": "auto"}}, "reasoning"),
    "effort": ({"reasoning": {"effort": "x" * 33}}, "reasoning.effort"),
    "temperature": ({"temperature": 3}, "temperature"),
    "metadata-many": ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    "metadata-number": ({"metadata": {"a": 1}}, "metadata.a"),
    "usage": ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options"),
    "obfuscation": ({"stream": True, "stream_options": {"include_obfuscation": True}}, None),
    "request_id": ({"request_id": "a\r\nset-cookie: x"}, "request_id"),
    "service_tier": ({"service_tier": "flex"}, "service_tier"),
    "scheme": ({"attention": {"scheme": "nosuch"}}, "attention"),
    "seed": ({"seed": 2**63}, "seed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(client, engine, name):
    body, param = REFUSED[name]
    response = post(client, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"].startswith(param)
        assert param.split("[")[0] in error["message"] or "maximum context length" in error["message"]
    assert engine.requests == []


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"text": {"format": {"type": "text", "x": [1e999]}}', "text.format"),
        ('"tools": [{"type": "function", "name": "a", "parameters": {"x": -1e999}}]', "tools[0].parameters"),
        ('"metadata": {"a": 1e999}', "metadata.a"),
    ],
    ids=["format", "tools", "metadata"],
)
def test_numbers_that_no_answer_could_repeat(client, engine, field, param, stream):
    content = f'{{"input": "Hi", "stream": {json.dumps(stream)}, {field}}}'
    response = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.requests == []


def test_wrong_model(client):
    response = post(client, model="gpt-5")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
