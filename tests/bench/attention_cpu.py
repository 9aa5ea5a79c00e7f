"""Attention over pages on this CPU: native kernels and the torch path against what the machine can do.

``python tests/bench/attention_cpu.py`` prints, for float32 and bfloat16, prefill in GFLOP/s (2 products of 2 operations
per channel and visible key) beside a 2048 x 4096 x 4096 ``torch.mm``, and decode in GB/s of selected K and V beside the
``sum`` of a large tensor. ``share`` is the rate over that limit. Candidates take turns within one run, and medians are
printed, so that a slow second of a shared machine hits all of them.

Decode walks through the layers of a pool of 400 MB, as a model does, so no cache near the core holds the keys.

``--cpu-time`` measures on one thread by the time that the thread ran: steady also where others use the machine.
``--isas avx2,avx512`` adds other instruction sets of this CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import attention_native
from foveate.sparse_attn.ops.native import library
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Selection, Tiles

PAGE, TILE, POOL_BYTES = 64, 128, 400 * 10**6
# (query heads, KV heads, head dim): SmolLM2-135M, Qwen2.5-0.5B, Llama-3 8B
HEADS = ((9, 3, 64), (14, 2, 64), (32, 8, 128))
GEMM = (2048, 4096, 4096)

Candidate = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; ``rate`` in GFLOP/s or GB/s, ``share`` of the machine's limit in the same run."""

    phase: str
    dtype: str
    heads: str
    keys: str
    name: str
    milliseconds: float
    rate: float
    share: float


def take_turns(candidates: dict[str, Candidate], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, call in candidates.items():
            start = clock()
            call()
            if turn:  # the first warms up
                times[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def views(heads: tuple[int, int, int], context: int, queries: int, dtype: torch.dtype, layers: int) -> list[PagedView]:
    """One sequence in each layer of a pool, its pages in mixed order."""
    _, kv_heads, dim = heads
    pages = -(-context // PAGE)
    pool = PagePool(CacheGeometry(layers, kv_heads, dim, PAGE, pages, dtype))
    pool.keys.normal_()
    pool.values.normal_()
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
    rows = Rows.build([order], [context], [queries], torch.device("cpu"))
    return [PagedView(pool.layer(layer), rows) for layer in range(layers)]


def choose(view: PagedView, granularity: int, share: float, tile: int) -> Selection:
    """Random units for each tile, ``share`` of those behind it."""
    tiles = Tiles.of(view.rows, tile)
    units = -(-max(view.rows.host_context_lens) // granularity)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(len(tiles), view.num_kv_heads, units, generator=generator) < share
    mask &= torch.arange(units) < (tiles.position // granularity)[:, None, None]
    return Selection.from_mask(mask, granularity, tiles)


def implementations(isas: list[str], op: str) -> dict[str, Callable[..., object]]:
    native = getattr(attention_native, op)
    found = {f"native {isa}": (lambda *args, isa=isa: native(*args, isa=isa)) for isa in isas}
    torch_op = getattr(ops, op)
    return found | {"torch": lambda *args: torch_op(*args, backend="torch")}


def measure_prefill(heads: tuple[int, int, int], dtype: torch.dtype, args: argparse.Namespace) -> list[Row]:
    context, queries = args.context, args.queries
    (view,) = views(heads, context, queries, dtype, 1)
    count, _, dim = heads
    query = torch.randn(queries, count, dim).to(dtype)
    left, right = torch.randn(GEMM[0], GEMM[1]).to(dtype), torch.randn(GEMM[1], GEMM[2]).to(dtype)
    spec = AttentionSpec(dim**-0.5)
    rows = []
    for keys, selection in {"all": None, "pages, 10 %": choose(view, PAGE, 0.1, TILE)}.items():
        if selection is None:
            pairs = sum(range(context - queries + 1, context + 1)) * count
        else:
            each = selection.counts.sum(1) * PAGE * selection.tiles.query_count
            pairs = int(each.sum()) * (count // view.num_kv_heads)
        candidates: dict[str, Candidate] = {
            name: (lambda call=call, selection=selection: call(query, view, selection, spec))
            for name, call in implementations(args.isas, "prefill").items()
        }
        taken = take_turns(candidates | {"mm": lambda: left @ right}, args.repeats, args.clock)
        limit = 2 * GEMM[0] * GEMM[1] * GEMM[2] / taken.pop("mm") / 1e9
        rows += _rows("prefill", dtype, heads, keys, taken, 4 * dim * pairs / 1e9, limit)
    return rows


def measure_decode(heads: tuple[int, int, int], dtype: torch.dtype, args: argparse.Namespace) -> list[Row]:
    count, kv_heads, dim = heads
    size = args.context * kv_heads * dim * 2 * dtype.itemsize
    layers = views(heads, args.context, 1, dtype, max(1, POOL_BYTES // size))
    query = torch.randn(1, count, dim).to(dtype)
    spec = AttentionSpec(dim**-0.5)
    large = torch.randn(POOL_BYTES // 4)
    choices = {
        "all": None,
        "pages, 10 %": choose(layers[0], PAGE, 0.1, 1),
        "16 tokens, 10 %": choose(layers[0], 16, 0.1, 1),
        "tokens, 10 %": choose(layers[0], 1, 0.1, 1),
    }
    rows = []
    for keys, selection in choices.items():
        read = float(size)
        if selection is not None:
            read = float(selection.counts.sum()) * selection.granularity * dim * 2 * dtype.itemsize
        candidates: dict[str, Candidate] = {
            name: (lambda call=call, selection=selection: [call(query, view, selection, spec) for view in layers])
            for name, call in implementations(args.isas, "decode").items()
        }
        taken = take_turns(candidates | {"sum": lambda: large.sum()}, args.repeats, args.clock)
        limit = large.nbytes / taken.pop("sum") / 1e9
        each = {name: seconds / len(layers) for name, seconds in taken.items()}
        rows += _rows("decode", dtype, heads, keys, each, read / 1e9, limit)
    return rows


def _rows(
    phase: str,
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    keys: str,
    taken: dict[str, float],
    work: float,
    limit: float,
) -> list[Row]:
    name = str(dtype).removeprefix("torch.")
    return [
        Row(phase, name, "{}/{} x {}".format(*heads), keys, who, seconds * 1e3, work / seconds, work / seconds / limit)
        for who, seconds in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8192, help="tokens of the sequence")
    parser.add_argument("--queries", type=int, default=512, help="of the prompt chunk")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isas", help="instruction sets, with commas between; the one in use if left out")
    parser.add_argument("--phases", default="prefill,decode")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    kernels = library()
    args.isas = args.isas.split(",") if args.isas else [kernels.isa] if kernels else []
    args.clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        args.clock = time.thread_time
    print(f"{torch.get_num_threads()} threads; rate in GFLOP/s (prefill) or GB/s (decode)")
    print("| phase | type | heads | keys | kernel | ms | rate | share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for phase in args.phases.split(","):
        measure = measure_prefill if phase == "prefill" else measure_decode
        for dtype in args.dtypes.split(","):
            for heads in HEADS:
                for row in measure(heads, getattr(torch, dtype), args):
                    figures = f"{row.milliseconds:.2f} | {row.rate:.1f} | {row.share:.2f}"
                    print(
                        f"| {row.phase} | {row.dtype} | {row.heads} | {row.keys} | {row.name} | {figures} |", flush=True
                    )


if __name__ == "__main__":
    main()
