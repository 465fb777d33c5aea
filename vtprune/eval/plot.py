"""Accuracy against decoder FLOPs: one panel a task, one line a method, the unpruned model as a dashed line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.eval.rows import Row, by_method
from vtprune.eval.table import task_label, tasks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "MARKERS", "draw_task", "legend_columns", "plot_rows"]

# Okabe-Ito without its yellow (too faint on white), then two that stay apart from them; told apart by marker as well.
# Beyond them the line changes, so that no two of many methods look alike
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5B3A8C", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", ":", "-.")
_TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Write the PNG.

    Args:
        rows: of one sweep, the unpruned row first; cells without figures are left out.
        path: where to write.
    """
    # the object interface, not pyplot: no global state and no display is touched
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = tasks_of(rows)
    figure = Figure(figsize=(5.6 * len(tasks), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        draw_task(panel, rows, task)
    panels[0].set_ylabel("accuracy (exact match), %")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def legend_columns(labels: Sequence[str], width: float) -> int:
    """How many columns a legend has room for below a figure of `width` inches, which does not grow for it."""
    # the handle with its gaps, and letters of 10 points
    widest = 0.7 + 0.085 * max((len(label) for label in labels), default=0)
    return max(1, min(len(labels), int(width / widest)))


def draw_task(axes: Axes, rows: Sequence[Row], task: str) -> None:
    """One task."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    full = 100 * rows[0].tasks[task].accuracy.value
    axes.axhline(full, color="#222222", linestyle="--", linewidth=1.2, label="unpruned", zorder=1)
    lowest = 1.0
    for index, (method, cells) in enumerate(by_method(rows).items()):
        points = sorted(
            (row.flops_share, row.tasks[task].accuracy)
            for row in cells
            if row.status == "ok" and row.flops_share is not None and task in row.tasks
        )
        if not points:
            continue
        turn, place = divmod(index, len(COLOURS))
        # hollow from the second turn on: a method with a single point has no line to tell it by
        colour, marker, line = COLOURS[place], MARKERS[place], _LINES[turn % len(_LINES)]
        inside = "white" if turn else colour
        x = [share for share, _ in points]
        y = [100 * interval.value for _, interval in points]
        below = [100 * (interval.value - interval.low) for _, interval in points]
        above = [100 * (interval.high - interval.value) for _, interval in points]
        lowest = min(lowest, *x)
        axes.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1, alpha=0.35, zorder=2)
        axes.plot(x, y, line, color=colour, marker=marker, mfc=inside, ms=5.5, linewidth=1.8, label=method, zorder=3)
    axes.set_xscale("log")
    ticks = [tick for tick in _TICKS if tick >= 0.7 * lowest] or [1.0]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.set_xlim(0.85 * min(lowest, 0.9), 1.1)
    axes.set_xlabel("decoder prefill FLOPs, share of unpruned")
    axes.set_title(task_label(task))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
