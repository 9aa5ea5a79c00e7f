"""Clients that people use, each against a real server on a loopback port with a tiny random model."""

from __future__ import annotations

import asyncio
import shutil

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from foveate.server.engine import Engine
from foveate.server.options import EngineOptions

from .live_server import LiveServer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
SPARSE = {"attention": {"scheme": "streaming", "budget_tokens": 64}}


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(model_dir, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    engine = Engine.load(EngineOptions(str(directory), dtype="float32", page_size=16, kv_cache_gib=0.02))
    server = LiveServer(engine)
    server.model = engine.model_name
    yield server
    assert engine.snapshot().pages_used == 0, "every answer gave its pages back"
    server.stop()
    engine.shutdown(0)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


class TestOpenAI:
    """Answers are also validated, since the client itself takes any shape."""

    def test_models(self, client, server):
        assert [model.id for model in client.models.list()] == [server.model]
        Model.model_validate(client.models.retrieve(server.model).model_dump(), strict=True)
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("nosuch")
        assert caught.value.code == "model_not_found"

    def test_completions(self, client, server):
        asked = {"model": server.model, "prompt": "Hello", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**asked, logprobs=2)
        Completion.model_validate(whole.model_dump(), strict=True)
        choice = whole.choices[0]
        assert whole.usage.completion_tokens == len(choice.logprobs.tokens)
        assert len(choice.logprobs.top_logprobs[0]) in (2, 3)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

    def test_a_text_is_scored(self, client, server):
        text = "To be, or not to be"
        asked = {"model": server.model, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
        choice = client.completions.create(**asked).choices[0]
        assert choice.text == "".join(choice.logprobs.tokens) == text
        assert choice.logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
        assert choice.logprobs.text_offset == list(range(len(text)))
        again = client.completions.create(**asked).choices[0]
        assert again.logprobs.token_logprobs == choice.logprobs.token_logprobs, "a warm cache changes nothing"

    def test_chat(self, client, server):
        asked = {"model": server.model, "messages": HI, "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, n=2)
        ChatCompletion.model_validate(whole.model_dump(), strict=True)
        first = whole.choices[0]
        token = first.logprobs.content[0]
        assert bytes(token.bytes).decode(errors="replace") == token.token
        assert len(token.top_logprobs) == 2
        chunks = list(client.chat.completions.create(**asked, stream=True, extra_body=SPARSE))
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == first.message.content

    def test_responses(self, client, server):
        ends = {"logit_bias": {"256": 100}, "min_tokens": 4}  # after four tokens
        asked = {"model": server.model, "input": "Hi", "temperature": 0, "store": False, "extra_body": ends}
        whole = client.responses.create(**asked, instructions="Be brief.")
        Response.model_validate(whole.model_dump(exclude_unset=True))
        assert (whole.status, whole.usage.output_tokens) == ("completed", 5)
        with client.responses.stream(**asked, instructions="Be brief.") as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert text == final.output_text == whole.output_text
        turns = [{"role": "user", "content": "Hi"}, *final.output, {"role": "user", "content": "And?"}]
        assert client.responses.create(**{**asked, "input": turns}).usage.input_tokens > final.usage.input_tokens

    @pytest.mark.parametrize(
        ("asked", "error", "code"),
        [
            ({"prompt": "a" * 600}, openai.BadRequestError, "context_length_exceeded"),
            ({"prompt": "a", "temperature": 9}, openai.BadRequestError, "invalid_value"),
            ({"prompt": "a", "model": "nosuch"}, openai.NotFoundError, "model_not_found"),
        ],
        ids=["overflow", "value", "model"],
    )
    def test_errors(self, client, server, asked, error, code):
        with pytest.raises(error) as caught:
            client.completions.create(**{"model": server.model, **asked})
        assert caught.value.code == code


@pytest.fixture(scope="module")
def make(server):
    """Makes a chat model of LangChain."""
    from langchain_openai import ChatOpenAI

    def make(**options):
        return ChatOpenAI(
            base_url=server.url + "/v1",
            api_key="none",
            model=server.model,
            temperature=0,
            max_retries=0,
            max_tokens=8,
            **options,
        )

    return make


class TestLangChain:
    def test_invoke(self, make, server):
        answer = make(logprobs=True).invoke([("system", "Be brief."), ("human", "Hi")])
        assert answer.response_metadata["model_name"] == server.model
        assert answer.response_metadata["finish_reason"] in ("stop", "length")
        assert answer.response_metadata["system_fingerprint"].startswith("foveate-")
        assert len(answer.response_metadata["logprobs"]["content"]) == answer.usage_metadata["output_tokens"]

    def test_stream(self, make):
        whole = make().invoke("Hi")
        parts = list(make(stream_usage=True, extra_body={"return_progress": True}).stream("Hi"))
        assert "".join(part.content for part in parts) == whole.content
        total = parts[0]
        for part in parts[1:]:
            total += part
        assert total.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]

    def test_responses(self, make):
        model = make(use_responses_api=True)
        answer = model.invoke("Hi")
        parts = list(model.stream("Hi"))
        assert "".join(part.text for part in parts) == answer.text
        assert answer.usage_metadata["output_tokens"] > 0

    def test_completions(self, server):
        from langchain_openai import OpenAI

        model = OpenAI(base_url=server.url + "/v1", api_key="none", model=server.model, temperature=0, max_tokens=8)
        texts = model.generate(["Hi", "Ho"]).generations
        assert "".join(model.stream("Hi")) == texts[0][0].text


@pytest.fixture(scope="module")
def litellm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network for prices
        import litellm

        patch.setattr(litellm, "telemetry", False)
        patch.setattr(litellm, "num_retries", 0)
        # It takes the thread's event loop to call its hooks, and would make one that nobody closes.
        with asyncio.Runner() as runner:
            asyncio.set_event_loop(runner.get_loop())
            yield litellm


class TestLiteLLM:
    @pytest.fixture
    def asked(self, server):
        return {
            "model": f"openai/{server.model}",
            "api_base": server.url + "/v1",
            "api_key": "none",
            "temperature": 0,
            "max_tokens": 8,
        }

    def test_chat(self, litellm, asked):
        whole = litellm.completion(messages=HI, **asked, extra_body=SPARSE)
        parts = list(litellm.completion(messages=HI, **asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
        assert parts[-1].usage.total_tokens == whole.usage.total_tokens

    def test_completions(self, litellm, asked):
        answer = litellm.text_completion(prompt="Hi", **{**asked, "model": f"text-completion-{asked['model']}"})
        assert answer.usage.completion_tokens > 0

    def test_overflow_is_known_as_such(self, litellm, asked):
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(messages=[{"role": "user", "content": "a" * 600}], **asked)
