"""Heat maps: how often the answer was found, by length and depth. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .policies import DENSE
from .report import Cell

_PANEL_INCHES = (3.4, 2.6)
_OVERVIEW_INCHES = (2.1, 1.7)
_DOTS_PER_INCH = 120


def draw(directory: Path, cells: Sequence[Cell]) -> list[Path]:
    """PNGs, in which each square tells the answers found and the keys read, in %.

    One per scheme: a row of panels per task, dense first, then the scheme at each budget. And one per
    task, if there are several schemes beside dense: a row of panels per scheme. Cells without a depth are not drawn.
    """
    cells = [cell for cell in cells if cell.depth is not None and "score" in cell.values]
    schemes = _distinct(cell.attention["scheme"] for cell in cells)
    tasks = _distinct(cell.task for cell in cells)
    figures = {}
    for scheme in [name for name in schemes if name != DENSE] or schemes:
        chosen = [cell for cell in cells if cell.attention["scheme"] in (DENSE, scheme)]
        names = _distinct(cell.label for cell in chosen)
        figures[f"heatmap-{scheme}.png"] = _figure([[(task, name) for name in names] for task in tasks], chosen)
    if len(schemes) > 2:
        for task in tasks:
            own = [cell for cell in cells if cell.task == task]
            rows = [
                [(task, name) for name in _distinct(c.label for c in own if c.attention["scheme"] == scheme)]
                for scheme in schemes
            ]
            figures[f"overview-{task}.png"] = _figure(rows, own, _OVERVIEW_INCHES)
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=_DOTS_PER_INCH)
    return [directory / name for name in figures]


def _distinct(names: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(map(str, names)))


def _figure(
    rows: Sequence[Sequence[tuple[str, str]]], cells: Sequence[Cell], inches: tuple[float, float] = _PANEL_INCHES
) -> Figure:
    """A panel for each task and label in ``rows``; shorter rows, and what was not run, leave theirs empty."""
    (width, height), columns = inches, max(map(len, rows))
    figure = Figure(figsize=(width * columns, height * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for number, row in enumerate(rows):
        for column in range(columns):
            task, name = row[column] if column < len(row) else ("", "")
            own = [cell for cell in cells if cell.task == task and cell.label == name]
            if not own:
                panels[number][column].set_axis_off()
                continue
            title = f"{task}\n{name}" if inches == _PANEL_INCHES else textwrap.fill(name, 22)
            image = _panel(panels[number][column], own, title)
    figure.colorbar(image, ax=panels, label="answers found", shrink=min(0.8, 4 / len(rows)))
    return figure


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _panel(axes: Any, cells: Sequence[Cell], title: str) -> Any:
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells if cell.depth is not None})
    grid = [[float("nan")] * len(lengths) for _ in depths]
    for cell in cells:
        if cell.depth is None:
            continue
        x, y = lengths.index(cell.length), depths.index(cell.depth)
        score = cell.values["score"]
        grid[y][x] = score
        told = f"{100 * score:.0f}\n({100 * cell.keys_read_fraction:.0f})"
        axes.text(x, y, told, ha="center", va="center", fontsize=8, color="black" if score > 0.4 else "white")
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    return image
