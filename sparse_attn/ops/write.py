"""``write_kv`` puts new keys and values into pages, ``rotate_write_kv`` rotates them first; ``page_stats`` recomputes
what is kept beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from foveate.kv_cache.stats import Fold, PageStat
from foveate.kv_cache.stored import quantize
from foveate.kv_cache.view import LayerPages

from . import write_native

Backend = Literal["torch", "native", "triton"]


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
            page's statistics afresh, and the first slot of a run those of the run, so what an
            earlier owner left shows in no run that holds a token.
        backend: For tests.

    Raises:
        ValueError: shapes do not fit.
        IndexError: a slot lies behind the last page; on a CPU, where it can be seen.
    """
    _check(key, value, pages, slots)
    chosen = backend or _default_backend(key, value, pages)
    if chosen == "triton":
        from . import write_triton

        write_triton.write_kv(key, value, pages, slots)
    elif chosen == "native":
        write_native.write_kv(key, value, pages, slots)
    else:
        _write_kv_torch(key, value, pages, slots)


def rotate_write_kv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: LayerPages,
    slots: torch.Tensor,
    *,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Rotates T queries and keys to their positions (RoPE, arXiv:2104.09864), and writes keys and values.

    Args:
        query: ``[T, H, D]``; given up: the native kernel rotates it where it lies.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        cos: ``[T, R]``, R <= D even: channel ``i`` of the first R/2 and channel ``i + R/2`` turn together, the
            channels from R on stay.
        sin: ``[T, R]``.
        pages, slots, backend: As in ``write_kv``.

    Returns:
        ``[T, H, D]`` rotated queries.

    Raises:
        ValueError: shapes do not fit.
        IndexError: as in ``write_kv``.
    """
    _check(key, value, pages, slots)
    if query.shape[::2] != key.shape[::2] or cos.shape != sin.shape or cos.shape[0] != key.shape[0]:
        raise ValueError(
            f"query {tuple(query.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} "
            f"do not fit key {tuple(key.shape)}"
        )
    if (backend or _default_backend(key, value, pages)) == "native" and write_native.rotates(query, key, cos, sin):
        write_native.write_kv(key, value, pages, slots, (query, cos, sin))
        return query
    write_kv(rotate_halves(key, cos, sin), value, pages, slots, backend=backend)
    return rotate_halves(query, cos, sin)


def rotate_halves(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotated ``rows`` ``[T, heads, D]``, computed in float32; see ``rotate_write_kv``."""
    turned = cos.shape[1]
    exact, rest = rows[..., :turned].float(), rows[..., turned:]
    first, second = exact.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    rotated = exact * cos.float()[:, None] + swapped * sin.float()[:, None]
    return torch.cat([rotated.to(rows.dtype), rest], dim=-1)


def _check(key: torch.Tensor, value: torch.Tensor, pages: LayerPages, slots: torch.Tensor) -> None:
    if key.shape != value.shape or key.shape[0] != slots.shape[0] or key.shape[1:] != pages.keys.shape[1::2]:
        raise ValueError(
            f"key {tuple(key.shape)}, value {tuple(value.shape)} and slots {tuple(slots.shape)} "
            f"do not fit pages {tuple(pages.keys.shape)}"
        )


def _default_backend(key: torch.Tensor, value: torch.Tensor, pages: LayerPages) -> Backend:
    if key.is_cuda:
        return "triton"
    return "native" if write_native.supports(key, value, pages) else "torch"


def _write_kv_torch(key: torch.Tensor, value: torch.Tensor, pages: LayerPages, slots: torch.Tensor) -> None:
    written = slots >= 0
    if not bool(written.all()):
        key, value, slots = key[written], value[written], slots[written]
    page, offset = slots // pages.page_size, slots % pages.page_size
    # Advanced indices around a slice put the token axis first: [T, G, D], as key has it.
    if pages.key_scales is not None and pages.value_scales is not None:
        stored_key, pages.key_scales[page, :, offset] = quantize(key)
        stored_value, pages.value_scales[page, :, offset] = quantize(value)
    else:
        stored_key, stored_value = key.to(pages.keys.dtype), value.to(pages.values.dtype)
    pages.keys[page, :, offset] = stored_key
    pages.values[page, :, offset] = stored_value
    if not pages.stats or not len(slots):
        return
    # The statistics are those of the rows as they will be read.
    read = {"key": pages.key_rows()[page, :, offset], "value": pages.value_rows()[page, :, offset]}
    for stat, kept in pages.stats.items():
        rows, size = read[stat.source].float(), stat.run_tokens or pages.page_size
        runs = kept if stat.run_tokens else kept[:, :, None]
        # A page holds whole runs, so they are numbered through.
        touched, owner = torch.unique_consecutive(slots // size, return_inverse=True)
        place = (touched * size // pages.page_size, slice(None), touched * size % pages.page_size // size)
        fresh = (slots % size == 0).new_zeros(len(touched)).scatter_(0, owner[slots % size == 0], True)
        held = torch.where(fresh[:, None, None], stat.fold.empty, runs[place])
        runs[place] = held.scatter_reduce_(0, owner[:, None, None].expand_as(rows), rows, _SCATTER[stat.fold])


_SCATTER = {Fold.SUM: "sum", Fold.MIN: "amin", Fold.MAX: "amax"}


def page_stats(pages: LayerPages, page: int, num_tokens: int) -> Mapping[PageStat, torch.Tensor]:
    """Recomputes the statistics of one page from its first ``num_tokens`` rows: the truth for ``write_kv``.

    Returns:
        Declared statistic -> ``[G, D]`` float32, or ``[G, R, D]`` of the R runs that hold a token.
    """
    source = {"key": pages.key_rows(), "value": pages.value_rows()}
    found = {}
    for stat in pages.stats:
        rows, size = source[stat.source][page, :, :num_tokens].float(), stat.run_tokens or pages.page_size
        runs = torch.stack([stat.fold.reduce(run, dim=1) for run in torch.split(rows, size, 1)], dim=1)
        found[stat] = runs if stat.run_tokens else runs[:, 0]
    return found
