"""Linear layers on this CPU: each kind of quantised weights against bfloat16 and against what torch offers.

``python tests/bench/linear_cpu.py`` prints, for the layers of SmolLM2-135M and Qwen2.5-0.5B with 512 rows (prefill)
and 1 (decode), the median time, GOPS (2 per weight and row) and GB/s of weights. Candidates take turns within one run,
so that a slow second of a shared machine hits all of them. Decode walks through copies of the weights that no cache
near the core holds, as a model does.

``--cpu-time`` measures on one thread by the time that the thread ran: steady also where others use the machine.

Rows named ``torch`` are only the product: what else W8A8 needs around it (rounding the input, scaling the output) is
extra, and is included in ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional

from foveate.patches.linear_torch import quantize_rows
from foveate.patches.quantize import KINDS, QuantizedLinear

# (model, layer, N, K)
LAYERS = (
    ("SmolLM2-135M", "q, o", 576, 576),
    ("SmolLM2-135M", "gate, up", 1536, 576),
    ("SmolLM2-135M", "down", 576, 1536),
    ("Qwen2.5-0.5B", "q, o", 896, 896),
    ("Qwen2.5-0.5B", "gate, up", 4864, 896),
    ("Qwen2.5-0.5B", "down", 896, 4864),
)
DECODE_BYTES = 128 * 2**20  # of bfloat16 weights that decode walks through

Candidate = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: ``weight_bytes`` are read per call, times are of one call."""

    model: str
    layer: str
    rows: int
    name: str
    milliseconds: float
    gops: float
    gigabytes_per_second: float
    times_bfloat16: float


def candidates(layers: list[nn.Linear], rows: int, torch_too: bool) -> dict[str, tuple[Candidate, int]]:
    """Name -> what to call with the number of a copy, and the bytes of one copy's weight."""
    channels, depth = layers[0].weight.shape
    x = torch.randn(rows, depth).bfloat16()
    found: dict[str, tuple[Candidate, int]] = {}
    found["bfloat16"] = (lambda copy: functional.linear(x, layers[copy].weight), channels * depth * 2)
    for kind in KINDS:
        made = [QuantizedLinear(layer, kind) for layer in layers]
        found[kind] = (lambda copy, made=made: made[copy](x), made[0].nbytes)
    if not torch_too:
        return found
    rounded = quantize_rows(x, 8)[0].to(torch.int8)
    eights = [
        functional.normalize(layer.weight.float(), p=torch.inf).mul(127).round().to(torch.int8) for layer in layers
    ]
    found["torch _int_mm"] = (lambda copy: torch._int_mm(rounded, eights[copy].t()), channels * depth)
    packed = [torch.ops.onednn.qlinear_prepack(weight, None) for weight in eights]
    scales, zeros = torch.ones(channels), torch.zeros(channels, dtype=torch.int64)
    found["torch onednn.qlinear"] = (
        lambda copy: torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 0, packed[copy], scales, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        ),
        channels * depth,
    )
    if rows == 1:  # both take 20 times as long as bfloat16 with 512
        halves = scales.bfloat16()
        found["torch _weight_int8pack_mm"] = (
            lambda copy: torch.ops.aten._weight_int8pack_mm(x, eights[copy], halves),
            channels * depth,
        )
        fours = torch.randint(0, 16, (channels, depth), dtype=torch.int32)
        nibbles = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(fours, 1) for _ in layers]
        groups = torch.ones(depth // 32, channels, 2, dtype=torch.bfloat16)
        found["torch _weight_int4pack_mm"] = (
            lambda copy: torch.ops.aten._weight_int4pack_mm_for_cpu(x, nibbles[copy], 32, groups),
            channels * depth * 5 // 8,
        )
    return found


def measure(
    found: dict[str, tuple[Candidate, int]], copies: int, repeats: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of one call of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for run in range(repeats + 2):
        for name, (call, _) in found.items():
            start = clock()
            call(run % copies)
            if run >= 2:
                seconds[name].append(clock() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1], help="rows of the input")
    parser.add_argument("--repeats", type=int, default=25, help="measurements of each (four times as many for 1 row)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, by the time that it ran")
    parser.add_argument("--json", help="file to write all rows to")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's own kernels out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # deprecations of torch's quantisation
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    table: list[Row] = []
    for model, layer, channels, depth in LAYERS:
        for rows in options.rows:
            copies = max(1, DECODE_BYTES // (channels * depth * 2)) if rows == 1 else 1
            layers = [nn.Linear(depth, channels, bias=False).bfloat16() for _ in range(copies)]
            found = candidates(layers, rows, not options.no_torch)
            repeats = options.repeats * (4 if rows == 1 else 1)
            seconds = measure(found, copies, repeats, clock)
            print(f"{model} {layer}: {channels} x {depth}, {rows} rows", flush=True)
            for name, taken in seconds.items():
                gops, rate = 2 * rows * channels * depth / taken / 1e9, found[name][1] / taken / 1e9
                row = Row(model, layer, rows, name, taken * 1e3, gops, rate, seconds["bfloat16"] / taken)
                table.append(row)
                print(
                    f"  {name:<26} {row.milliseconds:8.3f} ms {gops:7.0f} GOPS {rate:6.1f} GB/s of weights"
                    f" {row.times_bfloat16:5.2f} x bfloat16",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in table], file, indent=1)


if __name__ == "__main__":
    main()
