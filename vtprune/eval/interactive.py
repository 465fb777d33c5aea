"""The page's plot: accuracy against cost with plotly, one figure a task and axis, in one file that fetches nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from vtprune.errors import VtpruneError
from vtprune.eval.plot import COLOURS
from vtprune.eval.published import PaperMark, paper_marks
from vtprune.eval.rows import UNPRUNED_ROW, Row, by_method
from vtprune.eval.stats import Interval
from vtprune.eval.summary import front_of
from vtprune.eval.table import (
    accuracy_text,
    difference_of,
    percent,
    points_text,
    reference_of,
    share_text,
    task_label,
    tasks_of,
)

__all__ = ["AXES", "DARK_COLOURS", "figure", "figures_json", "require_plotly"]

AXES = {
    "flops": "decoder prefill FLOPs, share of unpruned",
    "tokens": "visual tokens that enter a decoder layer, on average",
    "time": "prefill time, share of unpruned",
}
"""What accuracy can be drawn against, and the axis title."""

# the colours of `plot`, light enough for a dark ground
DARK_COLOURS = ("#4da6e0", "#ff8a3d", "#2fc79a", "#e3a3c8", "#8fd0f5", "#f2bd4b", "#b49ae6", "#b3b3b3")
_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
_PAPER_SYMBOLS = ("circle-open", "square-open", "diamond-open", "triangle-up-open", "cross-open")
_DASHES = ("solid", "dot", "dashdot")
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def require_plotly() -> str:
    """plotly.js, to be written into the page once.

    Raises:
        VtpruneError: if plotly is not installed, with the command that installs it.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise VtpruneError(f"the report page needs plotly ({error}). Run: pip install 'vtprune[eval]'") from error
    return get_plotlyjs()


def figures_json(rows: Sequence[Row]) -> str:
    """All figures as a JSON object, by task and axis, safe inside a script element.

    Args:
        rows: of one sweep, the unpruned row first.
    """
    figures = {task_label(task): _axes_of(rows, task) for task in tasks_of(rows)}
    data = {"figures": figures, "light": COLOURS, "dark": DARK_COLOURS, "axes": AXES}
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _axes_of(rows: Sequence[Row], task: str) -> dict[str, Any]:
    """Figures by axis; an axis that no pruned row has a value on is left out."""
    found = {axis: figure(rows, task, axis) for axis in AXES}
    return {axis: each for axis, each in found.items() if any("meta" in trace for trace in each["data"])}


def _cost(row: Row, axis: str) -> float | None:
    if axis == "tokens":
        return row.average_tokens
    if row.method == UNPRUNED_ROW:
        return 1.0
    return row.flops_share if axis == "flops" else row.prefill_ratio


def figure(rows: Sequence[Row], task: str, axis: str) -> dict[str, Any]:
    """One task against one cost, as plotly reads it.

    Colours of methods are set by the page, which knows whether its ground is dark: a trace's `meta` is the place of
    its colour.

    Args:
        rows: of one sweep, the unpruned row first.
        task: which accuracy.
        axis: a key of `AXES`.
    """
    full = next((row for row in rows if row.method == UNPRUNED_ROW and task in row.tasks), None)
    data: list[dict[str, Any]] = []
    costs: list[float] = []
    for index, (method, cells) in enumerate(by_method(rows).items()):
        points = [(cost, row) for row in cells if task in row.tasks and (cost := _cost(row, axis)) is not None]
        if points:
            costs += [cost for cost, _ in points]
            data.append(_method_trace(method, index, sorted(points, key=lambda point: point[0]), rows, task))
    if full is not None and costs:
        end = _cost(full, axis)
        costs += [] if end is None else [end]
        data.insert(0, _full_trace(full.tasks[task].accuracy, min(costs), max(costs)))
        if axis == "flops":
            data.insert(1, _front_trace(rows, task))
    if axis == "tokens" and costs:
        groups = itertools.groupby(paper_marks(rows, task), key=lambda mark: mark.table.title)
        papers = [_paper_trace(place, title, list(marks)) for place, (title, marks) in enumerate(groups)]
        costs += [x for trace in papers for x in trace["x"]]
        data += papers
    return {"data": data, "layout": _layout(axis, costs)}


def _method_trace(
    method: str, index: int, points: Sequence[tuple[float, Row]], rows: Sequence[Row], task: str
) -> dict[str, Any]:
    turn, place = divmod(index, len(COLOURS))
    accuracies = [row.tasks[task].accuracy for _, row in points]
    reference = reference_of(rows)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(method),
        "meta": place,
        "x": [_short(cost) for cost, _ in points],
        "y": [_short(100 * accuracy.value) for accuracy in accuracies],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [_short(100 * (accuracy.high - accuracy.value)) for accuracy in accuracies],
            "arrayminus": [_short(100 * (accuracy.value - accuracy.low)) for accuracy in accuracies],
            "thickness": 1,
            "width": 3,
        },
        "line": {"width": 2, "dash": _DASHES[turn % len(_DASHES)]},
        "marker": {"size": 8, "symbol": _SYMBOLS[place] + ("-open" if turn else "")},
        "customdata": [_facts(row, task, reference) for _, row in points],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _facts(row: Row, task: str, reference: str | None) -> str:
    """What is shown of a row under the pointer."""
    score = row.tasks[task]
    lines = [f"<b>{escape(row.name)}</b>", f"accuracy {accuracy_text(score)} %"]
    lines.append(f"of full {share_text(score, interval=True)}, {points_text(score.difference, interval=True)} points")
    if reference is not None and (beside := difference_of(row, task)) is not None:
        lines.append(f"vs {escape(reference)} at equal FLOPs {points_text(beside, interval=True)}")
    if score.mcnemar is not None:
        lines.append(f"{score.mcnemar.wins} won, {score.mcnemar.losses} lost, McNemar p {score.mcnemar.p:.2g}")
    tokens = "" if row.average_tokens is None else f", {row.average_tokens:.1f} tokens a layer"
    lines.append(f"FLOPs {percent(row.flops_share, 1)}, KV {percent(row.kv_share, 1)}{tokens}")
    if row.prefill_ratio is not None:
        lines.append(f"prefill time {percent(row.prefill_ratio)} ({row.prefill_ms or 0:.1f} ms)")
    return "<br>".join(lines)


def _full_trace(accuracy: Interval, low: float, high: float) -> dict[str, Any]:
    """The unpruned model as a dashed line over the whole axis."""
    height = _short(100 * accuracy.value)
    text = f"<b>unpruned</b><br>accuracy {height} [{100 * accuracy.low:.0f}, {100 * accuracy.high:.0f}] %"
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "unpruned",
        "x": [_short(low), _short(high)],
        "y": [height, height],
        "line": {"width": 1.5, "dash": "dash"},
        "customdata": [text, text],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _front_trace(rows: Sequence[Row], task: str) -> dict[str, Any]:
    """The best accuracy for so many FLOPs or less, as steps."""
    named = {row.name: row for row in rows}
    on = [named[name] for name in front_of(rows, task)]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [_short(_cost(row, "flops") or 0.0) for row in on],
        "y": [_short(100 * row.tasks[task].accuracy.value) for row in on],
        "line": {"width": 6, "shape": "hv"},
        "opacity": 0.3,
        "hoverinfo": "skip",
    }


def _paper_trace(place: int, title: str, marks: Sequence[PaperMark]) -> dict[str, Any]:
    """Hollow marks of one published table, at the tokens that the papers state."""
    texts = [
        f"<b>{escape(mark.row.method)}</b> at {mark.tokens} tokens: {mark.accuracy}<br>not measured here: "
        f"{escape('; '.join(mark.row.source))}"
        for mark in marks
    ]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"papers: {escape(title)}",
        "x": [mark.tokens for mark in marks],
        "y": [mark.accuracy for mark in marks],
        "marker": {"size": 9, "symbol": _PAPER_SYMBOLS[place % len(_PAPER_SYMBOLS)], "line": {"width": 1.2}},
        "customdata": texts,
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _layout(axis: str, costs: Sequence[float]) -> dict[str, Any]:
    title = {"text": AXES[axis]}
    x: dict[str, Any] = {"title": title, "zeroline": False}
    if axis != "tokens" and costs:
        ticks = [share for share in _SHARES if share >= 0.7 * min(costs)]
        x |= {"type": "log", "tickvals": ticks, "ticktext": [percent(share) for share in ticks]}
    return {
        "xaxis": x,
        "yaxis": {"title": {"text": "accuracy, %"}, "zeroline": False},
        "hovermode": "closest",
        "margin": {"l": 60, "r": 16, "t": 16, "b": 64},
    }


def _short(value: float) -> float:
    """Six digits are more than a screen shows, and keep the page small."""
    return float(f"{value:.6g}")
