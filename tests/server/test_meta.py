"""Models, tokenize, detokenize, health, metrics, OpenAPI."""

from __future__ import annotations

import re

import pytest

from foveate.server.app import create_app
from foveate.server.state import state_of_app

from .conftest import LocalClient


def test_models(client):
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake-model", "model", 4096)
    assert model["attention"]["default"] == "dense"
    assert {"dense", "streaming"} <= {scheme["name"] for scheme in model["attention"]["schemes"]}
    assert client.get("/v1/models/fake-model").json() == model


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "a/b", "fake-model/"])
def test_unknown_model(client, name):
    response = client.get(f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] in ("model_not_found", "not_found")


def test_tokenize_and_back(client):
    answer = client.post("/tokenize", json={"prompt": "Grüße"}).json()
    assert answer["count"] == len(answer["tokens"]) == 7
    assert answer["max_model_len"] == 4096
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Grüße"}


def test_no_messages_are_as_if_left_out(client):
    answers = [client.post("/tokenize", json={"prompt": "Hi", **more}).json() for more in ({}, {"messages": None})]
    assert answers[0] == answers[1]


def test_tokenize_a_chat(client, tokenizer):
    answer = client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert tokenizer.decode(answer["tokens"]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "x" * 40_000}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "chat_template": 5, "model": 5}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": [2**70]}),
        ("/detokenize", {"tokens": [True]}),
        ("/detokenize", {"tokens": [1] * 5000}),
    ],
)
def test_text_tools_refuse(client, path, body):
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_health(client, engine, settings):
    assert client.get("/health").json() == {"status": "ok"}
    engine.heartbeat_age = settings.stall_seconds + 1
    assert client.get("/health").json()["error"]["code"] == "stalled"


@pytest.mark.parametrize("state", ["loading", "draining", "dead"])
def test_unready_engine(client, engine, state):
    engine.state = state
    for response in (
        client.get("/health"),
        client.get("/v1/models"),
        client.post("/v1/completions", json={"prompt": "Hi"}),
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]}),
        client.post("/tokenize", json={"prompt": "Hi"}),
    ):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == state
        assert int(response.headers["retry-after"]) > 0
    assert "foveate_ready 0.0" in client.get("/metrics").text


def test_app_before_its_engine(engine, settings):
    app = create_app(None, settings)
    with LocalClient(app) as client:
        assert client.get("/health").status_code == 503
        assert client.get("/v1/models").json()["error"]["code"] == "loading"
        assert "foveate_ready 0.0" in client.get("/metrics").text
        state_of_app(app).serve(engine)
        assert client.get("/health").status_code == 200


def test_metrics(client, engine):
    client.post("/v1/completions", json={"prompt": ["Hi", "Ho"], "max_tokens": 5, "n": 2})
    client.post("/v1/completions", json={"prompt": 5})
    text = client.get("/metrics").text
    figures = dict(re.findall(r"^(foveate_\S+) (\S+)$", text, re.MULTILINE))
    expected = {
        "foveate_ready": 1,
        "foveate_kv_pages_total": 64,
        "foveate_kv_pages_used": 0,
        "foveate_generated_tokens_total": 20,
        "foveate_keys_read_total": 50,
        "foveate_time_to_first_token_seconds_count": 2,
        "foveate_inter_token_seconds_count": 4 * 4,
        "foveate_request_seconds_count": 2,
        'foveate_choices_finished_total{reason="length"}': 4,
        'foveate_requests_rejected_total{status="400"}': 1,
    }
    assert {name: float(figures[name]) for name in expected} == expected


def test_metrics_of_two_apps_are_apart(engine, settings):
    for _ in range(2):
        with LocalClient(create_app(engine, settings)) as client:
            client.post("/v1/completions", json={"prompt": "Hi"})
            assert "foveate_request_seconds_count 1.0" in client.get("/metrics").text


def test_openapi_names_every_route_and_body(client):
    paths = client.get("/openapi.json").json()["paths"]
    posts = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
    assert set(posts) <= set(paths)
    for path in posts:
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "$ref" not in str(schema)
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["messages"]
    assert {"temperature", "attention", "top_k"} <= set(body["properties"])


def test_no_pages_for_browsers(client):
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
