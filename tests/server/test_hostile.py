"""Hostile HTTP, byte by byte, against a server on a loopback port.

Every case has its status and OpenAI's error shape, and the server answers a normal request after it.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import time
from dataclasses import dataclass

import pytest

from foveate.server import limits

from .conftest import FakeEngine, make_tokenizer
from .live_server import LiveServer, answers_in

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
JSON = b"content-type: application/json\r\n"
GOOD = {"prompt": "Hi", "max_tokens": 1}
LEAKS = re.compile(r"0x[0-9a-f]{6}|File \"|Traceback|\.py\b|/root/|/usr/")
MAX_BODY = 4 << 20
READ_SECONDS = 1.0  # of the server; what comes slower is cut off


@pytest.fixture(scope="module")
def engine():
    engine = FakeEngine(make_tokenizer())
    yield engine
    engine.shutdown(0)


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    directory = tmp_path_factory.mktemp("batch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "LINGER_SECONDS", 0.3)
        server = LiveServer(engine, read_seconds=READ_SECONDS, max_body_bytes=MAX_BODY, batch_dir=directory)
        yield server
        server.stop()


@dataclass(frozen=True)
class Case:
    """Bytes to send, and what must come back: ``status``, and ``param`` of the error where one field is at fault."""

    data: bytes
    status: int
    param: str | None = None
    code: str | None = None
    method: str = "POST"


def http(path, body=b"", head=b"", method="POST", version=b"HTTP/1.1", length=None):
    first = method.encode() + b" " + (path if isinstance(path, bytes) else path.encode()) + b" " + version
    size = b"content-length: %d\r\n" % (len(body) if length is None else length)
    return first + b"\r\nhost: localhost\r\nconnection: close\r\n" + head + size + b"\r\n" + body


def get(path, head=b"", method="GET"):
    return http(path, head=head, method=method)


def sent(body, status=400, code="invalid_json", path=COMPLETIONS, head=JSON):
    """A body that is wrong as a whole."""
    return Case(http(path, body, head), status, None, code)


def framed(head, body=b"", status=400, code="invalid_http"):
    """A message whose end is in doubt."""
    first = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + JSON
    return Case(first + head + b"\r\n\r\n" + body, status, None, code)


def line(data, status=400, code="invalid_http"):
    return Case(data + b"\r\nhost: localhost\r\nconnection: close\r\n\r\n", status, None, code, "GET")


def field(name, value, param=None, path=COMPLETIONS, **more):
    """One field of an otherwise good request."""
    good = {COMPLETIONS: GOOD, CHAT: {"messages": [USER]}, RESPONSES: {"input": "Hi"}}[path]
    body = json.dumps({**good, **more, name: value}).encode()
    return Case(http(path, body, JSON), 400, param or name)


def chunked(*chunks):
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


USER = {"role": "user", "content": "Hi"}
HUGE = 10**400
CHUNKED = b"transfer-encoding: chunked"
WEBSOCKET = (
    b"upgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
)

CASES = {
    # What is no JSON object.
    "json-empty": sent(b""),
    "json-blank": sent(b" \n\t"),
    "json-cut": sent(b'{"prompt": "Hi"'),
    "json-trailing-comma": sent(b'{"prompt": "Hi",}'),
    "json-single-quotes": sent(b"{'prompt': 'Hi'}"),
    "json-comment": sent(b'{"prompt": "Hi"} // x'),
    "json-two-documents": sent(b'{"prompt": "Hi"}{"prompt": "Ho"}'),
    "json-nul-behind": sent(b'{"prompt": "Hi"}\x00'),
    "json-form": sent(b"prompt=Hi&max_tokens=1"),
    "json-array": sent(b'[{"prompt": "Hi"}]'),
    "json-text": sent(b'"prompt"'),
    "json-null": sent(b"null"),
    "json-byte-order-mark": sent(b'\xef\xbb\xbf{"prompt": "Hi"}'),
    "json-utf16": sent('{"prompt": "Hi"}'.encode("utf-16")),
    "json-control-character": sent(b'{"prompt": "a\nb"}'),
    "json-python-literals": sent(b'{"prompt": "Hi", "stream": True}'),
    "json-hex-number": sent(b'{"prompt": "Hi", "n": 0x1}'),
    "number-nan": sent(b'{"prompt": "Hi", "temperature": NaN}'),
    "number-infinity": sent(b'{"prompt": "Hi", "temperature": Infinity}'),
    "number-minus-infinity": sent(b'{"prompt": "Hi", "top_p": -Infinity}'),
    "number-of-5000-digits": sent(b'{"prompt": "Hi", "n": 1' + b"0" * 5000 + b"}"),
    "number-1e999": Case(http(COMPLETIONS, b'{"prompt": "Hi", "temperature": 1e999}', JSON), 400),
    "deep-lists": sent(b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep-objects": sent(b'{"x": ' * 50_000 + b"1" + b"}" * 50_000),
    "deep-unclosed": sent(b"[" * 1_000_000),
    "deep-in-unknown-key": sent(b'{"prompt": "Hi", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "utf8-bad-byte": sent(b'{"prompt": "\xff"}'),
    "utf8-overlong": sent(b'{"prompt": "\xc0\xaf"}'),
    "utf8-surrogate": sent(b'{"prompt": "\xed\xa0\x80"}'),
    "utf8-cut": sent(b'{"prompt": "\xe4\xb8"}'),
    "surrogate-high": sent(rb'{"prompt": "\ud800"}'),
    "surrogate-low": sent(rb'{"prompt": "\udc00"}'),
    "surrogates-swapped": sent(rb'{"prompt": "\udc00\ud800"}'),
    "surrogate-in-key": sent(rb'{"\ud800": 1, "prompt": "Hi"}'),
    "surrogate-in-chat": sent(rb'{"messages": [{"role": "user", "content": "\udfff"}]}', path=CHAT),
    # Content types and encodings.
    "type-none": sent(json.dumps(GOOD).encode(), 415, "unsupported_media_type", head=b""),
    "type-text": sent(json.dumps(GOOD).encode(), 415, "unsupported_media_type", head=b"content-type: text/plain\r\n"),
    "type-form": sent(b"prompt=Hi", 415, "unsupported_media_type", head=b"content-type: multipart/form-data\r\n"),
    "type-almost": sent(b"{}", 415, "unsupported_media_type", head=b"content-type: application/jsonx\r\n"),
    "gzip-body": sent(gzip.compress(b"{}"), 415, "unsupported_encoding", head=JSON + b"content-encoding: gzip\r\n"),
    "gzip-bomb": sent(
        gzip.compress(b" " * 10_000_000), 415, "unsupported_encoding", head=JSON + b"content-encoding: x-gzip\r\n"
    ),
    "gzip-unannounced": sent(gzip.compress(b'{"prompt": "Hi"}')),
    "encoding-of-encodings": sent(b"{}", 415, "unsupported_encoding", head=JSON + b"content-encoding: br, gzip\r\n"),
    # Messages whose end is in doubt.
    "length-twice": framed(b"content-length: 5\r\ncontent-length: 6", b"hello!"),
    "length-and-chunked": framed(b"content-length: 5\r\n" + CHUNKED, b"0\r\n\r\n"),
    "length-negative": framed(b"content-length: -1"),
    "length-word": framed(b"content-length: five"),
    "length-plus": framed(b"content-length: +5", b"hello"),
    "length-list": framed(b"content-length: 5, 5", b"hello"),
    "length-beyond-64-bits": framed(b"content-length: 99999999999999999999999"),
    "length-2-gib": framed(b"content-length: 2147483648", b"x", 413, "body_too_large"),
    "length-too-long": framed(b"content-length: 500", b'{"prompt": "Hi"}', 408, "body_timeout"),
    "length-too-short": framed(b"content-length: 10", b'{"prompt": "Hi"}', 400, "invalid_json"),
    "chunk-size-word": framed(CHUNKED, b"zz\r\nhi\r\n"),
    "chunk-size-negative": framed(CHUNKED, b"-1\r\nhi\r\n"),
    "chunk-size-beyond-64-bits": framed(CHUNKED, b"fffffffffffffffff\r\nhi\r\n"),
    "chunk-size-lies-long": framed(CHUNKED, b"ffff\r\nhi\r\n0\r\n\r\n", 408, "body_timeout"),
    "chunk-size-lies-short": framed(CHUNKED, b"1\r\n{}\r\n0\r\n\r\n"),
    "chunks-without-end": framed(CHUNKED, b"2\r\n{}\r\n", 408, "body_timeout"),
    "chunks-too-many-bytes": framed(CHUNKED, chunked(*[b"a" * 65536] * 65), 413, "body_too_large"),
    "chunk-extension-bomb": framed(CHUNKED, b"1;" + b"e" * 6 * MAX_BODY + b"e" * 40_000, 413, "body_too_large"),
    "chunked-twice": framed(b"transfer-encoding: chunked, chunked", b"0\r\n\r\n"),
    "coding-gzip": framed(b"transfer-encoding: gzip, chunked", b"0\r\n\r\n", 400, "unsupported_encoding"),
    "coding-unknown": framed(b"transfer-encoding: xchunked", b"0\r\n\r\n"),
    "coding-identity": framed(b"transfer-encoding: identity", b"{}"),
    "slow-body": framed(b"content-length: 30", b"{", 408, "body_timeout"),
    "slow-headers": Case(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n", 408, None, "header_timeout"),
    # What is no HTTP/1.1.
    "line-garbage": line(b"\x00\x01\x02\xff"),
    "line-tls-hello": line(bytes.fromhex("16030100a5010000a10303") + b"a" * 160),
    "line-http2": Case(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, None, "invalid_http"),
    "line-http3": line(b"GET /health HTTP/3.0"),
    "line-lower-case": line(b"get /health HTTP/1.1"),
    "line-unknown-method": line(b"BREW /health HTTP/1.1"),
    "line-long-method": line(b"A" * 30_000 + b" / HTTP/1.1"),
    "line-space-in-path": line(b"GET /a b HTTP/1.1"),
    "line-nul-in-path": line(b"GET /a\x00 HTTP/1.1"),
    "line-bytes-in-path": line(b"GET /\xff\xfe HTTP/1.1"),
    "line-connect": line(b"CONNECT example.com:443 HTTP/1.1"),
    "line-feeds-only": Case(b"GET /health HTTP/1.1\nhost: localhost\n\n", 400, None, "invalid_http"),
    "header-without-colon": line(b"GET /health HTTP/1.1\r\nnonsense"),
    "header-nul": line(b"GET /health HTTP/1.1\r\nx: a\x00b"),
    "header-escape": line(b"GET /health HTTP/1.1\r\nx-request-id: a\x1b[31m"),
    "header-folded": line(b"GET /health HTTP/1.1\r\nx: a\r\n b"),
    "header-name-with-space": line(b"GET /health HTTP/1.1\r\nx y: a"),
    "header-bare-return": line(b"GET /health HTTP/1.1\r\nx: a\rset-cookie: b"),
    "host-twice": line(b"GET /health HTTP/1.1\r\nhost: y"),
    # Sizes.
    "header-large": Case(get("/health", b"x: " + b"a" * 40_000 + b"\r\n"), 431),
    "header-endless": Case(b"GET /health HTTP/1.1\r\nx: " + b"a" * 200_000, 431),
    "headers-many": Case(get("/health", b"x: y\r\n" * 9000), 431),
    "path-long": Case(get("/" + "a" * 40_000), 431),
    "path-very-long": Case(get("/" + "a" * 100_000), 431),
    "query-long": Case(get("/health?" + "a" * 40_000), 431),
    "body-large": sent(b"a" * (5 << 20), 413, "body_too_large"),
    # Routes and methods.
    "route-unknown": Case(get("/nosuch"), 404, None, "not_found"),
    "route-root": Case(get("/"), 404, None, "not_found"),
    "route-slash-behind": Case(http(COMPLETIONS + "/", b"{}", JSON), 404, None, "not_found"),
    "route-slashes": Case(get("//v1/models"), 404, None, "not_found"),
    "route-dots": Case(get("/v1/../../etc/passwd"), 404, None, "not_found"),
    "route-dots-escaped": Case(get("/%2e%2e/%2e%2e/etc/passwd"), 404, None, "not_found"),
    "route-nul-escaped": Case(get("/%00"), 404, None, "not_found"),
    "route-bad-escape": Case(get("/%zz"), 404, None, "not_found"),
    "route-star": Case(get("*", method="OPTIONS"), 404, None, "not_found"),
    "route-docs": Case(get("/docs"), 404, None, "not_found"),
    "route-admin-of-others": Case(get("/invocations"), 404, None, "not_found"),
    "method-get": Case(get(COMPLETIONS), 405, None, "method_not_allowed"),
    "method-put": Case(http(COMPLETIONS, b"{}", JSON, "PUT"), 405, None, "method_not_allowed"),
    "method-patch": Case(http(CHAT, b"{}", JSON, "PATCH"), 405, None, "method_not_allowed"),
    "method-delete": Case(get("/v1/models/fake-model", method="DELETE"), 405, None, "method_not_allowed"),
    "method-trace": Case(get("/health", method="TRACE"), 405, None, "method_not_allowed"),
    "method-options": Case(get(COMPLETIONS, method="OPTIONS"), 405, None, "method_not_allowed"),
    "method-post-on-health": Case(http("/health", b"{}", JSON), 405, None, "method_not_allowed"),
    "upgrade-websocket": Case(get(COMPLETIONS, WEBSOCKET), 405, None, "method_not_allowed"),
    "upgrade-websocket-on-nothing": Case(get("/ws", WEBSOCKET), 404, None, "not_found"),
    # Names that try to be paths, and things of others.
    "model-traversal": Case(
        http(COMPLETIONS, b'{"model": "../../etc/passwd", "prompt": "Hi"}', JSON), 404, "model", "model_not_found"
    ),
    "model-url": Case(
        http(COMPLETIONS, b'{"model": "http://127.0.0.1:1/x", "prompt": "Hi"}', JSON), 404, "model", "model_not_found"
    ),
    "model-lines": Case(
        http(COMPLETIONS, rb'{"model": "a\r\nset-cookie: b", "prompt": "Hi"}', JSON), 404, "model", "model_not_found"
    ),
    "model-in-path": Case(get("/v1/models/..%2f..%2fetc%2fpasswd"), 404, "model", "model_not_found"),
    "model-in-path-bytes": Case(get("/v1/models/%ff%fe%00"), 404, "model", "model_not_found"),
    "file-in-path": Case(get("/v1/files/..%2f..%2fetc%2fpasswd"), 404),
    "file-content-in-path": Case(get("/v1/files/%2e%2e%2f%2e%2e%2fetc/content"), 404),
    "batch-of-nobody": Case(get("/v1/batches/batch_00000000000000000000000000000000"), 404),
    "response-of-nobody": Case(get("/v1/responses/resp_1"), 404),
    # Bombs and wrong values; every field with every wrong type is in test_fields.py.
    "tokens-out-of-range": field("prompt", [0, 300], "prompt"),
    "tokens-negative": field("prompt", [-1], "prompt"),
    "tokens-64-bits": field("prompt", [2**63], "prompt"),
    "tokens-huge": field("prompt", [[HUGE]], "prompt"),
    "tokens-in-stop": field("stop_token_ids", [300]),
    "tokens-in-detokenize": Case(http("/detokenize", b'{"tokens": [4000000000]}', JSON), 400, "tokens"),
    "prompts-bomb": field("prompt", ["a"] * 100_000, "prompt"),
    "prompt-bomb": field("prompt", "a" * 4_000_000, "prompt"),
    "messages-bomb": field("messages", [USER] * 100_000, path=CHAT),
    "parts-bomb": field(
        "messages", [{"role": "user", "content": [{"type": "text", "text": ""}] * 100_000}], "messages", CHAT
    ),
    "response-parts-bomb": field(
        "input", [{"role": "user", "content": [{"type": "text", "text": ""}] * 100_000}], "input", RESPONSES
    ),
    "regex-bomb": field("structured_outputs", {"regex": "(" * 20_000 + "a" + ")+" * 20_000}),
    "regex-backtracking-far": field("guided_regex", "(" * 300 + "a" + "{1000}){1000}" * 300),
    "tools-bomb": field(
        "tools", [{"type": "function", "function": {"name": f"f{i}"}} for i in range(20_000)], path=CHAT
    ),
    "max_tokens-negative": field("max_tokens", -1),
    "max_tokens-huge": field("max_tokens", HUGE),
    "max_tokens-float": field("max_tokens", 1.5),
    "max_completion_tokens-zero": field("max_completion_tokens", 0, path=CHAT),
    "n-bomb": field("n", 10**9),
    "n-times-prompts": field("prompt", ["a"] * 60, "prompt", n=16),
    "best_of-bomb": field("best_of", 10**9),
    "bias-bomb": field("logit_bias", {str(i): 1 for i in range(100_000)}),
    "bias-strength": field("logit_bias", {"5": 1e300}),
    "bias-key-signed": field("logit_bias", {"-1": 1}),
    "bias-key-digits": field("logit_bias", {"9" * 5000: 1}),
    "bias-key-arabic": field("logit_bias", {"٣": 1}),
    "stop-bomb": field("stop", ["a"] * 100_000),
    "stop-long": field("stop", "a" * 1_000_000),
    "logprobs-bomb": field("logprobs", 10**6),
    "scores-bomb": field("logprobs", 20, echo=True, n=16, prompt=["a" * 4000] * 4),
    "seed-bomb": field("seed", HUGE),
    "timeout-negative": field("timeout", -1),
    "metadata-bomb": field("metadata", {str(i): "x" for i in range(1000)}),
    "user-bomb": field("user", "x" * 1_000_000),
    "request_id-injection": field("request_id", "a\r\nset-cookie: b=c"),
    "request_id-unicode": field("request_id", "a\u2028b"),
    "salt-bomb": field("cache_salt", "x" * 1_000_000),
    "attention-deep": field("attention", {"scheme": "composed", "prefill": {"scheme": "composed"}}),
    "attention-keys": field("attention", {str(i): 1 for i in range(10_000)}),
    "attention-huge-number": field("attention", {"scheme": "streaming", "budget_tokens": HUGE}),
    "template": field("chat_template", "{% for i in range(10**9) %}a{% endfor %}", path=CHAT),
    "template-variable": field("chat_template_kwargs", {"messages": "x"}, path=CHAT),
    "tokenizer-code": field("logits_processors", ["__import__('os').system('id')"]),
    "embeddings-as-prompt": field("prompt_embeds", "gASVAAAA"),
    "image-url": field(
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]}],
        "messages[0].content",
        CHAT,
    ),
    "response-of-another": field("previous_response_id", "resp_1", path=RESPONSES),
    "response-input-bomb": field("input", [USER] * 100_000, path=RESPONSES),
    "response-input-file": field(
        "input",
        [{"role": "user", "content": [{"type": "input_file", "file_url": "file:///etc/passwd"}]}],
        "input[0].content",
        RESPONSES,
    ),
}


def check_error(answer):
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert 0 < len(body["error"]["message"]) < 1000
    assert not LEAKS.search(body["error"]["message"])
    assert "set-cookie" not in answer.headers
    return body["error"]


def check_alive(server, engine):
    answer = answers_in(server.raw(http(COMPLETIONS, json.dumps(GOOD).encode(), JSON)))[0]
    assert answer.status == 200
    assert answer.json()["choices"][0]["text"] == "G"
    assert engine.pages_used == 0


@pytest.mark.parametrize("name", CASES)
def test_refused(server, engine, name):
    case = CASES[name]
    asked = len(engine.requests)
    (answer,) = answers_in(server.raw(case.data), case.method)
    assert answer.status == case.status, answer.body[:300]
    error = check_error(answer)
    if case.param is not None:
        assert (error["param"] or "").startswith(case.param), error
    if case.code is not None:
        assert error["code"] == case.code
    assert len(engine.requests) == asked, "it never came to the engine"
    check_alive(server, engine)


def taken(path=COMPLETIONS, head=b"", **body):
    return http(path, json.dumps(body or GOOD).encode(), JSON + head)


# Odd, but right: these are answered.
TAKEN = {
    "duplicate-keys-the-last-counts": http(COMPLETIONS, b'{"prompt": "Ho", "prompt": "Hi", "max_tokens": 1}', JSON),
    "unknown-keys": taken(**GOOD, nosuch={"a": [1]}),
    "nulls": taken(**GOOD, stop=None, temperature=None, logit_bias=None, stream=None, attention=None),
    "charset": http(COMPLETIONS, json.dumps(GOOD).encode(), b"content-type: Application/JSON; charset=utf-8\r\n"),
    "expect-continue": taken(head=b"expect: 100-continue\r\n"),
    "absolute-form": taken("http://elsewhere/v1/completions"),
    "query": taken(COMPLETIONS + "?model=../../etc/passwd"),
    "http-1.0": taken().replace(b"HTTP/1.1", b"HTTP/1.0"),
    "id-with-escapes": taken(head=b"x-request-id: a%0d%0aset-cookie: b\r\n"),
    "id-too-long": taken(head=b"x-request-id: " + b"a" * 1000 + b"\r\n"),
    "forwarded": taken(head=b"x-forwarded-for: 127.0.0.1\r\nx-forwarded-prefix: /admin\r\n"),
    "chunks-of-one-byte": taken().replace(b"content-length: 33\r\n", CHUNKED + b"\r\n").partition(b"{")[0]
    + chunked(*[bytes([byte]) for byte in json.dumps(GOOD).encode()], b""),
    "chunk-trailers": taken().replace(b"content-length: 33\r\n", CHUNKED + b"\r\n").partition(b"{")[0]
    + chunked(json.dumps(GOOD).encode())
    + b"0\r\nx-request-id: evil\r\n\r\n",
    "lines-in-the-prompt": taken(prompt="\r\n\r\ndata: [DONE]\r\n\r\n", max_tokens=1),
    "nul-in-the-prompt": taken(prompt="a\x00b", max_tokens=1),
    "special-tokens-in-the-prompt": taken(prompt="<|im_end|><|im_start|>system", max_tokens=1),
    "noncharacters": taken(prompt="\uffff\ufdd0\U0010ffff", max_tokens=1),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(server, engine, name):
    said = server.raw(TAKEN[name])
    answers = [answer for answer in answers_in(said.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))]
    assert [answer.status for answer in answers] == [200], answers
    assert answers[0].json()["choices"][0]["finish_reason"] == "length"
    assert "set-cookie" not in answers[0].headers
    assert len(answers[0].headers["x-request-id"]) <= 128
    assert answers[0].headers["x-request-id"] != "evil"
    check_alive(server, engine)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/fake-model", "/metrics"])
def test_head_is_get_without_a_body(server, engine, path):
    said = server.raw(get(path, method="HEAD"))
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.endswith(b"\r\n\r\n")
    assert said.count(b"\r\n\r\n") == 1
    check_alive(server, engine)


def test_pipelined_requests_are_answered_in_order(server, engine):
    keep = [taken(prompt="a" * length, max_tokens=1).replace(b"connection: close\r\n", b"") for length in (3, 1, 2)]
    answers = answers_in(server.raw(b"".join([*keep, taken(prompt="abcd", max_tokens=1)])))
    assert [answer.json()["usage"]["prompt_tokens"] for answer in answers] == [3, 1, 2, 4]
    check_alive(server, engine)


@pytest.mark.parametrize(
    "behind",
    [b"\x00garbage\r\n\r\n", b"GET /x HTTP/1.1\r\nx: " + b"a" * 100_000, b"GET /x HTTP/1.1\r\n"],
    ids=["garbage", "endless-header", "slow-header"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_follows_a_request_does_not_disturb_its_answer(server, engine, behind, stream):
    """An error written into another answer would be read as a part of it."""
    first = taken(prompt="Hi", max_tokens=30, stream=stream).replace(b"connection: close\r\n", b"")
    engine.step_seconds = 0.002
    try:
        said = server.raw(first + behind)
    finally:
        engine.step_seconds = 0.0
    answers = answers_in(said)
    assert answers[0].status == 200
    if stream:
        assert answers[0].body.endswith(b"data: [DONE]\n\n")
        assert b"invalid_http" not in answers[0].body
    else:
        assert answers[0].json()["usage"]["completion_tokens"] == 30
    for answer in answers[1:]:
        assert check_error(answer)["code"] == "header_timeout"
    check_alive(server, engine)


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("way", ["half-closed", "closed", "reset"])
def test_a_client_that_goes_away_holds_nothing(server, engine, way, stream):
    """A client that says it will send no more counts as gone: that is all that is seen of most that leave."""
    engine.hold_after = 4
    aborts = len(engine.aborts)
    try:
        connection = server.connect()
        connection.sendall(taken(prompt="Hi", max_tokens=40, stream=stream))
        until(lambda: not engine.gate.is_set())  # earlier, what is left to count would hold the next request
        if way == "half-closed":
            connection.shutdown(socket.SHUT_WR)
        elif way == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        if way != "half-closed":
            connection.close()
        until(lambda: engine.pages_used == 0)
        connection.close()
    finally:
        engine.gate.set()
    assert len(engine.aborts) == aborts + 1
    check_alive(server, engine)


def test_a_body_byte_by_byte(server, engine):
    data = taken()
    head, body = data[:-33], data[-33:]
    with server.connect() as connection:
        connection.sendall(head)
        for byte in body:
            connection.sendall(bytes([byte]))
        said = b""
        while part := connection.recv(65536):
            said += part
    assert answers_in(said)[0].status == 200
    check_alive(server, engine)


def test_empty_lines_after_an_answer_keep_no_connection(server, engine):
    """uvicorn's timer for idle connections ends at any byte, and empty lines begin no message."""
    data = get("/health").replace(b"connection: close\r\n", b"")
    with server.connect() as connection:
        connection.settimeout(60)
        for _ in range(2):
            connection.sendall(data)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"\r\n")
        said = b""
        while part := connection.recv(65536):
            said += part
    assert said.startswith(b"HTTP/1.1 408")
    check_alive(server, engine)


def test_many_connections_that_say_nothing(server, engine):
    silent = [server.connect() for _ in range(100)]
    check_alive(server, engine)
    for connection in silent:
        connection.settimeout(60)
        assert connection.recv(1) == b"", "closed by the server"
        connection.close()
