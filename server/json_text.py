"""JSON of what may be large, written so that others go on."""

from __future__ import annotations

import json
from typing import Any


def json_text(value: Any, *, ascii_only: bool = False) -> bytes:
    """``value`` as JSON, to be called in a thread.

    Log-probabilities of a long answer or prompt are tens of megabytes. The encoder in C would hold up every other
    thread, the event loop's among them, until it is done; the one in Python gives way, and takes ten times as long.
    """
    encoder = json.JSONEncoder(ensure_ascii=ascii_only, allow_nan=False, separators=(",", ":"))
    return "".join(encoder.iterencode(value)).encode()
