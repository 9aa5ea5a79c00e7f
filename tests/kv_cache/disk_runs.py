"""Runs of pages with contents that follow from a seed, for the tests of the store."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from foveate.kv_cache.disk import PageStore
from foveate.kv_cache.disk_format import RunHeader, checksum, pack_tokens, padded
from foveate.kv_cache.prefix import page_keys, sha256

PAGE = 16
NAMESPACE = b"n" * 32


def tokens_of(seed: int, pages: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2**17) for _ in range(pages * PAGE)]


def pages_of(seed: int, first: int, count: int, page_bytes: int) -> torch.Tensor:
    """``[count, stride]`` uint8; a page's bytes follow from its seed and its logical index alone."""
    rows = torch.zeros(count, padded(page_bytes), dtype=torch.uint8)
    for index in range(count):
        data = bytearray(random.Random(seed * 1000 + first + index).randbytes(page_bytes))
        rows[index, :page_bytes] = torch.frombuffer(data, dtype=torch.uint8)
    return rows


def run_of(
    seed: int,
    first: int = 0,
    count: int = 2,
    page_bytes: int = 3000,
    namespace: bytes = NAMESPACE,
    digest: Callable[[bytes], bytes] = sha256,
    tokens: list[int] | None = None,
) -> tuple[RunHeader, bytes, torch.Tensor]:
    """Pages ``first`` to ``first + count - 1`` of the prompt of ``seed``: header, tokens and pages."""
    tokens = tokens_of(seed, first + count) if tokens is None else tokens
    keys = page_keys(tokens, namespace, PAGE, digest)
    pages = pages_of(seed, first, count, page_bytes)
    parent = keys[first - 1] if first else b""
    sums = tuple(checksum(page) for page in pages)
    header = RunHeader(
        namespace, parent, first, PAGE, page_bytes, tuple(keys[first:]), sums, 1e9 + seed, {"model": f"seed-{seed}"}
    )
    return header, pack_tokens(tokens), pages


def store_at(directory: Path, limit_bytes: int = 2**30) -> PageStore:
    return PageStore(directory, limit_bytes)


def read_all(store: PageStore, seed: int, pages: int, namespace: bytes = NAMESPACE) -> list[torch.Tensor]:
    """Every page of the prompt of ``seed`` that the store gives, from the first on."""
    tokens = tokens_of(seed, pages)
    found: list[torch.Tensor] = []
    for span in store.spans(page_keys(tokens, namespace, PAGE)):
        got = store.read(span, len(found), namespace, pack_tokens(tokens))
        found += got
        if len(got) < span.count:
            break
    return found
