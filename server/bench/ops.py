"""``foveate bench ops``: each op against what the machine can do, in turns with it."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from foveate.sparse_attn.ops import native
from foveate.sparse_attn.ops.cpu import has_bfloat16_products

from ..exceptions import EngineError
from ..loader import device_of
from ..memory import tune_allocator
from . import ops_attention, ops_linear, ops_selection
from .arguments import OPS
from .cases import Call, Case, Limits, Setting, Taken, stopwatch, take_turns
from .report import Report, table
from .shapes import SHAPES

CASES: Mapping[str, Callable[[Setting], Iterator[Case]]] = {
    name: getattr(module, name)
    for module in (ops_attention, ops_selection, ops_linear)
    for name in OPS
    if hasattr(module, name)
}
UNITS = {"mm": "GFLOP/s", "sum": "GB/s"}


def run(given: Namespace) -> int:
    """Measures and reports.

    Returns:
        Exit code: 1 if nothing could be measured, or not written.
    """
    try:
        device = device_of(given.device)
        isas = _isas(given.isas, device)
        if given.queries > given.context:
            raise ValueError(f"a chunk of {given.queries} queries does not fit a context of {given.context}")
        if given.cpu_time and (given.threads or 1) != 1:
            raise ValueError("--cpu-time measures one thread")
        if given.cpu_time or given.threads:
            torch.set_num_threads(1 if given.cpu_time else given.threads)
        if given.kv_dtype == "int8" and device.type != "cpu":
            raise ValueError("--kv-dtype int8 is for a CPU")
        if device.type == "cpu":
            tune_allocator()  # as an engine does
        if given.dtypes is None:
            given.dtypes = ["bfloat16" if device.type != "cpu" or has_bfloat16_products() else "float32"]
        torch.manual_seed(given.seed)
        report = Report("ops", given, device)
        rows = measure(given, device, isas)
    except (EngineError, ValueError, RuntimeError, OSError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    return 0 if report.finish({"rows": rows}, _told(rows), _draw) else 1


@torch.inference_mode()
def measure(given: Namespace, device: torch.device, isas: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per op, element type, shape, case and kernel."""
    watch = stopwatch(device, given.cpu_time)
    rows: list[dict[str, Any]] = []
    plan = [(op, dtype, shape) for dtype in given.dtypes for op in given.ops for shape in given.shapes]
    limits: dict[str, Limits] = {}
    with tqdm(total=len(plan), desc="ops", file=sys.stderr) as bar:
        for op, dtype, shape in plan:
            bar.set_postfix_str(f"{op} {dtype} {shape}")
            kind: torch.dtype = getattr(torch, dtype)
            if dtype not in limits:
                limits = {dtype: Limits(kind, device)}
            stored = torch.int8 if given.kv_dtype == "int8" else kind
            setting = Setting(
                SHAPES[shape], shape, kind, stored, device, given.context, given.queries, given.share, isas
            )
            for case in CASES[op](setting):
                rows += _rows(op, setting, case, limits[dtype], given.repeats, watch)
            bar.update()
    return rows


def _rows(
    op: str, setting: Setting, case: Case, limits: Limits, repeats: int, watch: Callable[[Call], Taken]
) -> list[dict[str, Any]]:
    limit = limits.names[case.limit]
    taken = take_turns({**case.calls, limit: limits.calls[case.limit]}, repeats, watch)
    most = limits.work[case.limit] / taken.pop(limit).seconds / 1e9
    rows = []
    for kernel, times in taken.items():
        rate = case.work_of(kernel) / times.seconds / 1e9
        rows.append(
            {
                "op": op,
                "dtype": str(setting.dtype).removeprefix("torch."),
                "kv_dtype": str(setting.stored).removeprefix("torch."),
                "shape": setting.name,
                "case": case.name,
                "kernel": kernel,
                "milliseconds": times.seconds / case.steps * 1e3,
                "host_milliseconds": times.host_seconds / case.steps * 1e3,
                "rate": rate,
                "unit": UNITS[case.limit],
                "limit": limit,
                "limit_rate": most,
                "share": rate / most,
            }
        )
    return rows


def _isas(given: Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    """Instruction sets to measure.

    Raises:
        ValueError: this machine does not have one that was named.
    """
    if device.type != "cpu":
        return ()
    library = native.library()
    if library is None:
        return ()
    for isa in given or ():
        if isa not in library.isas:
            raise ValueError(f"--isas {isa}: this machine has {', '.join(library.isas)}")
    return tuple(given or (library.isa,))


def _draw(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    from .plots import draw_ops

    return draw_ops(directory, report)


def _told(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [["op", "type", "shape", "case", "kernel", "ms", "rate", "limit here", "share"]]
    for row in rows:
        found.append(
            [
                row["op"],
                row["dtype"] + (", int8 K/V" if row["kv_dtype"] == "int8" else ""),
                *(row[name] for name in ("shape", "case", "kernel")),
                f"{row['milliseconds']:.3f}",
                f"{row['rate']:.1f} {row['unit']}",
                f"{row['limit_rate']:.1f}",
                f"{row['share']:.2f}",
            ]
        )
    return table(found)
