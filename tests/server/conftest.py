"""A fake engine: a real byte-level tokenizer, scripted tokens, a thread of its own."""

from __future__ import annotations

import asyncio
import codecs
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.server.app import create_app
from foveate.server.engine_protocol import EngineSnapshot, EngineState
from foveate.server.exceptions import ContextOverflow, RequestAborted
from foveate.server.logs import JsonFormatter, TextFormatter
from foveate.server.request import (
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Progress,
    PromptLogprobs,
    TokenLogprob,
    Usage,
)
from foveate.server.sampling_limits import check_sampling
from foveate.server.settings import Settings
from foveate.sparse_attn import registry

ANSWER = "Grüße, 世界! 🦊 data: [DONE]\n\ndata: x"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' and loop.first %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHUNK = 64
CONTEXT = 4096


def make_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, and two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=chat_template)


class FakeEngine:
    """Answers every request with ``script``, token by token, from its own thread.

    Attributes:
        script: Text of every answer; it ends with "stop" unless ``max_tokens`` comes first.
        gate: While it is cleared, no event is made.
        hold_after: So many events from now on ``gate`` is cleared.
        step_seconds: Pause before every event.
        refuse: Raised by ``submit``.
        fail: Told instead of the third token.
        requests: Every request that was taken.
        aborts: Every id given to ``abort``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model_name = "fake-model"
        self.context_length = CONTEXT
        self.vocab_size = 300
        self.dtype = torch.float32
        self.tokenizer = tokenizer
        self.created = 1_700_000_000
        self.documents = None
        self.identity = {"weights": "0123", "dtype": "float32"}
        self.state: EngineState = "ready"
        self.default_scheme = registry.build("dense")
        self.script = ANSWER
        self.gate = threading.Event()
        self.gate.set()
        self.hold_after: int | None = None
        self.step_seconds = 0.0
        self.refuse: Exception | None = None
        self.fail: Exception | None = None
        self.heartbeat_age = 0.0
        self.requests: list[GenerationRequest] = []
        self.aborts: list[str] = []
        self.pages_used = 0
        self.generated = 0
        self._alive: dict[str, GenerationRequest] = {}
        self._plans: dict[str, Iterator[Event]] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, *requests: GenerationRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        for request in requests:
            check_sampling(request.sampling, self.vocab_size)
            max_tokens = 1 if request.sampling.max_tokens is None else request.sampling.max_tokens
            if len(request.prompt_token_ids) + max_tokens > self.context_length:
                raise ContextOverflow(len(request.prompt_token_ids), max_tokens, self.context_length)
        with self._changed:
            self.requests += requests
            self._alive |= {request.request_id: request for request in requests}
            self._plans |= {request.request_id: self._plan(request) for request in requests}
            self.pages_used += len(requests)
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        with self._changed:
            self.aborts.append(request_id)
            self._end(request_id, Failed(RequestAborted("aborted")))

    def build_scheme(self, attention: dict[str, Any] | None) -> Any:
        given = dict(attention or {})
        return registry.build(given.pop("scheme", "dense"), **given)

    def schemes(self) -> list[dict[str, Any]]:
        return registry.describe()

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            running=len(self._alive),
            waiting=0,
            pages_total=64,
            pages_free=64 - self.pages_used,
            pages_cached=0,
            pages_used=self.pages_used,
            heartbeat_age_seconds=self.heartbeat_age,
            preemptions=0,
            aborted=len(self.aborts),
            generated_tokens=self.generated,
            prompt_tokens=sum(len(request.prompt_token_ids) for request in self.requests),
            cached_tokens=0,
            keys_read=50.0,
            keys_dense=100.0,
            bad_logits=0,
            steps=7,
        )

    def shutdown(self, drain_seconds: float) -> None:
        self.state = "draining"
        deadline = time.monotonic() + drain_seconds
        while self._alive and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._changed:
            for request_id in list(self._alive):
                self._end(request_id, Failed(RequestAborted("shutdown")))
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self.state = "dead"

    def _run(self) -> None:
        """One event of every request in turn."""
        while True:
            with self._changed:
                while not (self._plans or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    return
                waiting = list(self._plans)
            for request_id in waiting:
                while not self.gate.wait(0.01):
                    if self._stopped:
                        return
                if self.step_seconds:
                    time.sleep(self.step_seconds)
                with self._changed:
                    plan = self._plans.get(request_id)
                    if plan is None:
                        continue
                    event = next(plan)
                    if self.hold_after is not None:
                        self.hold_after -= 1
                        if self.hold_after == 0:
                            self.gate.clear()
                    if isinstance(event, (Finished, Failed)):
                        self._end(request_id, event)
                    else:
                        self._alive[request_id].on_event(event)

    def _end(self, request_id: str, event: Event) -> None:
        request = self._alive.pop(request_id, None)
        if request is not None:
            del self._plans[request_id]
            self.pages_used -= 1
            request.on_event(event)

    def _plan(self, request: GenerationRequest) -> Iterator[Event]:
        params, total = request.sampling, len(request.prompt_token_ids)
        for done in range(CHUNK, total + CHUNK, CHUNK):
            yield Progress(total, 0, min(done, total), 0.25)
        if params.prompt_logprobs is not None:
            ids = request.prompt_token_ids[1:]
            tops = [tuple((i, -1.0 - i) for i in range(params.prompt_logprobs))] * len(ids)
            yield PromptLogprobs(tuple(TokenLogprob(token, -0.25, top) for token, top in zip(ids, tops, strict=True)))
        if params.max_tokens == 0:
            for choice in range(params.n):
                yield Delta(choice, "", (), None, "length")
            yield Finished(Usage(total, 0, 0, request.scheme.name, 0.5, 1))
            return
        tokens = self.tokenizer.encode(self.script)
        limit = min(len(tokens), params.max_tokens or len(tokens))
        reason = "length" if limit < len(tokens) else "stop"
        readers = [codecs.getincrementaldecoder("utf-8")() for _ in range(params.n)]
        raw = [bytes([byte]) for byte in self.script.encode()]
        for step, choice in itertools.product(range(limit), range(params.n)):
            if self.fail is not None and step == 2:
                yield Failed(self.fail)
                return
            last = step == limit - 1
            logprobs = None
            if params.logprobs is not None:
                top = tuple((tokens[step] if i == 0 else i, -0.5 - i) for i in range(params.logprobs))
                logprobs = (TokenLogprob(tokens[step], float("-inf") if step == 1 else -0.5, top),)
            self.generated += 1
            text = readers[choice].decode(raw[step])
            yield Delta(choice, text, (tokens[step],), logprobs, reason if last else None)
        yield Finished(Usage(total, limit * params.n, 0, request.scheme.name, 0.5, 1))


@pytest.fixture(autouse=True)
def log_put_back() -> Iterator[None]:
    """The log that a test configured ends with it: the stream it writes to is closed then."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if type(handler.formatter) in (JsonFormatter, TextFormatter)]:
        root.removeHandler(handler)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template."""
    return make_tokenizer(chat_template=None)


@pytest.fixture
def engine(tokenizer: PreTrainedTokenizerFast) -> Iterator[FakeEngine]:
    engine = FakeEngine(tokenizer)
    yield engine
    engine.shutdown(0)


@pytest.fixture
def settings() -> Settings:
    return Settings(model="fake-model")


class LocalClient(TestClient):
    """Asks as one on the same machine does: without keys, the server answers to no name but this machine's."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__(app, base_url="http://localhost", **options)


@pytest.fixture
def client(engine: FakeEngine, settings: Settings) -> Iterator[LocalClient]:
    with LocalClient(create_app(engine, settings), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client_of(engine: FakeEngine) -> Iterator[Callable[..., LocalClient]]:
    """Makes a client of a server with other settings."""
    clients = []

    def make(**options: Any) -> LocalClient:
        app = create_app(engine, Settings(model="fake-model", **options))
        client = LocalClient(app, raise_server_exceptions=False)
        clients.append(client)
        return client.__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def events_of() -> Callable[[httpx.Response], list[Any]]:
    """Parses a stream strictly: comments, ``data:`` lines, blank lines, and ``[DONE]`` at the end."""
    return parse_events


def parse_events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.content.split(b"\n\n")
    assert blocks.pop() == b"", "the stream ends with a blank line"
    events = []
    for block in blocks:
        if not block.startswith(b":"):
            assert block.startswith(b"data: ")
            assert b"\n" not in block
            events.append(block.removeprefix(b"data: "))
    assert events.pop() == b"[DONE]"
    assert b"[DONE]" not in events
    return [json.loads(event) for event in events]


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits until ``condition`` holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return until


class Exchange:
    """One request to an ASGI app by hand: the client may stop reading, or go away, at any moment.

    Attributes:
        sent: Messages that the app sent.
        reading: While it is cleared, the app's ``send`` waits, as it does for a full socket.
        seconds_per_read: Time that each message takes to be read.
        cut: Whether the server cut the connection.
    """

    def __init__(self, app: Any, path: str, body: dict[str, Any]) -> None:
        self.sent: list[dict[str, Any]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.cut = False
        self.seconds_per_read = 0.0
        self._gone = asyncio.Event()
        self._request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "state": {"abort_connection": self._cut_off},
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    def leave(self) -> None:
        self._gone.set()

    def _cut_off(self) -> None:
        self.cut = True

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reading.wait()
        await asyncio.sleep(self.seconds_per_read)
        self.sent.append(message)


@pytest.fixture
def exchange() -> type[Exchange]:
    return Exchange


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random llama of 2 layers with a byte-level tokenizer, saved as a checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, eos_token_id=256, bos_token_id=None,
        pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(path)
    return str(path)
