"""MoBA's gate in torch where it works through its queries and pages in parts; ``test_moba.py`` compares it whole."""

from __future__ import annotations

import pytest
import torch

from foveate.kv_cache.stats import KEY_SUM
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import block_gate_torch

from .views import KV_HEADS, make_query, make_view

# The last block is full, has one key, or is the only one; the last sequence has fewer blocks than are asked for.
CONTEXTS, QUERIES = (96, 113, 16, 5, 40), (70, 33, 16, 5, 1)


@pytest.mark.parametrize("block", [8, 16, 32], ids="block{}".format)
@pytest.mark.parametrize("page", [16, 64], ids="page{}".format)
@pytest.mark.parametrize("top_k", [1, 3, 50], ids="top{}".format)
@pytest.mark.parametrize("pooled", [False, True], ids=["per-query-head", "per-kv-head"])
def test_the_size_of_a_slab_changes_no_choice(monkeypatch, block, page, top_k, pooled):
    view, _ = make_view(CONTEXTS, QUERIES, page, stats=[KEY_SUM])
    query = make_query(view)
    own = [
        (context - count + i) // block for context, count in zip(CONTEXTS, QUERIES, strict=True) for i in range(count)
    ]
    own = torch.tensor(own, dtype=torch.int32)
    arguments = query, view, block, top_k, (torch.zeros_like(own), own)
    want = ops.gate_blocks(*arguments, pooled=pooled, backend="reference")
    for queries in (1, 7, 1000):
        monkeypatch.setattr(block_gate_torch, "_SLAB_BYTES", queries * 4 * (KV_HEADS if pooled else 4) * 3)
        got = ops.gate_blocks(*arguments, pooled=pooled, backend="torch")
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    assert got[1].max() == min(top_k, int(own.max()) + 1)


@pytest.mark.parametrize("stats", [[KEY_SUM], []], ids=["page-sums", "keys"])
@pytest.mark.parametrize("block", [8, 16, 64], ids="block{}".format)
@pytest.mark.parametrize("page", [16, 64], ids="page{}".format)
@pytest.mark.parametrize("slab_pages", [1, 2, 256], ids="slab{}".format)
def test_means_are_of_whole_blocks_alone(monkeypatch, stats, block, page, slab_pages):
    """NaN stands behind the last key, in the page that it shares with whole blocks."""
    monkeypatch.setattr(block_gate_torch, "_SLAB_PAGES", slab_pages)
    view, (_, keys) = make_view([20, 203], [1, 1], page, stats=stats)
    blocks = 203 // block
    want = torch.stack([part.mean(0) for part in keys[: blocks * block].split(block)], dim=1)
    got = block_gate_torch.block_means(view, 1, block, blocks)
    torch.testing.assert_close(got, want)
    assert block_gate_torch.block_means(view, 0, block, 0).shape == (KV_HEADS, 0, view.head_dim)
