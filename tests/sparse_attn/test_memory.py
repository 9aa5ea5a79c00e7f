"""The last chunk of a 32K prompt, the dearest one: how much memory it takes beside the pages, for every scheme."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import Rows
from foveate.sparse_attn import ops, registry
from foveate.sparse_attn.attend import attend
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, StepGroup, StepState

from .cases import PROFILES

HEADS, KV_HEADS, DIM, PAGE, LAYERS = 4, 2, 64, 64, 2
CONTEXT, CHUNK = 32_768, 512
# All logits of the chunk and their softmax would take 512 MiB. Without compiled kernels, a scheme that reads
# nearly everything per query head (xattention on noise) copies K and V of each: 279 MiB; the others at most 125.
MOST_MIB = 320


class Rotator:
    def cap(self, query, positions, cap, layer):
        return query


def peak_mib(work):
    """Most memory that ``work`` took at once, by the kernel's own count."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve now
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    work()
    return (status("VmHWM") - before) / 1024


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
@pytest.mark.parametrize("name", registry.names())
def test_memory_beside_the_pages_is_bounded(name, phase):
    scheme = registry.build(name, PROFILES)
    geometry = CacheGeometry(LAYERS, KV_HEADS, DIM, PAGE, CONTEXT // PAGE)
    pool = PagePool(geometry, scheme.page_stats(geometry))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(CONTEXT, KV_HEADS, DIM, generator=generator) for _ in range(2))
    for layer in range(LAYERS):
        ops.write_kv(key, value, pool.layer(layer), torch.arange(CONTEXT))
    count = CHUNK if phase is Phase.PREFILL else 1
    rows = Rows.build([list(range(CONTEXT // PAGE))], [CONTEXT], [count], torch.device("cpu"))
    query = torch.randn(count, HEADS, DIM, generator=generator)

    def step():
        state = StepState(
            pool=pool,
            slots=torch.arange(CONTEXT - count, CONTEXT),
            positions=torch.arange(CONTEXT - count, CONTEXT),
            groups=[StepGroup(scheme.for_phase(phase), phase, 0, rows, (0,))],
            rotary=Rotator(),
            keys_read=torch.zeros(1, 2, dtype=torch.float64),
        )
        for layer in range(LAYERS):
            attend(query, LayerCall(layer, AttentionSpec(DIM**-0.5)), state)

    step()  # libraries load, and thread pools start, in the first pass
    rows.plans.clear()
    assert peak_mib(step) < MOST_MIB
