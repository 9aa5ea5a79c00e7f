"""Heat maps: how often the answer was found, by length and depth. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .policies import DENSE, label
from .report import Cell

_PANEL_INCHES = (3.4, 2.6)
_DOTS_PER_INCH = 120


def draw(directory: Path, cells: Sequence[Cell]) -> list[Path]:
    """One PNG per scheme: a row of panels per task, dense first, then the scheme at each budget.

    Cells without a depth are not drawn. Each square tells the answers found and the keys read, in %.
    """
    cells = [cell for cell in cells if cell.depth is not None and "score" in cell.values]
    schemes = list(dict.fromkeys(str(cell.attention["scheme"]) for cell in cells))
    paths = []
    for scheme in [name for name in schemes if name != DENSE] or schemes:
        chosen = [cell for cell in cells if cell.attention["scheme"] in (DENSE, scheme)]
        paths.append(directory / f"heatmap-{scheme}.png")
        _figure(chosen).savefig(paths[-1], dpi=_DOTS_PER_INCH)
    return paths


def _figure(cells: Sequence[Cell]) -> Figure:
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    names = list(dict.fromkeys(label(cell.attention) for cell in cells))
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(names), height * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(names), squeeze=False)
    for row, task in enumerate(tasks):
        for column, name in enumerate(names):
            own = [cell for cell in cells if cell.task == task and label(cell.attention) == name]
            if not own:  # this policy was not run on this task
                panels[row][column].set_axis_off()
                continue
            image = _panel(panels[row][column], own, f"{task}\n{name}")
    figure.colorbar(image, ax=panels, label="answers found", shrink=0.8)
    return figure


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
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    return image
