"""What makes pages on disk those of another server: whatever changes how keys and values are made or laid out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.server.document_identity import identity_of
from foveate.server.options import EngineOptions

GEOMETRY, OPTIONS = CacheGeometry(3, 2, 16, 16, 40), EngineOptions("m")


@pytest.fixture
def loaded(tiny_llama):
    return SimpleNamespace(model=tiny_llama, dtype=torch.float32)


@pytest.mark.parametrize(
    "change",
    [{"page_size": 32}, {"dtype": torch.int8}, {"num_layers": 2}, {"num_kv_heads": 4}, {"head_dim": 32}],
    ids=lambda change: next(iter(change)),
)
def test_how_a_page_lies_in_memory(loaded, change):
    assert identity_of(loaded, replace(GEOMETRY, **change), OPTIONS) != identity_of(loaded, GEOMETRY, OPTIONS)


def test_how_weights_are_held_and_in_what_is_computed(loaded):
    plain = identity_of(loaded, GEOMETRY, OPTIONS)
    assert identity_of(loaded, GEOMETRY, replace(OPTIONS, quantization="int8")) != plain
    loaded.dtype = torch.bfloat16
    assert identity_of(loaded, GEOMETRY, OPTIONS) != plain


def test_how_large_the_pool_is_and_what_the_model_is_called_changes_nothing(loaded):
    plain = identity_of(loaded, GEOMETRY, OPTIONS)
    assert identity_of(loaded, replace(GEOMETRY, num_pages=7), EngineOptions("other", kv_cache_gib=1.0)) == plain
