"""Hostile bodies: each gets its status in OpenAI's error shape, and the server goes on."""

from __future__ import annotations

import json
import re

import pytest

from foveate.server.app import create_app
from foveate.server.errors import error_body, to_api_error
from foveate.server.exceptions import BadLogits, EngineDead, InvalidRequest, PoolTooSmall, QueueFull, StepFailed
from foveate.sparse_attn.errors import CalibrationMissing

from .conftest import LocalClient

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
HUGE = 10**30
LEAKS = re.compile(r"0x[0-9a-f]{4}|File \"|Traceback|\.py\b")


def text(**fields):
    return COMPLETIONS, {"prompt": "Hi", **fields}


def chat(**fields):
    return CHAT, {"messages": [USER], **fields}


def message(**fields):
    return CHAT, {"messages": [{**USER, **fields}]}


# id: request, param
REFUSED = {
    "no-prompt": ((COMPLETIONS, {}), "prompt"),
    "prompt-null": (text(prompt=None), "prompt"),
    "prompt-number": (text(prompt=5), "prompt"),
    "prompt-object": (text(prompt={"a": 1}), "prompt"),
    "prompt-empty": (text(prompt=""), "prompt"),
    "prompt-empty-list": (text(prompt=[]), "prompt"),
    "prompt-list-of-empty": (text(prompt=["Hi", ""]), "prompt"),
    "prompt-empty-ids": (text(prompt=[[]]), "prompt"),
    "prompt-mixed": (text(prompt=[1, "a"]), "prompt"),
    "prompt-floats": (text(prompt=[1.5]), "prompt"),
    "prompt-booleans": (text(prompt=[[True]]), "prompt"),
    "prompt-nested": (text(prompt=[[[1]]]), "prompt"),
    "id-negative": (text(prompt=[-1]), "prompt"),
    "id-vocabulary": (text(prompt=[300]), "prompt"),
    "id-2^31": (text(prompt=[2**31]), "prompt"),
    "id-huge": (text(prompt=[[HUGE]]), "prompt"),
    "prompts-many": (text(prompt=["a"] * 65), "prompt"),
    "prompts-10000": (text(prompt=["a"] * 10_000), "prompt"),
    "prompts-times-n": (text(prompt=["a"] * 33, n=2), "prompt"),
    "prompt-too-many-bytes": (text(prompt="a" * (8 * 4096 + 1)), "prompt"),
    "prompt-too-many-ids": (text(prompt=[1] * 4097), "prompt"),
    "prompt-fills-context": (text(prompt="a" * 4096), None),
    "n-million": (text(n=10**6), "n"),
    "n-zero": (text(n=0), "n"),
    "n-text": (text(n="2"), "n"),
    "n-true": (text(n=True), "n"),
    "n-fraction": (text(n=1.5), "n"),
    "max_tokens-zero": (text(max_tokens=0), "max_tokens"),
    "max_tokens-negative": (text(max_tokens=-1), "max_tokens"),
    "max_tokens-huge": (text(max_tokens=HUGE), "max_tokens"),
    "max_tokens-above-context": (text(max_tokens=4096), None),
    "min_tokens-above-max": (text(min_tokens=17), "min_tokens"),
    "min_tokens-negative": (chat(min_tokens=-1), "min_tokens"),
    "temperature-text": (text(temperature="hot"), "temperature"),
    "temperature-numeric-text": (text(temperature="1"), "temperature"),
    "temperature-negative": (text(temperature=-0.1), "temperature"),
    "temperature-high": (chat(temperature=2.5), "temperature"),
    "temperature-list": (text(temperature=[1]), "temperature"),
    "top_p-zero": (text(top_p=0), "top_p"),
    "top_p-high": (text(top_p=1.1), "top_p"),
    "top_k-below": (text(top_k=-2), "top_k"),
    "min_p-high": (text(min_p=2), "min_p"),
    "repetition-zero": (text(repetition_penalty=0), "repetition_penalty"),
    "presence-high": (text(presence_penalty=3), "presence_penalty"),
    "seed-huge": (text(seed=2**63), "seed"),
    "stop-many": (text(stop=["a"] * 17), "stop"),
    "stop-long": (text(stop="a" * 257), "stop"),
    "stop-empty": (text(stop=""), "stop"),
    "stop-number": (text(stop=5), "stop"),
    "stop-list-of-numbers": (text(stop=[5]), "stop[0]"),
    "stop_ids-huge": (text(stop_token_ids=[HUGE]), "stop_token_ids"),
    "stop_ids-vocabulary": (text(stop_token_ids=[300]), "stop_token_ids"),
    "stop_ids-negative": (text(stop_token_ids=[-1]), "stop_token_ids"),
    "bias-high": (text(logit_bias={"1": 101}), "logit_bias"),
    "bias-word": (text(logit_bias={"cat": 1}), "logit_bias"),
    "bias-vocabulary": (text(logit_bias={"300": 1}), "logit_bias"),
    "bias-huge": (text(logit_bias={str(HUGE): 1}), "logit_bias"),
    "bias-many": (text(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias"),
    "bias-list": (text(logit_bias=[1]), "logit_bias"),
    "logprobs-21": (text(logprobs=21), "logprobs"),
    "logprobs-true": (text(logprobs=True), "logprobs"),
    "logprobs-number-in-chat": (chat(logprobs=3), "logprobs"),
    "top_logprobs-alone": (chat(top_logprobs=3), "top_logprobs"),
    "top_logprobs-21": (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    "prompt_logprobs-stream": (text(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    "prompt_logprobs-21": (chat(prompt_logprobs=21), "prompt_logprobs"),
    "scores-many": (text(prompt=["a" * 4000] * 64, max_tokens=1, prompt_logprobs=20), "prompt_logprobs"),
    "scores-many-echoed": (text(prompt=["a" * 4000] * 16, n=4, echo=True, logprobs=20), "logprobs"),
    "best_of": (text(best_of=10**6), "best_of"),
    "suffix": (text(suffix="end"), "suffix"),
    "stream-text": (text(stream="yes"), "stream"),
    "stream_options-text": (text(stream=True, stream_options="usage"), "stream_options"),
    "obfuscation": (chat(stream=True, stream_options={"include_obfuscation": True}), None),
    "progress-whole": (text(return_progress=True), "return_progress"),
    "salt-long": (text(cache_salt="a" * 257), "cache_salt"),
    "salt-number": (text(cache_salt=5), "cache_salt"),
    "model-number": (text(model=5), "model"),
    "model-long": (text(model="a" * 257), "model"),
    "truncate": (text(truncate_prompt_tokens=5), "truncate_prompt_tokens"),
    "prompt_embeds": (text(prompt_embeds="AAAA"), "prompt_embeds"),
    "guided": (text(guided_regex="([a-z"), "guided_regex"),
    "structured": (chat(structured_outputs={"json": 3}), "structured_outputs.json"),
    "processors": (text(logits_processors=["os.system"]), "logits_processors"),
    "scheme-unknown": (text(attention={"scheme": "nosuch"}), "attention"),
    "scheme-number": (text(attention={"scheme": 5}), "attention"),
    "scheme-option-unknown": (text(attention={"scheme": "streaming", "nosuch": 1}), "attention"),
    "scheme-option-value": (text(attention={"scheme": "streaming", "sink_tokens": -1}), "attention"),
    "scheme-option-called-name": (text(attention={"scheme": "dense", "name": "x", "profiles": {}}), "attention"),
    "scheme-of-a-phase": (text(attention={"scheme": "composed", "decode": {"scheme": "nosuch"}}), "attention"),
    "scheme-of-a-phase-list": (text(attention={"scheme": "composed", "decode": {"scheme": ["quest"]}}), "attention"),
    "scheme-in-itself": (chat(attention={"scheme": "composed", "prefill": "composed"}), "attention"),
    "attention-number": (text(attention=5), "attention"),
    "attention-many": (text(attention={str(i): i for i in range(65)}), "attention"),
    "no-messages": ((CHAT, {}), "messages"),
    "messages-empty": (chat(messages=[]), "messages"),
    "messages-text": (chat(messages="Hi"), "messages"),
    "messages-many": (chat(messages=[USER] * 2049), "messages"),
    "messages-too-many-bytes": (message(content="é" * (8 * 4096)), "messages"),
    "message-text": (chat(messages=["Hi"]), "messages[0]"),
    "role-missing": (chat(messages=[{"content": "Hi"}]), "messages[0].role"),
    "role-unknown": (message(role="<|im_start|>"), "messages[0].role"),
    "role-tool": (message(role="tool"), "messages[0]"),
    "content-missing": (chat(messages=[USER, {"role": "user"}]), "messages[1].content"),
    "content-number": (message(content=5), "messages[0].content"),
    "content-image": (message(content=[{"type": "image_url", "image_url": "http://x"}]), "messages[0].content"),
    "content-part-text": (message(content=["Hi"]), "messages[0].content"),
    "tool_calls": (message(role="assistant", tool_calls=[{"id": "1"}]), "messages[0].tool_calls[0].function"),
    "tools": (chat(tools=[{"type": "function"}]), "tools[0].function"),
    "functions": (chat(functions=[{}]), "functions"),
    "tool_choice": (chat(tool_choice="required"), "tool_choice"),
    "response_format": (chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
    "audio": (chat(audio={"voice": "x"}), "audio"),
    "modalities": (chat(modalities=["text", "audio"]), "modalities"),
    "prediction": (chat(prediction={"type": "content"}), "prediction"),
    "store": (chat(store=True), "store"),
    "web_search": (chat(web_search_options={}), "web_search_options"),
    "chat_template": (chat(chat_template="{{ 1 }}"), "chat_template"),
    "kwargs-nested": (chat(chat_template_kwargs={"enable_thinking": {}}), "chat_template_kwargs"),
    "kwargs-list": (chat(chat_template_kwargs=[1]), "chat_template_kwargs"),
    "kwargs-long": (chat(chat_template_kwargs={"date_string": "a" * 5000}), "chat_template_kwargs"),
    "continue-user": (chat(continue_final_message=True), "continue_final_message"),
    "two-endings": (
        (
            CHAT,
            {
                "messages": [USER, {"role": "assistant", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
        ),
        "continue_final_message",
    ),
}

# id: raw body
BROKEN = {
    "empty": b"",
    "not-json": b"prompt=Hi",
    "cut": b'{"prompt": "Hi"',
    "array": b'["Hi"]',
    "text": b'"Hi"',
    "null": b"null",
    "nan": b'{"prompt": "Hi", "temperature": NaN}',
    "infinity": b'{"prompt": "Hi", "temperature": Infinity}',
    "minus-infinity": b'{"prompt": "Hi", "top_p": -Infinity}',
    "long-number": b'{"prompt": "Hi", "n": 1' + b"0" * 5000 + b"}",
    "bad-utf8": b'{"prompt": "\xff"}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "deep-list": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep-object": b'{"x": ' * 5000 + b"1" + b"}" * 5000,
}


def check_error(response, status):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert not LEAKS.search(body["error"]["message"])
    return body["error"]


def check_alive(client, engine):
    assert engine.pages_used == 0
    assert client.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("name", REFUSED)
def test_refused_body(client, engine, name):
    """Streamed or not, a refusal is a status, never an event inside a stream."""
    (path, body), param = REFUSED[name]
    error = check_error(client.post(path, json=body), 400)
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    if name not in ("stream-text", "progress-whole") and "prompt_logprobs" not in body:
        assert check_error(client.post(path, json={**body, "stream": True}), 400) == error
    check_alive(client, engine)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_broken_body(client, engine, path, name):
    check_error(client.post(path, content=BROKEN[name], headers={"content-type": "application/json"}), 400)
    check_alive(client, engine)


@pytest.mark.parametrize("field", [b'"temperature": 1e999', b'"min_p": -1e999', b'"logit_bias": {"1": 1e999}'])
def test_infinity_by_another_spelling(client, engine, field):
    content = b'{"prompt": "Hi", ' + field + b"}"
    check_error(client.post(COMPLETIONS, content=content, headers={"content-type": "application/json"}), 400)
    check_alive(client, engine)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (
            b'"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [1e999]}}}',
            "response_format.json_schema.schema",
        ),
        (b'"guided_json": {"maximum": -1e999}', "guided_json"),
        (b'"structured_outputs": {"json": "{\\"enum\\": [1e999]}"}', "structured_outputs.json"),
    ],
)
def test_a_schema_keeps_to_numbers_of_json(client, engine, field, param):
    content = b'{"messages": [{"role": "user", "content": "Hi"}], ' + field + b"}"
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    error = check_error(response, 400)
    assert (error["param"], error["code"]) == (param, "invalid_grammar")
    assert "number" in error["message"]
    check_alive(client, engine)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types(client, kind):
    headers = {} if kind is None else {"content-type": kind}
    check_error(client.post(COMPLETIONS, content=b'{"prompt": "Hi"}', headers=headers), 415)


def test_content_type_with_charset(client):
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post(COMPLETIONS, content=b'{"prompt": "Hi"}', headers=headers).status_code == 200


def test_wrong_model(client):
    for name in ("other", "../../etc/passwd", "http://localhost/x", ""):
        error = check_error(client.post(COMPLETIONS, json={"model": name, "prompt": "Hi"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_paths_and_methods(client):
    for path in ("/", "/nosuch", "/v1", "/v1/completions/", "/%2e%2e/etc/passwd"):
        check_error(client.get(path), 404)
    response = client.get(COMPLETIONS)
    check_error(response, 405)
    assert response.headers["allow"] == "POST"
    for path, methods in (
        ("/v1/files", "GET, HEAD, POST"),
        ("/v1/files/x", "DELETE, GET, HEAD"),
        ("/v1/models/a/b", "GET"),
    ):
        assert client.put(path).headers["allow"] == methods


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("/v1/files?limit=0", "limit", "greater than or equal to 1"),
        ("/v1/files?limit=x", "limit", "valid integer"),
        ("/v1/files?order=up", "order", "'asc' or 'desc'"),
        (f"/v1/batches?after={'x' * 300}", "after", "at most"),
        ("/v1/cache?limit=1001", "limit", "less than or equal to 1000"),
    ],
)
def test_a_parameter_of_the_query_is_named(client, query, param, words):
    error = check_error(client.get(query), 400)
    assert (error["param"], error["code"]) == (param, "invalid_value")
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


def test_overflow_is_told_in_the_words_that_clients_look_for(client):
    for body in ({"prompt": "a" * 4096}, {"prompt": [1] * 5000}, {"prompt": "a" * 40_000}):
        error = check_error(client.post(COMPLETIONS, json=body), 400)
        assert error["message"].startswith("This model's maximum context length is 4096 tokens.")
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (QueueFull("5 requests", 7.2), 429, "queue_full", None),
        (EngineDead("at 0x7f00"), 503, "engine_stopped", None),
        (PoolTooSmall(9, 5), 400, "kv_cache_too_small", None),
        (InvalidRequest("too small", "min_tokens"), 400, "invalid_value", "min_tokens"),
        (RuntimeError("at 0x7fffdead in x.py"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_engine_refuses(client, engine, error, status, code, param):
    engine.refuse = error
    for path, body in (text(), chat(), text(stream=True), chat(stream=True)):
        response = client.post(path, json=body)
        told = check_error(response, status)
        assert (told["code"], told["param"]) == (code, param)
        assert response.headers["x-request-id"]
        assert ("retry-after" in response.headers) == (status in (429, 503))
    engine.refuse = None
    check_alive(client, engine)


def test_missing_calibration_tells_the_command(client, engine):
    def build(attention):
        raise CalibrationMissing("run: foveate calibrate kascade fake-model")

    engine.build_scheme = build
    error = check_error(client.post(COMPLETIONS, json={"prompt": "Hi", "attention": {"scheme": "kascade"}}), 400)
    assert (error["param"], error["code"]) == ("attention", "calibration_missing")
    assert "foveate calibrate" in error["message"]


def test_unknown_scheme_tells_what_exists(client):
    error = check_error(client.post(COMPLETIONS, json={"prompt": "Hi", "attention": {"scheme": "x"}}), 400)
    assert error["code"] == "unknown_scheme"
    assert "dense" in error["message"]
    assert "streaming" in error["message"]


class Panic(BaseException):
    """As native code raises it: no ``Exception``."""


@pytest.mark.parametrize(
    ("raised", "status"), [(Panic("index out of range"), 400), (RuntimeError("at 0x7f00"), 500)], ids=["panic", "error"]
)
def test_tokenizer_breaks(client, engine, raised, status):
    def tokenize(text, add_special_tokens):
        raise raised

    healthy, engine.tokenize = engine.tokenize, tokenize
    check_error(client.post(COMPLETIONS, json={"prompt": "Hi"}), status)
    engine.tokenize = healthy
    check_alive(client, engine)


@pytest.mark.parametrize("error", [StepFailed("0x7f00"), BadLogits("x"), ValueError("0x7f00"), EngineDead("x")])
def test_texts_of_inner_errors_are_never_told(error):
    assert str(error) not in json.dumps(error_body(error))
    assert to_api_error(error).status >= 500


def test_template_that_breaks_tells_nothing(engine, plain_tokenizer, settings):
    plain_tokenizer.chat_template = "{{ messages[0].content.nosuch.deeper }}"
    engine.tokenizer = plain_tokenizer
    with LocalClient(create_app(engine, settings)) as client:
        error = check_error(client.post(CHAT, json={"messages": [USER]}), 400)
    assert error["code"] == "chat_template_failed"
    assert "nosuch" not in error["message"]
