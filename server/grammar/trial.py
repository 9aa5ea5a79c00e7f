"""A process of its own in which grammars are compiled for the first time.

Some small grammars make a compiler run for minutes (500 patterns that must hold together) or end its process (3,000
rules in a chain overflow its stack). Here that costs this process, which the server replaces. Started by
``guard.Guard``; speaks lines of JSON over its standard input and output.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import threading

import llguidance

from .compile import matcher_of, normal_form, reason_of, tokenizer_of

# An eighth of the usual stack: what passes here is far from the edge in the server's threads.
_STACK_BYTES = 2**20
_MEMORY_BYTES = 4 * 2**30
_ORPHAN_SECONDS = 30.0
_WALK_TOKENS = 256
_COMPLEX = frozenset({"ParserTooComplex", "LexerTooComplex"})


def main() -> None:
    """Reads the tokenizer, then answers each grammar with its normal form or the reason against it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    tokenizer = tokenizer_of(**json.loads(sys.stdin.readline()))
    _say({"ready": True})
    for line in sys.stdin:
        # The server ends a trial after 5 s. If it is gone, nobody else will.
        signal.setitimer(signal.ITIMER_REAL, _ORPHAN_SECONDS)
        try:
            _say({"grammar": _try(tokenizer, **json.loads(line))})
        except Exception as error:
            _say({"error": reason_of(str(error))})
        signal.setitimer(signal.ITIMER_REAL, 0)


def _try(tokenizer: llguidance.LLTokenizer, kind: str, text: str) -> str:
    grammar = normal_form(kind, text)  # type: ignore[arg-type]
    matcher = matcher_of(tokenizer, grammar)
    draw = random.Random(0)
    for _ in range(_WALK_TOKENS):
        if matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        allowed = [8 * place + bit for place, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]
        if not allowed or not matcher.consume_token(draw.choice(allowed)):
            break
    if matcher.stop_reason() in _COMPLEX:
        raise ValueError("it is too complex")
    if matcher.stop_reason() == "InternalError":
        raise ValueError("answers cannot be held to it: " + reason_of(matcher.get_error()))
    return grammar


def _say(answer: dict[str, object]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
