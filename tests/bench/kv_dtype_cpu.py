"""Decode and prefill attention on this CPU over int8 K and V against the same in bfloat16 and float32.

``python tests/bench/kv_dtype_cpu.py`` prints how many times faster int8 is: medians of calls that take turns, so that a
slow second of a shared machine hits both. A ratio above 1 is a gain; the bytes read would allow ``2 D / (D + 4)``.

Decode walks through the layers of pools of ``--pool-mb`` each, as a model does, so no cache near the core holds keys.
``--cpu-time`` measures on one thread by the time that the thread ran: steadier where others use the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.kv_cache.pool import PagePool
from foveate.kv_cache.view import PagedView, Rows
from foveate.sparse_attn import ops
from foveate.sparse_attn.ops import attention_native
from foveate.sparse_attn.ops.native import library
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Selection, Tiles

PAGE, TILE, QUERIES = 64, 128, 512
# (query heads, KV heads, head dim): SmolLM2-135M, Qwen2.5-0.5B, Llama-3 8B
HEADS = ((9, 3, 64), (14, 2, 64), (32, 8, 128))


def views(
    heads: tuple[int, int, int], context: int, queries: int, dtype: torch.dtype, stored: torch.dtype, layers: int
) -> list[PagedView]:
    """One sequence in each layer of a pool, its pages in mixed order."""
    _, kv_heads, dim = heads
    pages = -(-context // PAGE)
    pool = PagePool(CacheGeometry(layers, kv_heads, dim, PAGE, pages, stored))
    key, value = torch.randn(2, pages * PAGE, kv_heads, dim).to(dtype)
    for layer in range(layers):
        ops.write_kv(key, value, pool.layer(layer), torch.arange(pages * PAGE))
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).tolist()
    rows = Rows.build([order], [context], [queries], torch.device("cpu"))
    return [PagedView(pool.layer(layer), rows) for layer in range(layers)]


def choose(view: PagedView, granularity: int, share: float, tile: int) -> Selection:
    """Random units for each tile, ``share`` of those behind it."""
    tiles = Tiles.of(view.rows, tile)
    units = -(-max(view.rows.host_context_lens) // granularity)
    mask = torch.rand(len(tiles), view.num_kv_heads, units, generator=torch.Generator().manual_seed(1)) < share
    mask &= torch.arange(units) < (tiles.position // granularity)[:, None, None]
    return Selection.from_mask(mask, granularity, tiles)


def measure(
    phase: str, heads: tuple[int, int, int], context: int, dtype: torch.dtype, isa: str, args: argparse.Namespace
) -> None:
    count, kv_heads, dim = heads
    queries = 1 if phase == "decode" else min(QUERIES, context)
    size = context * kv_heads * dim * 2 * dtype.itemsize
    layers = max(1, args.pool_mb * 10**6 // size) if phase == "decode" else 1
    pools = {name: views(heads, context, queries, dtype, kind, layers) for name, kind in
             (("int8", torch.int8), ("full", dtype))}  # fmt: skip
    query = torch.randn(queries, count, dim).to(dtype)
    spec = AttentionSpec(dim**-0.5)
    op: Callable[..., object] = getattr(attention_native, phase)
    choices = {"all": None, "pages, 10 %": choose(pools["full"][0], PAGE, 0.1, 1 if phase == "decode" else TILE)}
    if phase == "decode":
        choices["tokens, 10 %"] = choose(pools["full"][0], 1, 0.1, 1)
    for keys, selection in choices.items():
        times: dict[str, list[float]] = {name: [] for name in pools}
        for turn in range(args.repeats + 1):
            for name, pool in pools.items():
                start = args.clock()
                for view in pool:
                    op(query, view, selection, spec, isa=isa)
                if turn:  # the first warms up
                    times[name].append((args.clock() - start) / layers)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        named = str(dtype).removeprefix("torch.")
        cells = (phase, isa, named, "{}/{} x {}".format(*heads), str(context), keys)
        ratio, limit = median["full"] / median["int8"], dtype.itemsize * dim / (dim + 4)
        figures = (f"{median['full'] * 1e3:.3f}", f"{median['int8'] * 1e3:.3f}", f"{ratio:.2f}", f"{limit:.2f}")
        print(f"| {' | '.join(cells + figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8192,32768")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--isas", help="instruction sets, with commas between; the one in use if left out")
    parser.add_argument("--phases", default="decode,prefill")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--heads", default="0,1,2", help="which of the shapes")
    parser.add_argument("--pool-mb", type=int, default=400)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    kernels = library()
    if kernels is None:
        raise SystemExit("the native kernels were not built")
    args.clock = time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
        args.clock = time.thread_time
    print(f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f}; milliseconds per layer")
    print("| phase | isa | type | heads | keys | read | full | int8 | faster | by bytes |")
    print("| --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for phase in args.phases.split(","):
        for isa in args.isas.split(",") if args.isas else [kernels.isa]:
            for dtype in args.dtypes.split(","):
                for heads in args.heads.split(","):
                    for context in map(int, args.contexts.split(",")):
                        measure(phase, HEADS[int(heads)], context, getattr(torch, dtype), isa, args)


if __name__ == "__main__":
    main()
