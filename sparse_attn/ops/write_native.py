"""``write_kv`` on a CPU, by the compiled kernels of ``native/``: rows, scales and statistics in one pass."""

from __future__ import annotations

import torch

from foveate.kv_cache.view import LayerPages

from .native import DTYPES, STATS, WriteCall, library


def supports(key: torch.Tensor, value: torch.Tensor, pages: LayerPages) -> bool:
    """Can the kernels compute this call?

    They take float32 and bfloat16 for pages of the same type or of int8, head dims divisible by 16 up to 512, and the
    statistics that they know.
    """
    stored = torch.int8 if pages.quantized else key.dtype
    tensors = (pages.keys, pages.values, *pages.stats.values())
    return (
        key.device.type == "cpu"
        and key.dtype in DTYPES
        and value.dtype == key.dtype
        and pages.keys.dtype == pages.values.dtype == stored
        and key.shape[2] % 16 == 0
        and key.shape[2] <= 512
        and all(tensor.is_contiguous() for tensor in tensors)
        and all(stat.name in STATS for stat in pages.stats)
        and library() is not None
    )


def rotates(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Can the kernels also rotate? They take dense cos and sin of one type with the rest, a multiple of 16 wide."""
    return (
        query.dtype == cos.dtype == sin.dtype == key.dtype
        and query.stride(2) == 1
        and cos.is_contiguous()
        and sin.is_contiguous()
        and cos.shape[1] % 16 == 0
        and cos.shape[1] <= key.shape[2]
    )


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: LayerPages,
    slots: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See ``ops.write_kv``; with ``rotation``, query, cos and sin, ``ops.rotate_write_kv``."""
    kernels = library()
    if kernels is None:
        raise RuntimeError("the native CPU kernels were not built")
    tokens, heads, dim = key.shape
    key, value = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (key, value))
    slots = slots.to(torch.int64).contiguous()
    call = WriteCall(
        key=key.data_ptr(),
        value=value.data_ptr(),
        slots=slots.data_ptr(),
        keys=pages.keys.data_ptr(),
        values=pages.values.data_ptr(),
        key_scales=None if pages.key_scales is None else pages.key_scales.data_ptr(),
        value_scales=None if pages.value_scales is None else pages.value_scales.data_ptr(),
        key_token_stride=key.stride(0),
        key_head_stride=key.stride(1),
        value_token_stride=value.stride(0),
        value_head_stride=value.stride(1),
        num_tokens=tokens,
        num_pages=pages.keys.shape[0],
        num_kv_heads=heads,
        head_dim=dim,
        page_size=pages.page_size,
        dtype=DTYPES[key.dtype],
        num_threads=torch.get_num_threads(),
    )
    if rotation is not None:
        query, cos, sin = rotation
        call.query, call.cos, call.sin = query.data_ptr(), cos.data_ptr(), sin.data_ptr()
        call.query_token_stride, call.query_head_stride = query.stride(0), query.stride(1)
        call.num_heads, call.rotary_dim = query.shape[1], cos.shape[1]
    for stat, kept in pages.stats.items():
        setattr(call, stat.name, kept.data_ptr())
    if kernels.write(call):
        raise IndexError(f"a slot lies behind the {pages.keys.shape[0]} pages of {pages.page_size} tokens")
