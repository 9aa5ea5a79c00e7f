"""Plots of the reports. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_DOTS_PER_INCH = 120
_PARTS = {"attention": "#4c72b0", "selection": "#dd8452", "linear": "#55a868", "rest": "#b0b0b0"}
_MARKERS = "osv^D*PXh<>d"


def draw_latency(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    """Time to first token and between tokens against length, one line per scheme; and the share of each part."""
    cells = report["cells"]
    if not cells:
        return []
    paths = [
        _lines(directory / "latency-first-token.png", report, "first_seconds", "seconds to first token", 1.0),
        _lines(directory / "latency-gap.png", report, "gap_seconds", "ms between tokens", 1e3),
    ]
    for phase in ("prefill", "decode"):
        if any(cell.get(f"{phase}_shares") for cell in cells):
            paths.append(_stacks(directory / f"latency-{phase}-parts.png", report, phase))
    return paths


def draw_throughput(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    """Tokens per second, a bar per scheme."""
    cells = report["cells"]
    if not cells:
        return []
    figure, axes = _figure(7.0, 1.2 + 0.4 * len(cells))
    axes.barh([cell["label"] for cell in cells], [cell["tokens_per_second"] for cell in cells], color="#4c72b0")
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, prompt and answer")
    return [_save(figure, directory / "throughput.png", report)]


def draw_serve(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    """TTFT and TPOT at p50, p90 and p99, and goodput, against the rate of arrivals; a line per scheme."""
    cells = report["cells"]
    figure, axes = _figure(12.0, 4.0, 1, 3)
    for number, (label, own) in enumerate(_by_label(cells)):
        rates, color = [cell["rate"] for cell in own], f"C{number}"
        for panel, name in zip(axes, ("ttft_seconds", "tpot_seconds"), strict=False):
            for mark, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
                values = [cell[name][mark] if cell[name] else float("nan") for cell in own]
                panel.plot(rates, values, style, marker="o", color=color, label=f"{label} {mark}")
        axes[2].plot(rates, [cell["goodput"] for cell in own], marker="o", color=color, label=label)
    rates = sorted({cell["rate"] for cell in cells})
    axes[2].plot(rates, rates, color="#b0b0b0", linewidth=1, label="all that arrive")
    for panel, title in zip(axes, ("seconds to first token", "seconds per token", "good requests/s"), strict=True):
        panel.set_ylabel(title)
        panel.set_xlabel("arrivals per second")
        panel.legend(fontsize=7)
    return [_save(figure, directory / "serve.png", report)]


def draw_ops(directory: Path, report: Mapping[str, Any]) -> list[Path]:
    """The share of the machine's limit that each kernel reaches, a plot per op."""
    paths = []
    for name in dict.fromkeys(row["op"] for row in report["rows"]):
        own = [row for row in report["rows"] if row["op"] == name]
        figure, panel = _figure(10.0, 1.2 + 0.2 * len(own))
        labels = [f"{row['dtype']} {row['shape']}, {row['case']}: {row['kernel']}" for row in own]
        panel.barh(range(len(own)), [row["share"] for row in own], color="#4c72b0")
        panel.set_yticks(range(len(own)), labels, fontsize=7)
        panel.invert_yaxis()
        panel.axvline(1.0, color="#c44e52", linewidth=1)
        panel.margins(y=0.01)
        limits = " or ".join(dict.fromkeys(row["limit"] for row in own))
        panel.set_title(f"{name}: share of {limits}", fontsize=9)
        paths.append(_save(figure, directory / f"ops-{name}.png", report))
    return paths


def _lines(path: Path, report: Mapping[str, Any], name: str, title: str, factor: float) -> Path:
    figure, axes = _figure(7.0, 5.0)
    lengths = sorted({cell["length"] for cell in report["cells"]})
    for number, (label, own) in enumerate(_by_label(report["cells"])):
        points = [(cell["length"], cell[name] * factor) for cell in own if cell[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker=_MARKERS[number % len(_MARKERS)], label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=6)
    axes.grid(alpha=0.3, which="both")
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel(title)
    if axes.lines:
        if name == "first_seconds" and len(lengths) > 1:
            least = min(min(line.get_ydata()) for line in axes.lines)
            straight = [least * length / lengths[0] for length in lengths]
            axes.plot(lengths, straight, color="#b0b0b0", linestyle="--", zorder=0, label="linear")
        axes.legend(fontsize=8)
    return _save(figure, path, report)


def _stacks(path: Path, report: Mapping[str, Any], phase: str) -> Path:
    key = f"{phase}_shares"
    cells = [cell for cell in report["cells"] if cell.get(key)]
    lengths = sorted({cell["length"] for cell in cells})
    figure, panels = _figure(3.0 * len(lengths), 1.2 + 0.35 * len({cell["label"] for cell in cells}), 1, len(lengths))
    for panel, length in zip([panels] if len(lengths) == 1 else panels, lengths, strict=True):
        own = [cell for cell in cells if cell["length"] == length]
        left = [0.0] * len(own)
        for part, color in _PARTS.items():
            widths = [100 * cell[key][part] for cell in own]
            panel.barh([cell["label"] for cell in own], widths, left=left, color=color, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        panel.invert_yaxis()
        panel.set_title(f"{length:,} tokens", fontsize=9)
        panel.set_xlabel(f"% of {phase}")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(_PARTS), fontsize=8)
    return _save(figure, path, report)


def _by_label(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    labels = dict.fromkeys(cell["label"] for cell in cells)
    return [(label, [cell for cell in cells if cell["label"] == label]) for label in labels]


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _save(figure: Figure, path: Path, report: Mapping[str, Any]) -> Path:
    """Every plot says where it was taken."""
    machine = report["machine"]
    loads = [load for cell in report.get("cells", ()) for load in cell.get("load_average", ())]
    loads = loads or list(report["load_average"].values())
    subject = report["model"]["name"] if "model" in report else report["kind"]
    figure.suptitle(
        f"{subject}; {machine['cpu']}, {machine['threads']} threads; load {min(loads)} to {max(loads)}", fontsize=8
    )
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return path
