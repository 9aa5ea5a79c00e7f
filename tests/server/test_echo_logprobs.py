"""``echo`` together with ``logprobs``, ``prompt_logprobs``, and prompts that are only scored."""

from __future__ import annotations

import threading

import pytest

from foveate.server import generation, routes_completions
from foveate.server.completion_logprobs import CompletionLogprobs, echoed, prompt_logprobs
from foveate.server.json_text import json_text
from foveate.server.request import TokenLogprob
from foveate.server.token_text import TokenText

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def post(client, **body):
    response = client.post("/v1/completions", json={"model": "fake-model", **body})
    assert response.status_code == 200, response.text
    return response


def check_offsets(text, logprobs):
    """Every token stands in the text where its offset says."""
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert "\ufffd" in token or text.startswith(token, offset), (token, offset)


def test_prompt_and_answer_in_one_list(client, engine):
    engine.script = "ok"
    choice = post(client, prompt="Hé?", echo=True, logprobs=1, max_tokens=5).json()["choices"][0]
    assert choice["text"] == "Hé?ok"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["H", "\ufffd", "\ufffd", "?", "o", "k"]
    assert logprobs["token_logprobs"] == [None, -0.25, -0.25, -0.25, -0.5, -9999.0]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"!": -1.0, "?": -0.25}, "the token itself is among them"
    check_offsets(choice["text"], logprobs)


def test_scoring_alone(client, engine):
    body = post(client, prompt=["Hi", "yo!"], echo=True, logprobs=0, max_tokens=0).json()
    assert [choice["text"] for choice in body["choices"]] == ["Hi", "yo!"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * 2
    assert body["choices"][1]["logprobs"] == {
        "tokens": ["y", "o", "!"],
        "token_logprobs": [None, -0.25, -0.25],
        "top_logprobs": [None, {"o": -0.25}, {"!": -0.25}],
        "text_offset": [0, 1, 2],
    }
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (5, 0)
    assert engine.pages_used == 0


def test_echo_alone_of_nothing_more(client, engine):
    choice = post(client, prompt="Hi", echo=True, max_tokens=0).json()["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == ("Hi", None, "length")
    assert engine.requests[0].sampling.prompt_logprobs is None


@pytest.mark.parametrize("max_tokens", [0, 7])
@pytest.mark.parametrize("length", [1, 3, 1300], ids="{}-tokens".format)
def test_a_stream_says_the_same(client, events_of, max_tokens, length):
    asked = {"prompt": ["b" * length, "aé"], "n": 2, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    whole = post(client, **asked).json()
    events = events_of(post(client, **asked, stream=True))
    assert max(len(event["choices"][0]["logprobs"]["tokens"]) for event in events) <= 512
    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for name in LISTS:
            assert [value for part in parts for value in part["logprobs"][name]] == choice["logprobs"][name]
        check_offsets(choice["text"], choice["logprobs"])


def test_a_stream_does_not_write_a_prompt_on_the_event_loop(client, monkeypatch):
    threads = []

    def watched(*given):
        threads.append(threading.current_thread().name)
        return echoed(*given)

    monkeypatch.setattr(routes_completions, "echoed", watched)
    asked = {"prompt": "Hi", "echo": True, "logprobs": 1, "max_tokens": 0}
    loop = client.portal.call(lambda: threading.current_thread().name)
    assert post(client, **asked, stream=True).status_code == 200
    assert threads
    assert loop not in threads


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"], ids=["text", "chat"])
def test_log_probabilities_in_one_piece_are_not_written_on_the_event_loop(client, monkeypatch, path):
    threads = []

    def watched(value):
        threads.append(threading.current_thread().name)
        return json_text(value)

    monkeypatch.setattr(generation, "json_text", watched)
    if path == "/v1/completions":
        answer = client.post(path, json={"prompt": "Hi", "logprobs": 1})
    else:
        answer = client.post(path, json={"messages": [{"role": "user", "content": "Hi"}], "logprobs": True})
    assert answer.json()["choices"][0]["logprobs"] is not None
    assert len(threads) == 1
    assert client.portal.call(lambda: threading.current_thread().name) not in threads


def test_prompt_logprobs(client):
    body = post(client, prompt=[64, 65], prompt_logprobs=1, max_tokens=1).json()
    assert body["choices"][0]["logprobs"] is None
    assert body["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "65": {"logprob": -0.25, "rank": None, "decoded_token": "b"},
            "0": {"logprob": -1.0, "rank": 1, "decoded_token": "!"},
        },
    ]


def test_prompt_logprobs_of_a_chat(client, engine):
    asked = {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 0, "max_tokens": 1}
    body = client.post("/v1/chat/completions", json=asked).json()
    ids = engine.requests[0].prompt_token_ids
    assert [None if entry is None else list(entry) for entry in body["prompt_logprobs"]] == [
        None,
        *([str(token)] for token in ids[1:]),
    ]
    assert "prompt_logprobs" not in client.post("/v1/chat/completions", json={**asked, "prompt_logprobs": None}).json()


def test_both_ways_at_once_each_shows_its_own(client, engine):
    choice = post(client, prompt="ab", echo=True, logprobs=0, prompt_logprobs=3, max_tokens=1).json()["choices"][0]
    assert engine.requests[0].sampling.prompt_logprobs == 3
    assert choice["logprobs"]["top_logprobs"][1] == {"b": -0.25}
    assert len(choice["prompt_logprobs"][1]) == 4


def test_nothing_at_all_is_refused(client):
    for body in ({}, {"logprobs": 1}, {"stream": True}):
        response = client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 0, **body})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 0}
    assert client.post("/v1/chat/completions", json=chat).json()["error"]["param"] == "max_tokens"


class Spoken:
    """A tokenizer like Llama 2's: a leading space in every word's token, and <s> in front of a text."""

    all_special_ids = (0,)
    pieces = ("<s>", " a", " Hello", " world", "é")

    def encode(self, text, add_special_tokens):
        return [1]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.pieces[token] for token in ids).removeprefix(" ")


class TestOffsets:
    def test_special_tokens_and_dropped_spaces_take_no_room(self):
        tokens = TokenText(Spoken())
        entries = [TokenLogprob(token, -1.0) for token in (2, 3, 4)]
        lists = echoed([0, 2, 3, 4], "Hello worldé", entries, 0, tokens)
        assert lists["tokens"] == ["<s>", " Hello", " world", "é"]
        assert lists["text_offset"] == [0, 0, 5, 11]

    @pytest.mark.parametrize(("skip", "offsets"), [(True, [7, 13, 13]), (False, [7, 13, 16])])
    def test_special_tokens_in_an_answer(self, skip, offsets):
        writer = CompletionLogprobs(TokenText(Spoken()), skip, 7)
        entries = [TokenLogprob(token, -1.0) for token in (2, 0, 3)]
        assert writer.lists(entries[:1])["text_offset"] + writer.lists(entries[1:])["text_offset"] == offsets

    def test_rank_is_that_among_the_best(self):
        entry = TokenLogprob(3, -2.0, ((2, -1.0), (3, -2.0)))
        ranks = {token: told["rank"] for token, told in prompt_logprobs([entry], 2, TokenText(Spoken()))[1].items()}
        assert ranks == {"3": 2, "2": 1}
