"""200 clients at once against a real server process, a third of them hanging up: no page stays in use."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys

import httpx
import pytest

CLIENTS, LEAVING = 200, 67


@pytest.fixture
def server(model_dir):
    """URL of ``foveate serve`` on the tiny model; ended by SIGTERM, which must succeed."""
    command = [sys.executable, "-m", "foveate.server", "serve", model_dir, "--port", "0", "--page-size", "16"]
    options = ["--kv-cache-gib", "0.005", "--served-model-name", "tiny", "--max-batch-tokens", "128"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            yield next(line.split("ready on ")[1].strip() for line in process.stdout if "ready on " in line)
        finally:
            process.terminate()
            status = process.wait(60)
    assert status == 0


async def one(client, number):
    """Streams a completion; every third client leaves after a few events. Says how it ended."""
    leaving = number % 3 == 0
    body = {"model": "tiny", "prompt": f"{number} " + "x" * (number % 90), "max_tokens": 200 if leaving else 10}
    body |= {"stream": True, "ignore_eos": True, "seed": number, "n": 1 + number % 2}
    if number % 5 == 0:
        body["attention"] = {"scheme": "streaming", "budget_tokens": 32}
    finished, events = 0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return "done" if finished == body["n"] else "cut"
            if line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                finished += sum(choice["finish_reason"] == "length" for choice in chunk["choices"])
                events += 1
                if leaving and events > number % 7:
                    return "left"
    return "cut"


def gauge(text, name):
    return float(re.search(rf"^\S*{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)[1])


async def crowd(url):
    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        ends = await asyncio.gather(*(one(client, number) for number in range(CLIENTS)))
        for _ in range(600):
            metrics = (await client.get("/metrics")).text
            if gauge(metrics, "pages_used") == 0 and gauge(metrics, "requests_running") == 0:
                break
            await asyncio.sleep(0.1)
        return ends, metrics, (await client.get("/health")).status_code


def test_no_page_is_left_when_a_third_hangs_up(server):
    ends, metrics, health = asyncio.run(crowd(server))
    assert ends.count("left") == LEAVING
    assert ends.count("done") == CLIENTS - LEAVING
    assert gauge(metrics, "pages_used") == 0
    assert gauge(metrics, "requests_running") == 0
    assert health == 200
