"""What the op benches are made of: cases that take turns with the machine's limit, and pages of random keys."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from foveate.kv_cache.geometry import CacheGeometry, default_page_size
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.stats import PageStat
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops.native import library as opened

from .shapes import Shape

# Decode walks through so many bytes per call, as a model does through its layers: no cache near the core holds them.
WALK_BYTES = 400 * 10**6
# Layers or copies that one call walks through at most: small ones need no more to leave the caches near the core.
MOST_STEPS = 256
# A GPU is kept waiting so long while a call is launched: 5 to 20 ms, by its clock.
LAUNCH_CYCLES = 20_000_000
# The product that stands for what the machine multiplies.
GEMM = (2048, 4096, 4096)

Call = Callable[[], object]
Limit = Literal["mm", "sum"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One combination of what the command line asks for.

    Attributes:
        shape: Heads and layer sizes.
        name: The shape's name.
        dtype: Of queries, keys, values and weights.
        stored: Of K and V in the pages: the same, or int8.
        device: Where.
        context: Tokens in the pages.
        queries: Of a chunk of a prompt.
        share: Of the keys that sparse attention reads.
        isas: Instruction sets of the native kernels; none on a GPU.
    """

    shape: Shape
    name: str
    dtype: torch.dtype
    stored: torch.dtype
    device: torch.device
    context: int
    queries: int
    share: float
    isas: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one input, by several kernels.

    Attributes:
        name: What is read or computed.
        calls: Kernel -> what to call.
        work: Operations, or bytes, of one such call; by kernel where they differ.
        limit: ``mm``: work is operations; ``sum``: bytes.
        steps: Layers that one call walks through; times are told per step.
    """

    name: str
    calls: Mapping[str, Call]
    work: float | Mapping[str, float]
    limit: Limit
    steps: int = 1

    def work_of(self, kernel: str) -> float:
        return self.work[kernel] if isinstance(self.work, Mapping) else self.work


def kernels(
    op: Callable[..., Any], setting: Setting, native: Callable[..., Any] | None = None
) -> dict[str, Callable[..., Any]]:
    """The implementations of an op that this setting has.

    Args:
        op: With a ``backend`` argument that knows ``torch``.
        setting: On a GPU there is one, which the op chooses.
        native: Its native kernel, with an ``isa`` argument; or the op itself, where its ``backend`` knows ``native``.
    """
    if setting.device.type != "cpu":
        return {"chosen by the op": op}
    found: dict[str, Callable[..., Any]] = {}
    library = opened()
    if library is not None and native is op:
        found = {f"native {library.isa}": partial(op, backend="native")}
    elif native is not None:
        found = {f"native {isa}": partial(native, isa=isa) for isa in setting.isas}
    return found | {"torch": partial(op, backend="torch")}


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one call.

    Attributes:
        seconds: Until its work was done; on a GPU the GPU's own, without what launching costs.
        host_seconds: Until the call returned; on a GPU its work may still be running then.
    """

    seconds: float
    host_seconds: float


def take_turns(calls: Mapping[str, Call], repeats: int, watch: Callable[[Call], Taken]) -> dict[str, Taken]:
    """Medians of each; the first round warms up."""
    times: dict[str, list[Taken]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            taken = watch(call)
            if turn:
                times[name].append(taken)
    return {
        name: Taken(statistics.median(t.seconds for t in taken), statistics.median(t.host_seconds for t in taken))
        for name, taken in times.items()
    }


def stopwatch(device: torch.device, cpu_time: bool) -> Callable[[Call], Taken]:
    """Measures by a GPU's own events; on a CPU by the clock, or by the time that the thread itself ran."""
    if device.type == "cuda":
        return partial(_on_gpu, device)
    clock = time.thread_time if cpu_time else time.perf_counter

    def watch(call: Call) -> Taken:
        start = clock()
        call()
        taken = clock() - start
        return Taken(taken, taken)

    return watch


def _on_gpu(device: torch.device, call: Call) -> Taken:
    cuda: Any = torch.cuda  # torch leaves these untyped
    first, last = (cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        cuda.synchronize()
        cuda._sleep(LAUNCH_CYCLES)  # meanwhile the call's kernels queue up, so that none waits for its launch
        first.record()
        start = time.perf_counter()
        call()
        host_seconds = time.perf_counter() - start
        last.record()
        last.synchronize()
    return Taken(first.elapsed_time(last) / 1e3, host_seconds)


class Limits:
    """What the machine can do: a large product, and reading a large tensor.

    Args:
        dtype: Of the product.
        device: Where.
    """

    names: Mapping[Limit, str] = {"mm": "torch.mm {} x {} x {}".format(*GEMM), "sum": "sum of a large tensor"}

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        rows, inner, columns = GEMM
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(inner, columns, device=device).to(dtype)
        large = torch.randn(WALK_BYTES // 4, device=device)
        self.calls: dict[Limit, Call] = {"mm": lambda: left @ right, "sum": lambda: large.sum()}
        self.work: dict[Limit, float] = {"mm": 2.0 * rows * inner * columns, "sum": float(large.nbytes)}


def pages_of(setting: Setting, queries: int, layers: int = 1, stats: Sequence[PageStat] = ()) -> list[PagedView]:
    """One sequence in each layer of a pool of random keys and values, its pages in mixed order."""
    geometry = geometry_of(setting, layers)
    pages, size = geometry.num_pages, geometry.page_size
    pool = PagePool(geometry, stats)
    key, value = torch.randn(2, pages * size, geometry.num_kv_heads, geometry.head_dim, device=setting.device).to(
        setting.dtype
    )
    slots = torch.arange(pages * size, device=setting.device)
    for layer in range(layers):
        ops.write_kv(key, value, pool.layer(layer), slots)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
    rows = Rows.build([order], [setting.context], [queries], setting.device)
    return [PagedView(pool.layer(layer), rows) for layer in range(layers)]


def geometry_of(setting: Setting, layers: int = 1) -> CacheGeometry:
    """Pages for the setting's context."""
    size, shape = default_page_size(setting.device), setting.shape
    pages = -(-setting.context // size)
    return CacheGeometry(layers, shape.kv_heads, shape.head_dim, size, pages, setting.stored, setting.device)


def steps_to_walk(bytes_per_step: float) -> int:
    """Layers, or copies of a weight, that together are as large as what decode walks through."""
    return min(max(1, int(WALK_BYTES // bytes_per_step)), MOST_STEPS)


def query_of(setting: Setting, queries: int) -> torch.Tensor:
    shape = setting.shape
    return torch.randn(queries, shape.heads, shape.head_dim, device=setting.device).to(setting.dtype)


def causal_pairs(setting: Setting) -> int:
    """(query, key) pairs of a chunk at the end of the context, one head."""
    return sum(range(setting.context - setting.queries + 1, setting.context + 1))
