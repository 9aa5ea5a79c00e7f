"""llama.cpp's side of a comparison: answers prompts as ``turns`` says. Started by ``compare_peers.py``.

Its server runs as a child in the same process group, so that it stops and ends with this one.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from turns import die_with_parent

HOST = "127.0.0.1"


def tell(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", help="llama-server")
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--threads", required=True)
    parser.add_argument("--max-context", required=True)
    parser.add_argument("--kv-dtype", required=True)
    args = parser.parse_args()
    with socket.create_server((HOST, 0)) as spare:
        port = spare.getsockname()[1]
    command = [args.server, "-m", args.model, "--host", HOST, "--port", str(port), "-c", args.max_context, "-np", "1"]
    command += ["-t", args.threads, "-tb", args.threads, "-fa", "on", "-ctk", args.kv_dtype, "-ctv", args.kv_dtype]
    with subprocess.Popen(command, stdout=sys.stderr, preexec_fn=die_with_parent) as server:
        while not healthy(port):
            if server.poll() is not None:
                sys.exit(f"llama-server ended with {server.returncode}")
            time.sleep(0.2)
        tell("ready")
        for line in sys.stdin:
            prompt = json.loads(Path(line.strip()).read_text())
            answer(port, prompt["ids"], prompt["new_tokens"])
        server.terminate()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def answer(port: int, prompt: list[int], new_tokens: int) -> None:
    """Tells of the first token and of the last.

    The server sends no piece for a token whose text ends within a character, so not all ids are known.
    """
    body = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    connection = http.client.HTTPConnection(HOST, port)
    connection.request("POST", "/completion", json.dumps(body | {"stream": True, "return_tokens": True}))
    reply = connection.getresponse()
    if reply.status != 200:
        sys.exit(reply.read().decode())
    ids: list[int] = []
    tokens = 0
    for line in reply:
        if not line.startswith(b"data: {"):
            continue
        piece = json.loads(line.removeprefix(b"data: "))
        if not ids and piece["tokens"]:
            tell("first")
        ids += piece["tokens"]
        tokens = piece.get("tokens_predicted", tokens)
    connection.close()
    tell("last", ids=ids, tokens=tokens)


if __name__ == "__main__":
    main()
