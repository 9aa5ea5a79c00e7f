"""Compiles the Triton kernels for one GPU target, without a GPU; not collected by pytest.

``python aot_compile.py sm_90`` prints a JSON list, one entry per kernel and case: shared memory, registers,
bytes spilled, and which tensor-core instructions the machine code holds. The launches are those that the ops
would make on that GPU, argument for argument. ``python aot_compile.py sm_90 dearest`` compiles each kernel only in the
shapes that take the most registers and shared memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from foveate.kv_cache.stats import KEY_MAX, KEY_MIN, KEY_SUM, VALUE_SUM
from foveate.kv_cache.view import LayerPages, PagedView, Rows
from foveate.sparse_attn.ops import (
    anchor_triton,
    antidiagonal_triton,
    block_gate_triton,
    boundaries_triton,
    decode_triton,
    gathered_triton,
    key_change_triton,
    page_bounds_triton,
    prefill_triton,
    sums_triton,
    threshold_decode_triton,
    threshold_prefill_triton,
    topk_triton,
    write_triton,
)
from foveate.sparse_attn.ops.launch import Launch
from foveate.sparse_attn.ops.tiling import Unit
from foveate.sparse_attn.protocol import AttentionSpec
from foveate.sparse_attn.selection import Band, ScoreThreshold, Selection, Tiles

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Unit.MMA),
    "sm_90": (GPUTarget("cuda", 90, 32), Unit.WGMMA),
    "sm_100": (GPUTarget("cuda", 100, 32), Unit.WGMMA),
    "sm_120": (GPUTarget("cuda", 120, 32), Unit.MMA),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Unit.MFMA),
}
# Beyond 2 GiB, where 32-bit offsets no longer do, as real pools are.
POOL_PAGES = 1 << 20
TENSOR_CORE = {"cuda": r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", "hip": r"\b(v_mfma)_"}


def pages(kv_heads: int, dim: int, page_size: int) -> LayerPages:
    """Pages of no memory: only shapes, strides and types are compiled."""
    with torch.device("meta"):
        keys = torch.empty(POOL_PAGES, kv_heads, page_size, dim, dtype=torch.bfloat16)
        stats = {stat: torch.empty(POOL_PAGES, kv_heads, dim) for stat in (KEY_SUM, KEY_MIN, KEY_MAX, VALUE_SUM)}
        return LayerPages(keys, torch.empty_like(keys), stats)


def rows_of(contexts: tuple[int, ...], queries: tuple[int, ...], page_size: int) -> Rows:
    meta = torch.device("meta")
    return Rows.build([[0] * -(-context // page_size) for context in contexts], list(contexts), list(queries), meta)


def selection_of(rows: Rows, heads: int, granularity: int, tile: int) -> Selection:
    tiles = Tiles.of(rows, tile)
    indices = torch.empty(len(tiles), heads, 2048 // granularity, dtype=torch.int32, device="meta")
    return Selection(indices, torch.empty(indices.shape[:2], dtype=torch.int32, device="meta"), granularity, tiles)


def attention(group: int, dim: int, page_size: int, granularity: int | None, phase: str, **facts) -> list[Launch]:
    """The launches of one attention call with eight KV heads."""
    layer = pages(8, dim, page_size)
    rows = rows_of((8192, 8192), (4096, 4096), page_size) if phase == "prefill" else rows_of((8192,) * 4, (1,) * 4, 64)
    spec = AttentionSpec(dim**-0.5, **facts)
    query = torch.empty(rows.num_queries, 8 * group, dim, dtype=torch.bfloat16, device="meta")
    selection = granularity and selection_of(rows, 8, granularity, 128 if phase == "prefill" else 1)
    lse = torch.empty(query.shape[:2], device="meta")
    arguments = (query, PagedView(layer, rows), selection or None, spec, torch.empty_like(query), lse)
    if phase == "prefill":
        return [prefill_triton.plan(*arguments)]
    return list(decode_triton.plan(*arguments))


def thresholded(group: int, dim: int, page_size: int, phase: str, union: bool, **facts) -> list[Launch]:
    """The launches of one thresholded call with eight KV heads and a value mean."""
    layer = pages(8, dim, page_size)
    rows = rows_of((8192, 8192), (4096, 4096), page_size) if phase == "prefill" else rows_of((8192,) * 4, (1,) * 4, 64)
    query = torch.empty(rows.num_queries, 8 * group, dim, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(query.shape[:2], device="meta")
    threshold = ScoreThreshold(lse, value_mean=True, union=union, sink_tokens=64, recent_tokens=257)
    spec = AttentionSpec(dim**-0.5, **facts)
    kept = torch.empty_like(lse, dtype=torch.int32)
    arguments = (query, PagedView(layer, rows), threshold, spec)
    if phase == "prefill":
        out = torch.empty(query.shape, device="meta")
        return [threshold_prefill_triton.plan(*arguments, out, lse, lse, kept)]
    return list(threshold_decode_triton.plan(*arguments, torch.empty_like(query), lse, kept))


def writing(kv_heads: int, dim: int) -> list[Launch]:
    key = torch.empty(8192, kv_heads, dim, dtype=torch.bfloat16, device="meta")
    slots = torch.empty(8192, dtype=torch.int64, device="meta")
    return [write_triton.plan(key, torch.empty_like(key), pages(kv_heads, dim, 32), slots)]


def bounds(group: int, dim: int, tile: int) -> list[Launch]:
    layer = pages(8, dim, 16)
    rows = rows_of((32768,) * 4, (1,) * 4, 16) if tile == 1 else rows_of((32768,), (512,), 16)
    query = torch.empty(rows.num_queries, 8 * group, dim, dtype=torch.bfloat16, device="meta")
    tiles = Tiles.of(rows, tile)
    out = torch.empty(len(tiles), 8 * group, 2048, device="meta")
    return [page_bounds_triton.plan(query, PagedView(layer, rows), tiles, out)]


def antidiagonals(group: int, dim: int, stride: int, block: int = 128) -> list[Launch]:
    rows = rows_of((32768,), (512,), 16)
    query = torch.empty(512, 8 * group, dim, dtype=torch.bfloat16, device="meta")
    tiles = Tiles.of(rows, block)
    parts = torch.empty(len(tiles), 8 * group, block // stride, 32768 // block, device="meta")
    return [antidiagonal_triton.plan(query, PagedView(pages(8, dim, 16), rows), tiles, stride, 0.1, 0, parts)]


def anchoring(group: int, dim: int, tile: int, **facts) -> list[Launch]:
    """Both passes of anchor scores over one slab, with eight KV heads."""
    rows = rows_of((32768,) * 4, (1,) * 4, 32) if tile == 1 else rows_of((32768,), (512,), 32)
    query = torch.empty(rows.num_queries, 8 * group, dim, dtype=torch.bfloat16, device="meta")
    tiles = Tiles.of(rows, tile)
    parts = torch.empty(*query.shape[:2], 16 if tile == 1 else 1, device="meta")
    out = torch.empty(len(tiles), 8, 32768, device="meta")
    spec = AttentionSpec(dim**-0.5, **facts)
    view = PagedView(pages(8, dim, 32), rows)
    return list(anchor_triton.plan(query, view, tiles, spec, range(len(tiles)), parts, parts[..., 0], out))


def chunking(dim: int, page_size: int) -> list[Launch]:
    """What chunks of keys are made from and scored by."""
    view = PagedView(pages(8, dim, page_size), rows_of((32768,) * 2, (1,) * 2, page_size))
    run = torch.empty(2, 1024, dtype=torch.int32, device="meta")
    scores = torch.empty(2, 32768, device="meta")
    segments, picked = torch.empty(128, 512, device="meta"), torch.empty(128, 512, dtype=torch.int8, device="meta")
    return [
        sums_triton.plan(view, run, run, torch.empty(2, 1024, 8, dim, device="meta")),
        key_change_triton.plan(view, 4, 512, scores),
        boundaries_triton.plan(segments, run[0, :128], 1.1, 8, picked),
    ]


def choosing(units: int, masked: bool) -> list[Launch]:
    """The best units of each row, from scores."""
    scores = torch.empty(64, 8, units, device="meta")
    indices = torch.empty(64, 8, 2048, dtype=torch.int32, device="meta")
    row = torch.empty(64, dtype=torch.int32, device="meta")
    candidates = torch.empty(64, units, dtype=torch.bool, device="meta") if masked else (row, row)
    return [topk_triton.plan(scores, candidates, None if masked else row, masked, indices, indices[..., 0])]


def gating(group: int, dim: int, block: int, top_k: int, pooled: bool = False) -> list[Launch]:
    """MoBA's choice of blocks, and the reading of it with queries gathered per block."""
    view = PagedView(pages(8, dim, 32), rows_of((32768,), (512,), 32))
    query = torch.empty(512, 8 * group, dim, dtype=torch.bfloat16, device="meta")
    tiles = Tiles.of(view.rows, 1)
    indices = torch.empty(512, 8 if pooled else 8 * group, top_k, dtype=torch.int32, device="meta")
    selection = Selection(indices, indices[..., 0], block, tiles)
    means = torch.empty(1, 8, 32768 // block, dim, device="meta")
    candidates = torch.empty_like(tiles.position), torch.empty_like(tiles.position)
    spec, lse = AttentionSpec(dim**-0.5), torch.empty(query.shape[:2], device="meta")
    return [
        block_gate_triton.mean_plan(view, block, means),
        block_gate_triton.gate_plan(query, view, block, candidates, means, indices, indices[..., 0]),
        *gathered_triton.launches(query, view, selection, spec, torch.empty_like(query), lse),
    ]


def cases() -> Iterator[tuple[str, list[Launch]]]:
    """SmolLM2 (D 64, group 3), phi-2 (80, 1), Llama 3 70B and 8B (128, 8 and 4), Gemma (256, 4), gpt-oss (64, 8)."""
    sinks = torch.empty(64, dtype=torch.bfloat16, device="meta")
    window = {"band": Band(0, 128), "sinks": sinks}
    yield "prefill-d64-g8-window-sinks", attention(8, 64, 32, None, "prefill", **window)
    yield "prefill-d80-g1-selected64", attention(1, 80, 64, 64, "prefill")
    yield "prefill-d128-g8", attention(8, 128, 32, None, "prefill")
    yield "prefill-d128-g8-selected16", attention(8, 128, 32, 16, "prefill")
    yield "prefill-d256-g4-softcap", attention(4, 256, 32, None, "prefill", softcap=50.0)
    yield "decode-d64-g3-sinks", attention(3, 64, 32, None, "decode", sinks=sinks)
    yield "decode-d80-g1-window", attention(1, 80, 32, None, "decode", band=Band(0, 128))
    yield "decode-d128-g8-selected16", attention(8, 128, 32, 16, "decode")
    yield "decode-d256-g4-selected64-softcap", attention(4, 256, 64, 64, "decode", softcap=50.0)
    yield "thresholded-prefill-d64-g3-union", thresholded(3, 64, 32, "prefill", True)
    yield "thresholded-prefill-d128-g8-sinks", thresholded(8, 128, 32, "prefill", False, sinks=sinks)
    yield "thresholded-prefill-d256-g4-softcap", thresholded(4, 256, 32, "prefill", False, softcap=50.0)
    yield "thresholded-decode-d64-g8-sinks", thresholded(8, 64, 32, "decode", False, sinks=sinks)
    yield "thresholded-decode-d128-g4-union", thresholded(4, 128, 64, "decode", True)
    yield "thresholded-decode-d256-g4-softcap", thresholded(4, 256, 32, "decode", False, softcap=50.0)
    yield "write-d128", writing(8, 128)
    yield "bounds-d64-g3-decode", bounds(3, 64, 1)
    yield "bounds-d128-g4-prefill", bounds(4, 128, 128)
    yield "bounds-d256-g4-decode", bounds(4, 256, 1)
    yield "antidiagonal-d64-g3-s16", antidiagonals(3, 64, 16)
    yield "antidiagonal-d128-g8-s4", antidiagonals(8, 128, 4)
    yield "antidiagonal-d256-g1-s8-block64", antidiagonals(1, 256, 8, 64)
    yield "anchor-d64-g3-decode", anchoring(3, 64, 1)
    yield "anchor-d128-g4-prefill", anchoring(4, 128, 32)
    yield "anchor-d256-g4-prefill-softcap", anchoring(4, 256, 32, softcap=50.0)
    yield "chunks-d64", chunking(64, 32)
    yield "chunks-d80", chunking(80, 64)
    yield "chunks-d256", chunking(256, 64)
    yield "chosen-of-32768", choosing(32768, False)
    yield "chosen-of-few-masked", choosing(1000, True)
    yield "gated-d64-g3", gating(3, 64, 64, 16)
    yield "gated-d128-g8-pooled-block128", gating(8, 128, 128, 8, True)
    yield "gated-d256-g4", gating(4, 256, 64, 16)


# Each kernel once or twice, where it is most likely to spill or not to fit.
DEAREST = {
    "prefill-d128-g8-selected16", "prefill-d256-g4-softcap", "decode-d64-g3-sinks", "decode-d256-g4-selected64-softcap",
    "thresholded-prefill-d256-g4-softcap", "thresholded-decode-d256-g4-softcap", "write-d128", "bounds-d128-g4-prefill",
    "antidiagonal-d128-g8-s4", "anchor-d256-g4-prefill-softcap", "anchor-d64-g3-decode", "chunks-d256", "gated-d256-g4",
    "chosen-of-32768",
}  # fmt: skip


def compile_launch(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """Specialises arguments as a launch on that GPU would, and compiles."""
    backend, kernel = make_backend(target).__class__, launch.kernel
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        kind, key = "constexpr", value
        if not parameter.is_constexpr:
            special = not parameter.do_not_specialize
            kind, key = native_specialize_impl(backend, value, False, special, special)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif key:
            attributes[(place,)] = backend.parse_attr(key)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=launch.options)


def measure(compiled: triton.compiler.CompiledKernel, target: GPUTarget) -> dict[str, object]:
    """What the machine code uses."""
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        # Scalar registers spill into lanes of a vector register, which is not memory.
        spilled = sum(
            int(re.search(rf"\.{name}:\s*(\d+)", code)[1])
            for name in ("vgpr_spill_count", "private_segment_fixed_size")
        )
        lanes = int(re.search(r"\.sgpr_spill_count:\s*(\d+)", code)[1])
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
    else:
        # Tensor-core instructions have the same names in PTX, and disassembling took two fifths of all the time.
        lanes, code = 0, compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            Path(cubin.name).write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        # What is spilled lives in the stack frame.
        spilled = sum(int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL"))
        registers = int(re.search(r"\bREG:(\d+)", usage)[1])
    return {
        "shared": compiled.metadata.shared,
        "registers": registers,
        "spilled": spilled,
        "lanes": lanes,
        "tensor_core": sorted(set(re.findall(TENSOR_CORE[target.backend], code))),
    }


def main() -> None:
    target, unit = TARGETS[sys.argv[1]]
    for module in (
        prefill_triton, decode_triton, anchor_triton, antidiagonal_triton, threshold_prefill_triton,
        threshold_decode_triton, gathered_triton,
    ):  # fmt: skip
        module.unit_of = lambda device: unit
    results = []
    every = sys.argv[2:] != ["dearest"]
    for case, launches in cases():
        for launch in launches if every or case in DEAREST else ():
            kernel = launch.kernel.fn.__name__
            results.append({"case": f"{case}/{kernel}", **measure(compile_launch(launch, target), target)})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
