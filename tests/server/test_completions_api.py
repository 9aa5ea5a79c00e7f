"""``POST /v1/completions``: prompts in every form, choices, log-probabilities, usage."""

from __future__ import annotations

import pytest

ANSWER = "Grüße, 世界! 🦊 data: [DONE]\n\ndata: x"
LONG = 1000  # more than the answer's tokens


def post(client, **body):
    return client.post("/v1/completions", json={"model": "fake-model", "max_tokens": LONG, **body})


def test_answer_in_one_piece(client, engine):
    response = post(client, prompt="Hi")
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "fake-model")
    assert body["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]
    tokens = len(ANSWER.encode())
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": tokens,
        "total_tokens": 2 + tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "attention": {"scheme": "dense", "keys_read_fraction": 0.5, "pages": 1, "mass_kept": None},
    }
    assert engine.pages_used == 0


def test_sixteen_tokens_by_default(client):
    body = client.post("/v1/completions", json={"prompt": "Hi"}).json()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[64, 65]]),
        (["ab", "c"], [[64, 65], [66]]),
        ([64, 65], [[64, 65]]),
        ([[64], [65, 66]], [[64], [65, 66]]),
        (["ab", [66]], [[64, 65], [66]]),
    ],
    ids=["text", "texts", "ids", "lists-of-ids", "mixed"],
)
def test_prompt_forms(client, engine, tokenizer, prompt, expected):
    assert tokenizer.encode("abc") == [64, 65, 66]
    assert post(client, prompt=prompt).status_code == 200
    assert [request.prompt_token_ids for request in engine.requests] == expected


def test_choices_are_numbered_over_prompts(client):
    body = post(client, prompt=["a", "bc"], n=3).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert all(choice["text"] == ANSWER for choice in body["choices"])
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 6 * len(ANSWER.encode())
    assert body["usage"]["attention"]["pages"] == 2


def test_echo(client):
    assert post(client, prompt="Hi. ", echo=True).json()["choices"][0]["text"] == "Hi. " + ANSWER
    assert post(client, prompt=[64, 65], echo=True).json()["choices"][0]["text"] == "ab" + ANSWER


def test_echo_in_a_stream_comes_once_for_each_choice(client, events_of):
    events = events_of(post(client, prompt=["A", "B"], n=2, echo=True, stream=True))
    texts = [""] * 4
    for event in events:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["text"]
    assert texts == ["A" + ANSWER, "A" + ANSWER, "B" + ANSWER, "B" + ANSWER]


def test_logprobs(client, engine):
    engine.script = "aé"
    body = post(client, prompt="Hi", logprobs=2).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "\ufffd", "\ufffd"]
    assert logprobs["token_logprobs"] == [-0.5, -9999.0, -0.5], "minus infinity is no JSON"
    assert logprobs["text_offset"] == [0, 1, 1], "both bytes belong to the second character"
    assert logprobs["top_logprobs"][0] == {"a": -0.5, '"': -1.5}
    alone = post(client, prompt="Hi", logprobs=0).json()["choices"][0]["logprobs"]
    assert alone["top_logprobs"][0] == {"a": -0.5}, "the token itself is always among them"


def test_streamed_logprobs_equal_those_in_one_piece(client, events_of):
    whole = post(client, prompt="Hi", logprobs=1).json()["choices"][0]["logprobs"]
    parts = [e["choices"][0]["logprobs"] for e in events_of(post(client, prompt="Hi", logprobs=1, stream=True))]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


def test_stream_has_the_same_shape(client, events_of):
    events = events_of(post(client, prompt="Hi", stream=True))
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert "".join(event["choices"][0]["text"] for event in events) == ANSWER
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert all("usage" not in event for event in events)


def test_sampling_reaches_the_engine(client, engine):
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": -3,
        "min_tokens": 2,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "n": 2,
    }
    post(client, prompt="Hi", stop="x", stop_token_ids=[5], logit_bias={"7": -100, "8": 2.5}, **given)
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert (sampling.stop, sampling.stop_token_ids, sampling.max_tokens) == (("x",), (5,), LONG)
    assert sampling.logit_bias == {7: -100, 8: 2.5}
    assert sampling.logprobs is None


def test_null_is_the_default(client, engine):
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "logprobs", "stream", "suffix", "best_of")
    assert post(client, prompt="Hi", user="me", **dict.fromkeys(names)).status_code == 200
    assert (engine.requests[0].sampling.temperature, engine.requests[0].sampling.stop) == (1.0, ())


def test_attention_of_the_request(client, engine):
    for attention in ({"scheme": "streaming"}, "streaming"):
        body = post(client, prompt="Hi", attention=attention).json()
        assert body["usage"]["attention"]["scheme"] == "streaming"
    assert engine.requests[0].scheme.name == "streaming"


def test_cache_salts_are_kept_apart(client, engine):
    for salt in ("a", "b", None):
        post(client, prompt="Hi", cache_salt=salt)
    assert len({request.salt for request in engine.requests}) == 3


def test_add_special_tokens_is_passed_on(client, engine):
    seen = []
    engine.tokenize = lambda text, add_special_tokens: seen.append(add_special_tokens) or [1]
    post(client, prompt="Hi")
    post(client, prompt="Hi", add_special_tokens=False)
    assert seen == [True, False]
