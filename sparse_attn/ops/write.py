"""``write_kv`` puts new keys and values into pages; ``page_stats`` recomputes what it keeps beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from foveate.kv_cache.stats import Fold, PageStat
from foveate.kv_cache.view import LayerPages

Backend = Literal["torch", "triton"]


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: LayerPages,
    slots: torch.Tensor,
    *,
    backend: Backend | None = None,
) -> None:
    """Writes T tokens and folds them into the statistics of their pages.

    Args:
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        pages: Changed in place.
        slots: ``[T]`` int64, ``page * page_size + offset``; -1 writes nowhere. The tokens of one
            page stand together and in order, as a sequence appends them. Offset 0 starts the
            page's statistics afresh, so what an earlier owner left never shows.
        backend: For tests.

    Raises:
        ValueError: shapes do not fit.
    """
    if key.shape != value.shape or key.shape[0] != slots.shape[0] or key.shape[1:] != pages.keys.shape[1::2]:
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)} and slots {tuple(slots.shape)} "
            f"do not fit pages {tuple(pages.keys.shape)}"
        )
    if (backend or ("triton" if key.is_cuda else "torch")) == "triton":
        from . import write_triton

        write_triton.write_kv(key, value, pages, slots)
    else:
        _write_kv_torch(key, value, pages, slots)


def _write_kv_torch(key: torch.Tensor, value: torch.Tensor, pages: LayerPages, slots: torch.Tensor) -> None:
    written = slots >= 0
    if not bool(written.all()):
        key, value, slots = key[written], value[written], slots[written]
    page, offset = slots // pages.page_size, slots % pages.page_size
    # Advanced indices around a slice put the token axis first: [T, G, D], as key has it.
    pages.keys[page, :, offset] = key.to(pages.keys.dtype)
    pages.values[page, :, offset] = value.to(pages.values.dtype)
    if not pages.stats or not len(slots):
        return
    touched, run = torch.unique_consecutive(page, return_inverse=True)
    fresh = page[offset == 0]
    for stat, kept in pages.stats.items():
        # Through the pool's dtype, so that the statistic is that of the stored rows.
        rows = (key if stat.source == "key" else value).to(pages.keys.dtype).float()
        kept[fresh] = stat.fold.empty
        spread = run[:, None, None].expand_as(rows)
        kept[touched] = kept[touched].scatter_reduce_(0, spread, rows, _SCATTER[stat.fold])


_SCATTER = {Fold.SUM: "sum", Fold.MIN: "amin", Fold.MAX: "amax"}


def page_stats(pages: LayerPages, page: int, num_tokens: int) -> Mapping[PageStat, torch.Tensor]:
    """Recomputes the statistics of one page from its first ``num_tokens`` rows: the truth for ``write_kv``.

    Returns:
        Declared statistic -> ``[G, D]`` float32.
    """
    source = {"key": pages.keys, "value": pages.values}
    return {stat: stat.fold.reduce(source[stat.source][page, :, :num_tokens].float(), dim=1) for stat in pages.stats}
