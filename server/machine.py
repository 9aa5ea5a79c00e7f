"""What this machine is: what a report of speed must say of it, and ``foveate doctor`` too."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from foveate import __version__
from foveate.sparse_attn.ops import native

# Instruction sets that decide how fast a CPU multiplies matrices.
CPU_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)
PACKAGES = ("torch", "transformers", "triton", "flashinfer-python")


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads, memory and load, ready for JSON."""
    kernels = native.library()
    about: dict[str, Any] = {
        "foveate": __version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_flags": cpu_flags(),
        "kernels": None if kernels is None else kernels.isa,
        "linear_kernels": None if kernels is None else kernels.linear_isa,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "device": str(device),
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
    return about


def load_average() -> float:
    """Runnable processes of the last minute, a mean."""
    return round(os.getloadavg()[0], 2)


def version_of(package: str) -> str:
    """Of an installed package, or ``not installed``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_name() -> str:
    """As the processor calls itself."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def cpu_flags() -> list[str]:
    """Those of ``CPU_FLAGS`` that this processor has; empty where that is not told."""
    words = {word for line in _cpuinfo() for word in line.split()}
    return [flag for flag in CPU_FLAGS if flag in words]


def _cpuinfo() -> Iterator[str]:
    try:
        yield from Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
