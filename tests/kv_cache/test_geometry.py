from __future__ import annotations

from typing import Any

import pytest
import torch

from foveate.kv_cache.errors import CacheConfigError, CacheError
from foveate.kv_cache.geometry import CacheGeometry, default_page_size

SIZES: dict[str, Any] = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 80, "page_size": 32, "num_pages": 7}


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "num_pages"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(CacheConfigError, match=f"{name} must be at least 1, got {value}"):
        CacheGeometry(**{**SIZES, name: value})


@pytest.mark.parametrize("page_size", [0, 1, 8, 15, 17, 48, 127, 256])
def test_a_page_size_out_of_range_or_no_power_of_two_is_refused(page_size: int) -> None:
    with pytest.raises(CacheConfigError, match=f"got {page_size}"):
        CacheGeometry(**{**SIZES, "page_size": page_size})


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
def test_powers_of_two_from_16_to_128_are_accepted(page_size: int) -> None:
    assert CacheGeometry(**{**SIZES, "page_size": page_size}).page_size == page_size


def test_a_config_error_is_both_a_cache_error_and_a_value_error() -> None:
    assert issubclass(CacheConfigError, CacheError)
    assert issubclass(CacheConfigError, ValueError)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=["fp32", "bf16"])
def test_bytes_per_page_counts_k_and_v_of_all_layers(dtype: torch.dtype, width: int) -> None:
    assert CacheGeometry(**SIZES, dtype=dtype).bytes_per_page == 2 * 3 * 2 * 32 * 80 * width


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (31, 1), (32, 1), (33, 2), (1000, 32)])
def test_pages_for_rounds_up(tokens: int, pages: int) -> None:
    assert CacheGeometry(**SIZES).pages_for(tokens) == pages


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_page_size_is_a_legal_one(device: str) -> None:
    size = default_page_size(torch.device(device))
    assert CacheGeometry(**{**SIZES, "page_size": size}).page_size == size
