"""A sweep's summary in words and tables: which method is ahead, and which differences are noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vtprune.eval.rows import UNPRUNED_ROW, Row, TaskScore
from vtprune.eval.stats import Interval
from vtprune.eval.summary import Area, Pair, Summary, TaskSummary
from vtprune.eval.table import accuracy_text, keep_text, percent, points_text, task_label

__all__ = [
    "AREA_NOTE",
    "FRONT_NOTE",
    "MEAN_NOTE",
    "MULTIPLE",
    "TEST_NOTE",
    "area_range",
    "area_table",
    "pair_sentence",
    "summary_markdown",
    "unpruned_sentences",
    "unpruned_table",
]

AREA_NOTE = (
    "Area under the accuracy-FLOPs curve: the mean accuracy over a range of FLOPs (trapezoids between the rows, the "
    "unpruned model as the last point), divided by the unpruned accuracy; 1 is a method that loses nothing anywhere. "
    "The range starts where every method that ran at all budgets has a row. 95 % intervals by bootstrap over images, "
    "differences paired."
)
MULTIPLE = (
    "At each budget the best row beside the others. No interval is widened for the number of comparisons: of 20 "
    "differences that are truly zero, one looks like more."
)
TEST_NOTE = (
    "Wins and losses are questions that only the pruned row, or only the unpruned model, answers right; p is exact and "
    "two-sided (McNemar), and counts questions as independent. Retention is the share of the unpruned accuracy. "
    "Intervals resample images, * where that of the points excludes 0; where images have several questions they are to "
    "be trusted over p."
)
MEAN_NOTE = "The mean of the tasks' areas, each with equal weight."
FRONT_NOTE = "Rows that no other beats in accuracy and FLOPs at once, going by the figures alone, cheapest first:"


def _points(difference: Interval) -> str:
    """`+0.7 points [-2.1, +3.5]`."""
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def pair_sentence(pair: Pair, task: str) -> str:
    """Whether two rows can be told apart on a task, in one sentence."""
    if pair.difference.excludes_zero:
        return f"{pair.first} is ahead of {pair.second} on {task_label(task)}: {_points(pair.difference)}."
    return f"{pair.first} and {pair.second} cannot be told apart on {task_label(task)}: {_points(pair.difference)}."


def unpruned_sentences(rows: Sequence[Row], task: str) -> Iterator[str]:
    """One sentence a pruned row that cannot be told apart from the unpruned model."""
    for row, score in _scored(rows, task):
        if row.method != UNPRUNED_ROW and not score.difference.excludes_zero:
            yield (
                f"{row.name} and the unpruned model cannot be told apart on {task_label(task)}: "
                f"{_points(score.difference)}."
            )


def area_range(found: TaskSummary) -> str:
    """What the areas of a task are taken over."""
    if found.low is None:
        return "No method has an area: it takes rows at two budgets or more, and an unpruned model that answers."
    return f"Areas are over {percent(found.low, 1)} to {percent(found.high)} of the unpruned decoder prefill FLOPs."


def area_table(found: TaskSummary) -> tuple[list[str], list[list[str]]]:
    """(titles, rows of texts), best first."""
    lines = []
    for place, area in enumerate(found.areas, start=1):
        if area.area is None:
            lines.append(["-", area.method, str(area.points), "-", area.message])
        else:
            value = f"{area.area.value:.3f} [{area.area.low:.3f}, {area.area.high:.3f}]"
            lines.append([str(place), area.method, str(area.points), value, _behind(area)])
    return ["", "method", "rows", "area", "behind the first"], lines


def _behind(area: Area) -> str:
    if area.behind is None:
        return "-"
    value, low, high = area.behind.value, area.behind.low, area.behind.high
    noise = "" if area.behind.excludes_zero else ", within noise"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{noise}"


def unpruned_table(rows: Sequence[Row], task: str) -> tuple[list[str], list[list[str]]]:
    """(titles, rows of texts): each pruned row against the unpruned model on the same questions."""
    lines = []
    for row, score in _scored(rows, task):
        if row.method == UNPRUNED_ROW:
            continue
        kept = score.retention
        share = "-" if kept is None else f"{percent(kept.value, 1)} [{100 * kept.low:.1f}, {100 * kept.high:.1f}]"
        found = score.mcnemar
        counted = ["-"] * 3 if found is None else [str(found.wins), str(found.losses), _p_text(found.p)]
        difference = points_text(score.difference, interval=True)
        lines.append([row.method, keep_text(row), accuracy_text(score), share, difference, *counted])
    return ["method", "keep", "accuracy %", "retention", "points", "wins", "losses", "McNemar p"], lines


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _scored(rows: Sequence[Row], task: str) -> Iterator[tuple[Row, TaskScore]]:
    """The rows that have figures for a task."""
    return ((row, row.tasks[task]) for row in rows if task in row.tasks)


def summary_markdown(rows: Sequence[Row], summary: Summary) -> str:
    """The summary as a Markdown file.

    Args:
        rows: of one sweep, the unpruned row first.
        summary: of the same rows.
    """
    parts = ["# Summary", "", AREA_NOTE, ""]
    if summary.mean is not None:
        parts += ["## All tasks", "", MEAN_NOTE, ""]
        parts += [_markdown_table(*area_table(summary.mean)), ""]
    for task, found in summary.tasks.items():
        parts += [f"## {task_label(task)}", "", "### Area under the accuracy-FLOPs curve", "", area_range(found), ""]
        parts += [_markdown_table(*area_table(found)), ""] if found.areas else []
        parts += ["### Pareto front", "", f"{FRONT_NOTE} {', '.join(found.front)}.", ""]
        parts += ["### Against the unpruned model", "", TEST_NOTE, "", _markdown_table(*unpruned_table(rows, task)), ""]
        parts += ["### Within noise", "", MULTIPLE, ""]
        for pairs in found.leaders.values():
            lead = pairs[0].first
            beaten = [pair.second for pair in pairs if pair.difference.excludes_zero]
            parts += [f"- {pair_sentence(pair, task)}" for pair in pairs if not pair.difference.excludes_zero]
            parts += [f"- {lead} is ahead of {', '.join(beaten)} on {task_label(task)}."] if beaten else []
        parts += [f"- {sentence}" for sentence in unpruned_sentences(rows, task)]
        parts.append("")
    return "\n".join(parts).rstrip("\n") + "\n"


def _markdown_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
