"""What methods that decide by themselves spend on each kind of question: easy ones should cost less."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vtprune.eval.plot import COLOURS
from vtprune.eval.rows import KindScore, Row
from vtprune.eval.table import task_label, tasks_of

__all__ = ["deciding_rows", "kinds_markdown", "plot_kinds"]


def deciding_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of methods that decided by themselves, on tasks that know kinds of question."""
    own = (row for row in rows if row.keep_value is None and row.status == "ok")
    return [row for row in own if _kinds(row)]


def _kinds(row: Row) -> list[tuple[str, str, KindScore]]:
    """(task, kind, score) of every kind with a count of tokens, cheapest first."""
    found = []
    for task in tasks_of([row]):
        for kind, score in row.tasks[task].kinds.items():
            if score.tokens is not None:
                found.append((task, kind, score))
    return sorted(found, key=lambda entry: entry[2].tokens or 0.0)


def kinds_markdown(rows: Sequence[Row]) -> str:
    """One table a deciding row: tokens and accuracy by kind of question, "" if no method decided.

    Args:
        rows: of a sweep, the unpruned row first.
    """
    parts = []
    for row in deciding_rows(rows):
        lines = [
            f"{row.method}: {row.average_tokens:.1f} of {row.visual_tokens:.0f} visual tokens a decoder layer",
            "",
            "| task | kind | questions | tokens | accuracy % | unpruned % |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for task, kind, score in _kinds(row):
            full = rows[0].tasks[task].kinds[kind].accuracy
            figures = f"{score.questions} | {score.tokens:.1f} | {100 * score.accuracy:.1f} | {100 * full:.1f}"
            lines.append(f"| {task_label(task)} | {kind} | {figures} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" if parts else ""


def plot_kinds(rows: Sequence[Row], path: Path) -> None:
    """One panel a deciding row: a bar a kind, as long as its tokens, with its accuracy beside the unpruned one.

    Args:
        rows: of a sweep, the unpruned row first; at least one of them decided.
        path: where to write the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    deciding = deciding_rows(rows)
    most = max(len(_kinds(row)) for row in deciding)
    figure = Figure(figsize=(5.2 * len(deciding), 1.4 + 0.34 * most), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(deciding), squeeze=False)[0]
    for index, (panel, row) in enumerate(zip(panels, deciding, strict=True)):
        kinds = _kinds(row)
        names = [f"{kind} ({task_label(task)})" for task, kind, _ in kinds]
        lengths = [score.tokens or 0.0 for _, _, score in kinds]
        bars = panel.barh(names, lengths, color=COLOURS[index % len(COLOURS)], height=0.7)
        labels = [
            f"{100 * score.accuracy:.0f} % (full {100 * rows[0].tasks[task].kinds[kind].accuracy:.0f})"
            for task, kind, score in kinds
        ]
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        panel.bar_label(bars, labels=labels, padding=5, fontsize=8, bbox=behind)
        total = row.visual_tokens or 0.0
        panel.axvline(total, color="#222222", linestyle="--", linewidth=1.2, zorder=1)
        # room for the labels behind the longest bar
        panel.set_xlim(0, 1.35 * total)
        panel.set_xlabel(f"visual tokens a decoder layer, of {total:.0f}")
        panel.set_title(f"{row.method}: {row.average_tokens:.1f} on average")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
