"""Bytes, operations and the least time of attention on three GPUs, from the shapes alone; not collected by pytest.

``python tests/bench/roofline.py`` prints one line per phase, context and budget for one layer of Llama 3 8B (32 query
heads, 8 KV heads, head dim 128, bfloat16): what no kernel can beat, to hold measured times against.

Counted: Q, K, V and the output once each (prefill reads K and V once per block of 128 query rows, served by the L2
cache at best, so only one pass is charged), indices as int32, and 4 D operations per query head and visible key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

HEADS, KV_HEADS, DIM, ITEM = 32, 8, 128, 2
CONTEXTS = (8192, 32768, 131072)
BUDGET, UNIT, TILE, BATCH = 2048, 16, 128, 8


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 tensor-core peak and memory bandwidth of the SXM module, from NVIDIA's data sheets."""

    name: str
    tflops: float
    terabytes: float


GPUS = (
    Gpu("A100", 312, 2.039),  # A100 Tensor Core GPU data sheet, 80 GB SXM
    Gpu("H100", 989, 3.35),  # H100 Tensor Core GPU data sheet, SXM; half of the figure with sparsity
    Gpu("B200", 2250, 8.0),  # DGX B200 data sheet, an eighth of the system; half of the figure with sparsity
)


@dataclass(frozen=True)
class Work:
    """One layer's attention: bytes moved and floating-point operations."""

    name: str
    context: int
    moved: float
    operations: float

    def seconds(self, gpu: Gpu) -> tuple[float, str]:
        """The least time, and what sets it."""
        memory, compute = self.moved / (gpu.terabytes * 1e12), self.operations / (gpu.tflops * 1e12)
        return (memory, "memory") if memory > compute else (compute, "compute")


def prefill(context: int, budget: int | None) -> Work:
    """A whole prompt: causal, or at most ``budget`` keys per query."""
    pairs = context * (context + 1) / 2
    indices = 0
    if budget is not None and budget < context:
        pairs = budget * (budget + 1) / 2 + (context - budget) * budget
        indices = context // TILE * KV_HEADS * (budget // UNIT) * 4
    moved = 2 * context * (HEADS + KV_HEADS) * DIM * ITEM + indices
    return Work("prefill" if budget is None else f"prefill {budget}", context, moved, 4 * DIM * HEADS * pairs)


def decode(context: int, budget: int | None) -> Work:
    """One token for each of ``BATCH`` sequences."""
    read = context if budget is None else min(budget, context)
    indices = 0 if budget is None else BATCH * KV_HEADS * (read // UNIT) * 4
    moved = BATCH * 2 * (read * KV_HEADS + HEADS) * DIM * ITEM + indices
    name = f"decode x{BATCH}" if budget is None else f"decode x{BATCH} {budget}"
    return Work(name, context, moved, BATCH * 4 * DIM * HEADS * read)


def works() -> Iterator[Work]:
    for phase in (prefill, decode):
        for context in CONTEXTS:
            yield phase(context, None)
            yield phase(context, BUDGET)


def main() -> None:
    print(f"{'one layer':<15}{'context':>8}{'MB':>9}{'GFLOP':>9}" + "".join(f"{gpu.name:>20}" for gpu in GPUS))
    for work in works():
        bounds = (work.seconds(gpu) for gpu in GPUS)
        cells = "".join(f"{1e6 * seconds:>9.1f} us {bound:<8}" for seconds, bound in bounds)
        print(f"{work.name:<15}{work.context:>8}{work.moved / 1e6:>9.1f}{work.operations / 1e9:>9.1f}{cells}")


if __name__ == "__main__":
    main()
