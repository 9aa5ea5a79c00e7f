"""Every field of OpenAI's completions and chat, and of extensions: honoured, or refused with a 400 that names it.

The names are a table of their own, so that one that was forgotten fails.
"""

from __future__ import annotations

import json

import jsonschema_rs
import pytest

from .conftest import parse_events

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
BASE = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    RESPONSES: {"input": "Hi"},
}


def words(text):
    return set(text.split())


OPENAI_COMPLETIONS = words("""
    model prompt best_of echo frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options suffix temperature top_p user
""")
OPENAI_CHAT = words("""
    messages model audio frequency_penalty function_call functions logit_bias logprobs top_logprobs
    max_completion_tokens max_tokens metadata modalities moderation n parallel_tool_calls prediction presence_penalty
    prompt_cache_key prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier
    seed service_tier stop store stream stream_options temperature tool_choice tools top_p user verbosity
    web_search_options
""")
EXTENSIONS = words("""
    top_k min_p repetition_penalty min_tokens stop_token_ids ignore_eos include_stop_str_in_output skip_special_tokens
    prompt_logprobs truncate_prompt_tokens priority request_id cache_salt structured_outputs return_token_ids
    vllm_xargs return_progress sse_ping_interval cache_prompt timings_per_token attention timeout
""")
LISTED = {
    COMPLETIONS: [*OPENAI_COMPLETIONS, *EXTENSIONS, "add_special_tokens"],
    CHAT: [
        *OPENAI_CHAT,
        *EXTENSIONS,
        "add_special_tokens",
        "chat_template_kwargs",
        "continue_final_message",
        "add_generation_prompt",
    ],
}

# field: value, attribute of the sampling parameters, what it must be
SAMPLING = {
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "presence_penalty": (-0.5, "presence_penalty", -0.5),
    "repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "logit_bias": ({"5": 2}, "logit_bias", {5: 2}),
    "max_tokens": (3, "max_tokens", 3),
    "n": (2, "n", 2),
    "seed": (7, "seed", 7),
    "stop": ("x", "stop", ("x",)),
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.5, "top_p", 0.5),
    "top_k": (5, "top_k", 5),
    "min_p": (0.5, "min_p", 0.5),
    "min_tokens": (2, "min_tokens", 2),
    "stop_token_ids": ([5], "stop_token_ids", (5,)),
    "ignore_eos": (True, "ignore_eos", True),
    "include_stop_str_in_output": (True, "include_stop_str_in_output", True),
    "skip_special_tokens": (False, "skip_special_tokens", False),
    "prompt_logprobs": (1, "prompt_logprobs", 1),
}
SAMPLING_OF_CHAT = {"max_completion_tokens": (3, "max_tokens", 3)}

# field: a value that is taken, one that is not. A label changes nothing in the answer.
LABELS = {
    "user": ("me", 5),
    "metadata": ({"a": "b"}, {"a": 1}),
    "safety_identifier": ("me", ["me"]),
    "prompt_cache_key": ("k", {}),
    "prompt_cache_retention": ("in_memory", "24h"),
    "prompt_cache_options": ({}, {"mode": "explicit"}),
}
# Refused by every endpoint, whichever it belongs to. field: a value that changes nothing, one that asks for something
EVERYWHERE = {
    "best_of": (1, 2),
    "suffix": ("", "x"),
    "functions": ([], [{"name": "f"}]),
    "function_call": ("none", "auto"),
    "audio": (None, {"voice": "x"}),
    "modalities": (["text"], ["audio"]),
    "prediction": (None, {"type": "content", "content": "x"}),
    "web_search_options": (None, {}),
    "moderation": (None, {"model": "x"}),
    "store": (False, True),
    "service_tier": ("default", "flex"),
    "verbosity": ("medium", "low"),
}
# field: a value that asks for what there is not
REFUSED = {
    "truncate_prompt_tokens": 5,
    "return_token_ids": True,
    "vllm_xargs": {"a": 1},
    "timings_per_token": True,
}
REFUSED_OF = {
    COMPLETIONS: {**REFUSED, "max_completion_tokens": 3},
    CHAT: {**REFUSED, "add_special_tokens": True},
    RESPONSES: {**REFUSED, "max_completion_tokens": 3},
}
# Tested with what they do, with grammars and tools.
ELSEWHERE = {
    COMPLETIONS: {"structured_outputs"},
    CHAT: {"structured_outputs", "response_format", "tools", "tool_choice", "parallel_tool_calls"},
}
OWN_TEST = {
    COMPLETIONS: words(
        "model prompt echo logprobs stream stream_options priority request_id cache_salt cache_prompt return_progress "
        "sse_ping_interval attention timeout add_special_tokens"
    ),
    CHAT: words(
        "model messages logprobs top_logprobs stream stream_options reasoning_effort priority request_id cache_salt "
        "cache_prompt return_progress sse_ping_interval attention timeout chat_template_kwargs continue_final_message "
        "add_generation_prompt"
    ),
}
SAMPLING_OF = {COMPLETIONS: SAMPLING, CHAT: SAMPLING | SAMPLING_OF_CHAT}
LABELS_OF = {COMPLETIONS: LABELS, CHAT: LABELS}
EVERYWHERE_OF = dict.fromkeys((COMPLETIONS, CHAT, RESPONSES), EVERYWHERE)


def pairs(table):
    return [pytest.param(path, name, id=f"{path.split('/')[2]}-{name}") for path in table for name in table[path]]


def post(client, path, **fields):
    limit = {} if path == RESPONSES else {"max_tokens": 20}
    return client.post(path, json={**limit, **BASE[path], **fields})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_no_field_is_forgotten(path):
    known = [set(table[path]) for table in (SAMPLING_OF, LABELS_OF, EVERYWHERE_OF, REFUSED_OF, OWN_TEST, ELSEWHERE)]
    assert set(LISTED[path]) <= set.union(*known)


@pytest.mark.parametrize(("path", "name"), pairs(SAMPLING_OF))
def test_sampling(client, engine, path, name):
    value, attribute, expected = SAMPLING_OF[path][name]
    assert post(client, path, **{name: value}).status_code == 200
    assert getattr(engine.requests[0].sampling, attribute) == expected


@pytest.mark.parametrize(("path", "name"), pairs(LABELS_OF))
def test_label(client, path, name):
    value, wrong = LABELS_OF[path][name]
    assert post(client, path, **{name: value}).status_code == 200
    assert post(client, path, **{name: None}).status_code == 200
    response = post(client, path, **{name: wrong})
    assert (response.status_code, response.json()["error"]["param"].split(".")[0]) == (400, name)


@pytest.mark.parametrize(("path", "name"), pairs(REFUSED_OF))
def test_refused(client, engine, path, name):
    response = post(client, path, **{name: REFUSED_OF[path][name]})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert error["message"].startswith(f"{name}: ")
    assert engine.requests == []


@pytest.mark.parametrize(("path", "name"), pairs(EVERYWHERE_OF))
def test_refused_wherever_it_is_sent(client, engine, path, name):
    harmless, asking = EVERYWHERE[name]
    assert post(client, path, **{name: harmless}).status_code == 200
    engine.requests.clear()
    response = post(client, path, **{name: asking})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert engine.requests == []


BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


@BOTH
def test_request_id(client, path):
    assert post(client, path, request_id="mine-1").json()["id"].split("-", 1)[1] == "mine-1"


@BOTH
def test_cache_prompt(client, engine, path):
    """Without a salt nothing is found, and nothing is left to find (``test_document_cache``)."""
    for value in (True, True, False, False):
        post(client, path, cache_prompt=value)
    salts = [request.salt for request in engine.requests]
    assert salts[0] == salts[1] is not None
    assert salts[2:] == [None, None]


@BOTH
def test_priority(client, engine, path):
    post(client, path, priority=-3)
    assert engine.requests[0].priority == -3


@BOTH
def test_timeout(client, engine, path):
    engine.gate.clear()
    response = post(client, path, timeout=0.05)
    engine.gate.set()
    assert (response.status_code, response.json()["error"]["code"]) == (408, "request_timeout")


@BOTH
def test_sse_ping_interval(client, engine, path, monkeypatch):
    paused = []

    async def events(self, pause):
        paused.append(pause)
        return
        yield

    monkeypatch.setattr("foveate.server.streaming.ResponseStream.events", events)
    post(client, path, stream=True, sse_ping_interval=3)
    post(client, path, stream=True)
    assert paused == [3, 10]


@BOTH
@pytest.mark.parametrize("name", ["stream_options", "sse_ping_interval", "return_progress"])
def test_what_needs_a_stream(client, path, name):
    value = {"stream_options": {"include_usage": True}, "sse_ping_interval": 3, "return_progress": True}[name]
    response = post(client, path, **{name: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    assert parse_events(post(client, path, **{name: value}, stream=True))


def test_reasoning_effort_reaches_the_template(client, engine):
    seen = []
    real = engine.tokenizer.chat_template
    engine.tokenizer.chat_template = "{{ reasoning_effort }}"
    try:
        post(client, CHAT, reasoning_effort="high")
        seen = engine.tokenizer.decode(engine.requests[0].prompt_token_ids)
    finally:
        engine.tokenizer.chat_template = real
    assert seen == "high"


# Wrong types, field by field, by what /openapi.json says of each.
WRONG = [{}, [], "x", "", 1.5, -1, 0, True, [[]], [{}], {"a": {}}, 10**30, [10**30], ["x"], {"x": "y"}]


@pytest.fixture(scope="module")
def bodies():
    from foveate.server.app import create_app
    from foveate.server.settings import Settings

    paths = create_app(None, Settings(model="m")).openapi()["paths"]
    return {path: paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"] for path in BASE}


def body_fields():
    from foveate.server.schemas import CompletionBody
    from foveate.server.schemas_chat import ChatBody
    from foveate.server.schemas_responses import ResponsesBody

    found = []
    for path, model in ((COMPLETIONS, CompletionBody), (CHAT, ChatBody), (RESPONSES, ResponsesBody)):
        for name in sorted(set(model.model_fields) | set(model.refused)):
            found.append(pytest.param(path, name, id=f"{path.split('/')[2]}-{name}"))
    return found


@pytest.mark.parametrize(("path", "name"), body_fields())
def test_wrong_types(client, engine, bodies, path, name):
    """What the schema rules out is refused by name; what it allows breaks nothing."""
    schema = bodies[path]["properties"][name]
    refused = 0
    for value in WRONG:
        response = client.post(path, content=json.dumps({**BASE[path], name: value}), headers={"content-type": JSON})
        assert response.status_code in (200, 400, 404), (value, response.text)
        if jsonschema_rs.is_valid(schema, value):
            continue
        refused += 1
        assert response.status_code == 400, (value, response.text)
        error = response.json()["error"]
        assert (error["param"] or "").startswith(name), (value, error)
    assert refused
    assert engine.pages_used == 0


@BOTH
@pytest.mark.parametrize("name", ["logit_bias", "metadata"])
def test_members_are_counted_before_they_are_checked(client, path, name):
    wrong = {str(number): [] for number in range(2000)}
    error = post(client, path, **{name: wrong}).json()["error"]
    assert error["param"] == name
    assert "at most" in error["message"]


@pytest.mark.parametrize("inside", ["tool_calls", "content"])
def test_calls_and_parts_are_counted_over_all_messages(client, inside):
    message = {"role": "assistant", inside: [{}] * 100}
    error = post(client, CHAT, messages=[message] * 82).json()["error"]
    assert error["param"] == "messages"
    assert "at most 8192" in error["message"]
    assert "at most" not in post(client, CHAT, messages=[message] * 81).json()["error"]["message"]


JSON = "application/json"
