"""The bench as a picture: what each budget gains against what its FLOPs allow, and what length costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.bench.rows import is_all
from vtprune.bench.table import keep_text, setting
from vtprune.eval.plot import COLOURS, MARKERS, legend_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_bench"]


def plot_bench(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the PNG.

    Left, for the first prompt size: speed-up of the whole call against the share of its FLOPs, with the line that the
    FLOP count allows. Right, if several lengths were measured: milliseconds of a prefill against visual tokens.

    Args:
        rows: of `vtprune bench`; cells without figures are left out, and other libraries, whose FLOPs are not counted.
        path: where to write.
    """
    # the object interface, not pyplot: no global state and no display is touched
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["possible"] and row["kind"] == "bench"]
    lengths = sorted({row["prompt"]["visual_tokens"] for row in measured})
    panels = 1 + (len(lengths) > 1)
    figure = Figure(figsize=(5.8 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if measured:
        _speed(axes[0], [row for row in measured if row["config"] == measured[0]["config"]])
    if panels > 1:
        first = measured[0]["config"]
        same = [r for r in measured if all(r["config"][k] == first[k] for k in ("batch_size", "text_tokens"))]
        _cost(axes[1], same)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150)


def _methods(rows: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """(method, its style, its rows) in order of appearance; hollow and dotted once the colours begin again."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    found = []
    for index, name in enumerate(names):
        turn, place = divmod(index, len(COLOURS))
        style = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": ":" if turn else "-"}
        style |= {"mfc": "white" if turn else COLOURS[place], "ms": 5.5, "linewidth": 1.8}
        found.append((name, style, [row for row in rows if row["method"] == name]))
    return found


def _speed(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    pruned = [row for row in rows if not is_all(row["keep"])]
    least = min((row["total_flop_ratio"] for row in pruned), default=0.5)
    shares = [least ** (i / 40) for i in range(41)]
    axes.plot(shares, [1 / s for s in shares], color="#222222", linestyle="--", linewidth=1.2, label="FLOP-ideal")
    for method, style, cells in _methods(pruned):
        points = sorted((row["total_flop_ratio"], 1 / row["total_ratio"]) for row in cells)
        axes.plot(*zip(*points, strict=True), **style, label=method)
    axes.axhline(1.0, color="#999999", linewidth=0.8)
    axes.set_xlabel("prefill FLOPs, tower included, share of unpruned")
    axes.set_ylabel("speed-up of the prefill, tower included")
    axes.set_title(setting(rows[0]), fontsize=10)
    _tidy(axes)


def _cost(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter

    full = sorted({row["prompt"]["visual_tokens"]: row["total_ms_full"] for row in rows}.items())
    axes.plot(*zip(*full, strict=True), color="#222222", linestyle="--", marker="o", ms=4, label="unpruned")
    pruned = [row for row in rows if not is_all(row["keep"])]
    for method, style, cells in _methods(pruned):
        # the smallest budget that every length has
        keeps = {row["keep"] for row in cells}
        shared = [k for k in keeps if len([r for r in cells if r["keep"] == k]) == len(full)]
        if not shared:
            continue
        keep = min(shared, key=lambda k: 0.0 if k is None else k)
        points = sorted((r["prompt"]["visual_tokens"], r["total_ms"]) for r in cells if r["keep"] == keep)
        label = f"{method} {keep_text(keep)}"
        axes.plot(*zip(*points, strict=True), **style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    axes.set_xlabel("visual tokens a sample")
    axes.set_ylabel("prefill, tower included, ms")
    axes.set_title("cost against length", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
