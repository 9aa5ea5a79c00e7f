"""A 32K prompt, in chunks and in one piece, and a token behind it: how much memory it takes beside the pages."""

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
from foveate.sparse_attn.protocol import AttentionSpec, LayerCall, Phase, Role, StepGroup, StepState

from .cases import PROFILES

HEADS, KV_HEADS, DIM, PAGE, LAYERS = 4, 2, 64, 64, 2
CONTEXT, CHUNK = 32_768, 512
# All logits of the chunk and their softmax would take 512 MiB. Without compiled kernels, a scheme that reads
# nearly everything per query head (xattention on noise) copies K and V of each: 279 MiB; the others at most 125.
# A prompt in one piece took 34 to 166 MiB with them, its output of 32 included, where one head's logits are 4 GiB.
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


def choosing(name):
    """The layers that choose keys of a prompt by the scheme itself, and read them.

    Where another scheme does it, it is measured under its own name; Kascade's anchors choose as exact_topk does.
    """
    scheme = registry.build(name, PROFILES)
    own = scheme.for_phase(Phase.PREFILL) is scheme
    return [layer for layer, role in enumerate(scheme.roles(LAYERS)) if own and role.role is Role.SELECT]


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
@pytest.mark.parametrize("name", registry.names())
def test_memory_beside_the_pages_is_bounded(name, phase):
    step = stepper(registry.build(name, PROFILES), phase)
    count = CHUNK if phase is Phase.PREFILL else 1
    step(count, range(LAYERS))  # libraries load, and thread pools start, in the first pass
    assert peak_mib(lambda: step(count, range(LAYERS))) < MOST_MIB


@pytest.mark.parametrize("name", [name for name in registry.names() if choosing(name)])
def test_memory_of_a_prompt_in_one_piece_is_bounded(name):
    step = stepper(registry.build(name, PROFILES), Phase.PREFILL)
    step(CHUNK, range(LAYERS))
    assert peak_mib(lambda: step(CONTEXT, choosing(name)[:1])) < MOST_MIB


def stepper(scheme, phase):
    """A function that computes the last so many tokens of the context in the layers given."""
    geometry = CacheGeometry(LAYERS, KV_HEADS, DIM, PAGE, CONTEXT // PAGE)
    pool = PagePool(geometry, scheme.page_stats(geometry))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(CONTEXT, KV_HEADS, DIM, generator=generator) for _ in range(2))
    for layer in range(LAYERS):
        ops.write_kv(key, value, pool.layer(layer), torch.arange(CONTEXT))
    queries = torch.randn(CONTEXT, HEADS, DIM, generator=generator)

    def step(count, layers):
        rows = Rows.build([list(range(CONTEXT // PAGE))], [CONTEXT], [count], torch.device("cpu"))
        query = queries[-count:]
        state = StepState(
            pool=pool,
            slots=torch.arange(CONTEXT - count, CONTEXT),
            positions=torch.arange(CONTEXT - count, CONTEXT),
            groups=[StepGroup(scheme.for_phase(phase), phase, 0, rows, (0,))],
            rotary=Rotator(),
            keys_read=torch.zeros(1, 2, dtype=torch.float64),
        )
        for layer in layers:
            attend(query, LayerCall(layer, AttentionSpec(DIM**-0.5)), state)

    return step
