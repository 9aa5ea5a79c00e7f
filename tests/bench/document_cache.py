"""Time to the first token of a long document: computed, and from the document cache on disk after a restart.

    .venv/bin/python tests/bench/document_cache.py --dtype bfloat16

The server is stopped between the two, and the files are dropped from the page cache, so they come from the disk.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from serving import Server

DOCUMENT = Path(__file__).parent / "data" / "gpl-3.0.txt"


def first_token(server: Server, prompt: str) -> tuple[float, int, int, str]:
    """Seconds to an answer of one token, prompt tokens, those from the cache, and the token."""
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    begin = time.perf_counter()
    told = server.ask("/v1/completions", body)
    seconds, usage = time.perf_counter() - begin, told["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return seconds, usage["prompt_tokens"], cached, told["choices"][0]["text"]


def drop_from_memory(folder: Path) -> int:
    """Makes the next read of the files come from the disk; returns their bytes."""
    size = 0
    for path in folder.rglob("*.run"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        size += path.stat().st_size
    return size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--characters", type=int, default=31_500, help="of the document")
    given = parser.parse_args()
    prompt = DOCUMENT.read_text(encoding="utf-8")[: given.characters]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        flags = ("--dtype", given.dtype, "--kv-cache-gib", "1", "--cache-dir", str(folder / "cache"))
        answers = []
        for name in ("computed", "from disk", "from disk, files in memory"):
            server = Server(given.model, folder / "log", *flags)
            first_token(server, "Warm up, please, with a few tokens, so that memory is mapped.")
            seconds, tokens, cached, text = first_token(server, prompt)
            again = first_token(server, prompt)[0]
            server.end()
            answers.append(text)
            # The warm-up's file is smaller than a page of tokens, so all bytes are the document's.
            size = (
                drop_from_memory(folder) if name == "computed" else sum(p.stat().st_size for p in folder.rglob("*.run"))
            )
            print(
                f"{name}: first token after {seconds:.2f} s, {cached} of {tokens} tokens cached (memory: {again:.2f} s)"
            )
        kept = tokens // 64 * 64
        print(f"{size / 2**20:.1f} MiB on disk, {size / kept * 1000 / 2**20:.2f} MiB per 1,000 tokens")
    return 0 if len(set(answers)) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
