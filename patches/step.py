"""From block tables to the ``StepState`` of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foveate.kv_cache.manager import KVCacheManager
from foveate.kv_cache.table import BlockTable
from foveate.kv_cache.view import Rows
from foveate.sparse_attn.budget import spans
from foveate.sparse_attn.protocol import Phase, QueryRotator, Scheme, StepGroup, StepState


def build_step(
    manager: KVCacheManager,
    chunks: Sequence[tuple[BlockTable, int]],
    scheme: Scheme | None,
    rotary: QueryRotator | None = None,
    prompt_tokens: int | None = None,
    dense_tail: bool = True,
) -> StepState:
    """Reserves pages for the next tokens of some sequences and describes their forward pass.

    Where nothing is said of the prompt, chunks of one token each, all behind a context, are a decode
    step. Any other step is prefill and counts as the end of the prompt, so its last queries are the
    scheme's dense tail.

    Args:
        manager: Owner of the tables. ``commit`` to it after the pass.
        chunks: Block table and number of new tokens (at least 1) of each sequence, in order of
            the packed row. Sequence ``i`` has row ``i`` of the step's ``keys_read``.
        scheme: One policy for all; ``None`` reads every key.
        rotary: For schemes that move positions.
        prompt_tokens: Length of every sequence's prompt: chunks of one token each are a decode step
            iff they all lie behind it, the dense tail is at its end, and schemes may ask for it.
        dense_tail: Whether the last queries of a prompt are the scheme's dense tail, where it has one.

    Raises:
        OutOfPages: the pool is too full. Tables keep what was reserved for them.
    """
    for table, count in chunks:
        manager.reserve(table, table.num_tokens + count)
    slots: list[int] = []
    positions: list[int] = []
    for table, count in chunks:
        slots += manager.slots(table, table.num_tokens, table.num_tokens + count)
        positions += range(table.num_tokens, table.num_tokens + count)
    device = manager.pool.geometry.device
    return StepState(
        pool=manager.pool,
        slots=torch.tensor(slots, dtype=torch.int64).to(device, non_blocking=True),
        positions=torch.tensor(positions, dtype=torch.int64).to(device, non_blocking=True),
        groups=_groups(chunks, scheme, prompt_tokens, dense_tail, device),
        rotary=rotary,
        keys_read=torch.zeros(len(chunks), 2, dtype=torch.float64, device=device),
    )


def _groups(
    chunks: Sequence[tuple[BlockTable, int]],
    scheme: Scheme | None,
    prompt_tokens: int | None,
    dense_tail: bool,
    device: torch.device,
) -> tuple[StepGroup, ...]:
    prompts = None if prompt_tokens is None else [prompt_tokens] * len(chunks)
    if all(count == 1 and table.num_tokens >= max(prompt_tokens or 0, 1) for table, count in chunks):
        scheme = scheme and scheme.for_phase(Phase.DECODE)
        return (_group(chunks, scheme, Phase.DECODE, prompts, device),)
    scheme = scheme and scheme.for_phase(Phase.PREFILL)
    if scheme is None or not dense_tail or not scheme.options.dense_tail_tokens:
        return (_group(chunks, scheme, Phase.PREFILL, prompts, device),)
    groups = []
    start = 0
    for owner, (table, count) in enumerate(chunks):
        stop = table.num_tokens + count
        for first, last, dense in spans(table.num_tokens, stop, prompt_tokens or stop, scheme.options):
            rows = Rows.build([list(table.pages)], [last], [last - first], device, prompts and prompts[:1])
            groups.append(StepGroup(None if dense else scheme, Phase.PREFILL, start, rows, (owner,)))
            start += last - first
    return tuple(groups)


def _group(
    chunks: Sequence[tuple[BlockTable, int]],
    scheme: Scheme | None,
    phase: Phase,
    prompts: list[int] | None,
    device: torch.device,
) -> StepGroup:
    rows = Rows.build(
        [list(table.pages) for table, _ in chunks],
        [table.num_tokens + count for table, count in chunks],
        [count for _, count in chunks],
        device,
        prompts,
    )
    return StepGroup(scheme, phase, 0, rows, tuple(range(len(chunks))))
