"""Batch files for tests: lines, inputs, records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def chat_line(custom_id: Any, **body: Any) -> dict[str, Any]:
    body = {"model": "fake-model", "messages": [{"role": "user", "content": "Hi"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion_line(custom_id: Any, **body: Any) -> dict[str, Any]:
    body = {"model": "fake-model", "prompt": "Hi", "max_tokens": 5, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def response_line(custom_id: Any, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": {"input": "Hi", **body}}


def write_lines(path: Path, lines: list[Any]) -> Path:
    """A batch file of JSON values, and of lines as they are where they are bytes."""
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of an output; fails at a line that is none."""
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n"), "half a line"
    return [json.loads(line) for line in data.splitlines()]
