"""``foveate doctor``: what this machine can do, and whether a model's attention is computed rightly."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator

import torch

from foveate.kv_cache.geometry import CacheGeometry
from foveate.patches.errors import PatchError
from foveate.patches.families import ModelFacts, facts
from foveate.patches.quantize import QuantizedLinear
from foveate.patches.verify import verify
from foveate.sparse_attn.ops import native

from .exceptions import EngineError
from .loader import LoadedModel, load
from .machine import cores, cpu_flags, memory_bytes, version_of
from .options import EngineOptions
from .packaged import PackagedModelError

GEMM_SIZE, GEMM_RUNS = 512, 5


def run(model: str | None) -> int:
    """Prints the report.

    Args:
        model: Packaged name, local directory or hub id to check too.

    Returns:
        Exit code: 1 if the model cannot be served, or an environment variable asks for what this machine lacks, else 0.
    """
    try:
        native.library()
    except ValueError as error:
        print(error)
        return 1
    _print(_machine())
    if model is None:
        return 0
    print()
    try:
        loaded = load(EngineOptions(model=model))
    except (PatchError, PackagedModelError, EngineError, OSError, ValueError) as error:
        print(f"{model} cannot be served: {error}")
        return 1
    try:
        _print(_facts(loaded))
    finally:
        loaded.attached.detach()
    report = verify(loaded.model)
    print(report)
    return 0 if report.passed else 1


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measured GFLOP/s of a square matrix product: the median of a few, after one to warm up."""
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(GEMM_RUNS + 1):
        start = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / statistics.median(seconds[1:]) / 1e9


def quantized_rate() -> float:
    """Measured GOPS of the same product by a layer with 8-bit weights and activations, rounding included."""
    layer = QuantizedLinear(torch.nn.Linear(GEMM_SIZE, GEMM_SIZE, bias=False), "int8")
    x = torch.randn(GEMM_SIZE, GEMM_SIZE).bfloat16()
    seconds = []
    for _ in range(GEMM_RUNS + 1):
        start = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - start)
    return 2 * GEMM_SIZE**3 / statistics.median(seconds[1:]) / 1e9


def _machine() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    for package in ("transformers", "triton", "flashinfer-python"):
        yield package, version_of(package)
    yield "cores", f"{cores()} ({torch.get_num_threads()} torch threads)"
    yield "memory", f"{memory_bytes() / 2**30:.1f} GiB"
    yield "cpu", f"{torch.backends.cpu.get_cpu_capability()} ({', '.join(cpu_flags()) or 'flags unknown'})"
    yield "attention kernels on cpu", _kernels()
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
        free, total = torch.cuda.mem_get_info()
        yield "gpu", f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        yield "gpu", "none that this torch can use"
    for device in devices:
        rates = {name: gemm_rate(getattr(torch, name), device) for name in ("float32", "bfloat16")}
        measured = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items())
        yield f"matrix product on {device.type}", f"{measured}: {max(rates, key=rates.__getitem__)} is faster"
    yield "with --quantization int8", f"{quantized_rate():.0f} GOPS on cpu, {_linear_kernels()}"


def _linear_kernels() -> str:
    kernels = native.library()
    return "in torch" if kernels is None or kernels.linear_isa is None else f"native, {kernels.linear_isa}"


def _kernels() -> str:
    kernels = native.library()
    if kernels is None:
        return f"torch only: {native.LIBRARY_NAME} is missing or does not load; install again with a C++ compiler"
    return f"native, {kernels.isa} of {', '.join(kernels.isas)}"


def _facts(loaded: LoadedModel) -> Iterator[tuple[str, str]]:
    known = facts(loaded.model.config)
    yield "model", f"{known.model_type}, {str(loaded.model.dtype).removeprefix('torch.')} on {loaded.model.device}"
    yield (
        "attention",
        (f"{known.num_layers} layers, {known.num_heads} heads over {known.num_kv_heads} KV heads of {known.head_dim}"),
    )
    windows = [window for window in known.windows if window]
    if windows:
        yield "sliding window", f"{max(windows)} tokens in {len(windows)} layers"
    if not all(known.rotates):
        yield "without rotation", f"{known.rotates.count(False)} layers"
    if known.softcap:
        yield "soft cap", f"{known.softcap:g}"
    if known.learned_sinks:
        yield "sinks", "learned, one per head"
    yield "context", f"{known.context_length} tokens"
    yield "kv cache", _bytes_per_token(known, loaded)
    yield "schemes that move positions", "available" if loaded.rotary else "not available: unknown rotary embedding"


def _bytes_per_token(known: ModelFacts, loaded: LoadedModel) -> str:
    own, eight = (
        CacheGeometry(known.num_layers, known.num_kv_heads, known.head_dim, 64, 1, dtype).bytes_per_token
        for dtype in (loaded.dtype, torch.int8)
    )
    return f"{own:,} bytes per token; with --kv-dtype int8 {eight:,}, {eight / own:.0%} of that (CPU only)"


def _print(lines: Iterator[tuple[str, str]]) -> None:
    for name, value in lines:
        print(f"{name + ':':<28} {value}", flush=True)
