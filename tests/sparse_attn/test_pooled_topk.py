"""``pooled_topk`` where some tiles can take everything, which need no scores, and others cannot."""

from __future__ import annotations

import pytest
import torch

from foveate.sparse_attn.ops import anchor, native
from foveate.sparse_attn.ops.anchor import anchor_scores, pooled_topk
from foveate.sparse_attn.ops.topk import top_units
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Tiles

from .views import make_query, make_view

SPEC = AttentionSpec(0.7)
BACKENDS = ["torch", *(["native"] if native.library() else [])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", ["group", "all"])
@pytest.mark.parametrize("slab", [1, 400, 1 << 20], ids=["a-tile-at-a-time", "some-slabs", "one-slab"])
@pytest.mark.parametrize("everything", ["none", "first", "last", "most", "all"])
def test_tiles_that_take_everything_change_no_other(monkeypatch, backend, pool, slab, everything):
    monkeypatch.setitem(anchor.SLAB_SCORES, "cpu", slab)
    view, _ = make_view([120, 33], [100, 33])
    query, tiles = make_query(view), Tiles.of(view.rows, 16)
    rows = range(len(tiles))
    whole = {"none": [], "first": rows[:1], "last": rows[-1:], "most": rows[1:], "all": rows}[everything]
    budgets = [1000 if row in whole else 5 for row in rows]
    candidates = torch.full_like(tiles.position, 2), tiles.position // 16 * 16
    got = pooled_topk(query, view, tiles, SPEC, candidates, budgets, pool=pool, backend=backend)
    got.validate(view.rows)
    scores = anchor_scores(query, view, tiles, SPEC, pool=pool, backend="reference")
    indices, counts = top_units(scores, candidates, torch.tensor(budgets), most=1000, backend="torch")
    for row in rows:
        for head in range(view.num_kv_heads):
            kind = 0 if pool == "all" else head
            want = indices[row, kind, : counts[row, kind]].tolist()
            assert got.indices[row, head, : got.counts[row, head]].tolist() == want
