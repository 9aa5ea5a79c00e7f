"""Read-only pictures of the pool, handed to schemes and kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from .stats import PageStat
from .stored import StoredRows


@dataclass(frozen=True, slots=True, eq=False)
class LayerPages:
    """One layer of the pool.

    Attributes:
        keys: ``[P, G, page_size, D]``.
        values: ``[P, G, page_size, D]``.
        stats: Declared statistic -> ``[P, G, D]`` float32, or ``[P, G, R, D]``, of the rows as they are read.
        key_scales: ``[P, G, page_size]`` float32 where K and V are int8, else ``None``.
        value_scales: Likewise.
    """

    keys: torch.Tensor
    values: torch.Tensor
    stats: Mapping[PageStat, torch.Tensor]
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def quantized(self) -> bool:
        """Whether K and V are int8 with scales."""
        return self.key_scales is not None

    def key_rows(self, dtype: torch.dtype = torch.float32) -> StoredRows:
        """The keys as floats; int8 is read as ``dtype``."""
        return StoredRows(self.keys, self.key_scales, dtype)

    def value_rows(self, dtype: torch.dtype = torch.float32) -> StoredRows:
        """The values as floats; int8 is read as ``dtype``."""
        return StoredRows(self.values, self.value_scales, dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The sequences of one call: S sequences whose queries are packed one after another.

    The last query of sequence ``s`` sits at position ``context_lens[s] - 1``; the keys of this
    step are already written, so sequence ``s`` has ``context_lens[s]`` keys.

    Attributes:
        block_tables: ``[S, N]`` int32, logical page -> physical page, padded by 0.
        context_lens: ``[S]`` int32.
        query_offsets: ``[S + 1]`` int32, queries of ``s`` are ``query_offsets[s]:query_offsets[s + 1]``.
        host_context_lens: The same numbers on the host, so that no step waits for the device.
        host_query_lens: Queries per sequence, on the host.
        host_block_tables: Pages per sequence, on the host, not padded.
        plans: What a kernel worked out from these rows on the host, kept for the other layers of the step.
        host_prompt_lens: Tokens of each sequence that are prompt, some of which may be still to come;
            ``None`` if nobody knows.
        host_token_ids: Tokens of each sequence, at least up to its context, for schemes that asked for
            them; otherwise ``None``.
    """

    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_offsets: torch.Tensor
    host_context_lens: tuple[int, ...]
    host_query_lens: tuple[int, ...]
    host_block_tables: tuple[tuple[int, ...], ...]
    plans: dict[Any, Any] = field(default_factory=dict)
    host_prompt_lens: tuple[int, ...] | None = None
    host_token_ids: tuple[Sequence[int], ...] | None = None

    @classmethod
    def build(
        cls,
        block_tables: list[list[int]],
        context_lens: list[int],
        query_lens: list[int],
        device: torch.device,
        prompt_lens: list[int] | None = None,
        token_ids: list[Sequence[int]] | None = None,
    ) -> Rows:
        """Makes the tensors from host lists, in one upload."""
        width = max((len(pages) for pages in block_tables), default=0) or 1
        padded: list[int] = []
        for pages in block_tables:
            padded += pages
            padded += [0] * (width - len(pages))
        offsets = list(accumulate(query_lens, initial=0))
        tables, contexts, starts = upload((padded, context_lens, offsets), torch.int32, device)
        return cls(
            tables.view(len(block_tables), width),
            contexts,
            starts,
            tuple(context_lens),
            tuple(query_lens),
            tuple(tuple(pages) for pages in block_tables),
            host_prompt_lens=None if prompt_lens is None else tuple(prompt_lens),
            host_token_ids=None if token_ids is None else tuple(token_ids),
        )

    @property
    def num_sequences(self) -> int:
        return len(self.host_query_lens)

    @property
    def num_queries(self) -> int:
        return sum(self.host_query_lens)


def upload(parts: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Lists of numbers as tensors ``[len(part)]``, by one copy: each takes as long as a small layer, for few numbers.

    Each begins at a multiple of 16 bytes, since Triton compiles anew for an address that does not.
    """
    step = 16 // dtype.itemsize
    flat: list[int] = []
    for part in parts:
        flat += part
        flat += [0] * (-len(flat) % step)
    whole = torch.tensor(flat, dtype=dtype).to(device, non_blocking=True)
    made, first = [], 0
    for part in parts:
        made.append(whole[first : first + len(part)])
        first += (len(part) + step - 1) // step * step
    return made


@dataclass(frozen=True, slots=True, eq=False)
class PagedView:
    """One layer's pages as seen by the sequences of one call. Nobody writes through it."""

    pages: LayerPages
    rows: Rows

    @property
    def page_size(self) -> int:
        return self.pages.page_size

    @property
    def num_kv_heads(self) -> int:
        return self.pages.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.pages.keys.shape[3]
