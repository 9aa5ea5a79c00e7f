"""``tests/bench/turns.py``: only one process runs at a time, and its times are its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
from turns import Side, SideFailed, take_turns

BENCH = Path(__file__).parents[1] / "bench"

# Works for `work` seconds of its own processor time, so a stop costs it none; then answers.
SIDE = """
import json, sys, time
def tell(event, **more): print(json.dumps({"event": event, **more}), flush=True)
print("a line of a library")
tell("ready")
for line in sys.stdin:
    prompt = json.load(open(line.strip()))
    started = time.process_time()
    while time.process_time() - started < float(sys.argv[1]) * len(prompt["ids"]): pass
    tell("first")
    tell("last", ids=prompt["ids"][:prompt["new_tokens"]])
"""


EVEN = {"quick": 0.05, "slow": 0.05, "first": 0.05, "second": 0.05}


@pytest.fixture
def prompts(tmp_path):
    files = [tmp_path / f"{index}.json" for index in range(3)]
    for index, file in enumerate(files):
        file.write_text(json.dumps({"ids": [index] * 10, "new_tokens": index + 2}))
    return files


def command(work: float) -> list[str]:
    return [sys.executable, "-c", SIDE, str(work)]


def test_each_side_answers_each_prompt_and_the_quick_one_begins_again(prompts):
    answers = take_turns({"quick": command(0.001), "slow": command(0.1)}, prompts[1:], prompts[0], EVEN)
    assert [answer.ids for answer in answers["slow"]] == [(1, 1, 1), (2, 2, 2, 2)]
    assert [answer.ids for answer in answers["quick"][:3]] == [(1, 1, 1), (2, 2, 2, 2), (1, 1, 1)]


def test_one_runs_at_a_time_and_is_charged_for_its_own_turns(prompts):
    states: list[str] = []

    def on_turn(sides):
        states.extend(Path(f"/proc/{side.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for side in sides)

    start = time.monotonic()
    turns = {"quick": 0.01, "slow": 0.02}
    answers = take_turns({"quick": command(0.01), "slow": command(0.1)}, prompts[:1], prompts[0], turns, on_turn)
    wall = time.monotonic() - start
    assert len(states) > 20
    assert set(states) == {"T"}  # rounds end with all stopped, the slow one in the midst of it
    charged = [answer.first_seconds for side in answers.values() for answer in side]
    # No less than the work that the prompt is, and no second charged to both: bounds that hold at any load.
    assert min(charged) >= 0.1
    assert answers["slow"][0].first_seconds >= 1
    assert sum(charged) < wall


def test_a_side_that_died_between_its_turns_is_told(prompts):
    """Its prompt goes into a pipe that nobody reads."""
    program = "import os, sys; print('{\"event\": \"ready\"}', flush=True); os.close(0); sys.exit('out of memory')"
    with Side("second", [sys.executable, "-c", program]) as side:
        os.waitid(os.P_PID, side.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SideFailed, match=r"(?s)second ended with 1.*out of memory"):
            side.load(prompts[0])


def test_no_stopped_process_outlives_its_parent(prompts):
    parent = f"""
import os, sys
sys.path.append({str(BENCH)!r})
from turns import Side
side = Side("first", [sys.executable, "-c", {SIDE!r}, "1"])
side.turn({str(prompts[0])!r}, 0.01)
print(side.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    status = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 60
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
        assert time.monotonic() < deadline, "it was left stopped"
        time.sleep(0.01)


@pytest.mark.parametrize("tells", ["", "ready"], ids=["loading", "asked"])
def test_what_a_dead_side_said_is_told(prompts, tells):
    program = f"import sys; print('{{\"event\": \"{tells}\"}}', flush=True); sys.exit('no such model')"
    dies = [sys.executable, "-c", program]
    with pytest.raises(SideFailed, match=r"(?s)second ended with 1.*no such model"):
        take_turns({"first": command(0.001), "second": dies}, prompts, prompts[0], EVEN)


LLAMA_SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["cache_prompt"] is False and asked["temperature"] == 0
        self.send_response(200); self.end_headers()
        pieces = [dict(tokens=[token], tokens_predicted=number) for number, token in enumerate(asked["prompt"][:2], 1)]
        for piece in [*pieces, dict(tokens=[], tokens_predicted=asked["n_predict"], stop=True)]:
            self.wfile.write(b"data: " + json.dumps(piece).encode() + b"\\n\\n")

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def llamacpp(server: str) -> list[str]:
    side = [sys.executable, str(BENCH / "side_llamacpp.py"), server, "model.gguf"]
    return [*side, "--threads", "1", "--max-context", "64", "--kv-dtype", "f16"]


def test_the_side_of_llamacpp_counts_tokens_that_its_server_does_not_name(prompts, tmp_path):
    server = tmp_path / "llama-server"
    server.write_text(LLAMA_SERVER.format(python=sys.executable))
    server.chmod(0o755)
    answers = take_turns({"llama.cpp": llamacpp(str(server))}, prompts[1:], prompts[0], {"llama.cpp": 10})
    assert [answer.ids for answer in answers["llama.cpp"]] == [(1, 1), (2, 2)]  # of 3 and 4 tokens
    assert all(answer.token_seconds >= 0 for answer in answers["llama.cpp"])


def test_a_llama_server_that_ends_is_told(prompts):
    with pytest.raises(SideFailed, match="llama-server ended with 1"):
        take_turns({"llama.cpp": llamacpp("false")}, prompts, prompts[0], {"llama.cpp": 10})


VLLM = """
import os
from types import SimpleNamespace

EngineArgs = SamplingParams = SimpleNamespace

class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        assert args.max_model_len == 64 and not args.enable_prefix_caching
        return cls()

    def add_request(self, name, prompt, sampling):
        assert sampling.min_tokens == sampling.max_tokens and sampling.ignore_eos
        self.unread, self.new, self.said = prompt["prompt_token_ids"], sampling.max_tokens, ()

    def has_unfinished_requests(self):
        return len(self.said) < self.new

    def step(self):
        os.write(1, b'{"event": "last", "ids": [9, 9]}\\n')  # what a library prints is not the side's word
        if self.unread:
            self.unread = self.unread[4:]  # a piece of the prompt, of which nothing is said yet
            return []
        self.said += (7,)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=self.said)])]
"""


def test_the_side_of_vllm_tells_of_the_first_token_and_of_the_last(prompts, tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    (package / "v1" / "engine").mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM)
    (package / "v1" / "engine" / "llm_engine.py").write_text("from vllm import LLMEngine\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    side = [sys.executable, str(BENCH / "side_vllm.py"), "model", "--cache-gib", "1"]
    side += ["--max-context", "64", "--dtype", "float32"]
    answers = take_turns({"vllm": side}, prompts[1:], prompts[0], {"vllm": 10})
    assert [answer.ids for answer in answers["vllm"]] == [(7,) * 3, (7,) * 4]
