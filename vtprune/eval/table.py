"""The sweep as a table: for the terminal (rich) and as Markdown."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

from rich import box
from rich.table import Table

from vtprune.eval.flops import CONVENTIONS, flop_texts, flop_unit
from vtprune.eval.rows import UNPRUNED_ROW, Row, TaskScore
from vtprune.eval.stats import Interval
from vtprune.specs import split_methods

__all__ = [
    "accuracy_text",
    "difference_of",
    "headers",
    "keep_text",
    "legend",
    "markdown",
    "percent",
    "points_text",
    "reference_of",
    "rich_table",
    "row_cells",
    "share_text",
    "task_label",
    "tasks_of",
]

_NONE = "-"
_FLOPS_LEGEND = (
    " image MACs: multiply-accumulates of the image tokens in the decoder (4nd²+2n²d+3ndm a layer; TransPrune, FastV). "
    "image FLOPs: twice that (YOPO). prefill FLOPs: 2 x multiply-accumulates with text, attention and padding, as run; "
    "all a question."
)


def task_label(task: str) -> str:
    """A task's name as people say it: `vtp_easy_vqa` -> `easy-vqa`."""
    return task.removeprefix("vtp_").replace("_", "-")


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Task names in order of appearance."""
    return list(dict.fromkeys(task for row in rows for task in row.tasks))


def reference_of(rows: Sequence[Row]) -> str | None:
    """The method that the rows are compared with at equal FLOPs, None if there is no comparison."""
    return next((row.against.method for row in rows if row.against is not None), None)


def headers(tasks: Sequence[str], reference: str | None = None, unit: str | None = None) -> list[str]:
    """Column titles; with a `reference` one more a task, with a `unit` (T, G, M) the three counts of FLOPs."""
    extra = [] if reference is None else [f"vs {reference}"]
    scores = [title for task in tasks for title in (f"{task_label(task)} %", "of full", *extra)]
    counts = [] if unit is None else [f"{title}, {unit}" for title in CONVENTIONS]
    return ["method", "keep", "tokens", *scores, "FLOPs", *counts, "KV", "time"]


def keep_text(row: Row) -> str:
    """The budget as written; `all` for the unpruned model."""
    return "all" if row.method == UNPRUNED_ROW else row.keep


def percent(share: float | None, digits: int = 0) -> str:
    """0.256 -> `26 %`; None -> `-`."""
    return _NONE if share is None else f"{100 * share:.{digits}f} %"


def accuracy_text(score: TaskScore) -> str:
    """`87.5 [84, 91]`: accuracy in percent with its 95 % interval."""
    interval = score.accuracy
    return f"{100 * interval.value:.1f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def share_text(score: TaskScore, *, interval: bool = False) -> str:
    """`92 %*`: share of the unpruned accuracy, starred if the loss on the same questions is beyond noise.

    `92 %* [88, 96]` with the interval, where there is one.
    """
    bounds = ""
    if interval and score.retention is not None:
        bounds = f" [{100 * score.retention.low:.0f}, {100 * score.retention.high:.0f}]"
    return percent(score.share) + ("*" if score.difference.high < 0 else "") + bounds


def points_text(difference: Interval | None, *, interval: bool = False) -> str:
    """`+7.3*`: points of accuracy, starred if beyond noise either way; `+7.3* [+2.0, +12.5]` with the interval."""
    if difference is None:
        return _NONE
    star = "*" if difference.excludes_zero else ""
    bounds = f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]" if interval else ""
    return f"{100 * difference.value:+.1f}{star}{bounds}"


def difference_of(row: Row, task: str) -> Interval | None:
    """Accuracy of the row minus that of its reference, None if they were not compared."""
    return None if row.against is None else row.against.differences.get(task)


def row_cells(
    row: Row,
    tasks: Sequence[str],
    reference: str | None = None,
    *,
    intervals: bool = False,
    unit: str | None = None,
) -> list[str]:
    """The texts of one row, in the order of `headers`; `intervals` writes those of share and comparison out."""
    keep = keep_text(row)
    if row.status != "ok":
        floor = _NONE if row.floor is None else f"floor {row.floor:.1f}"
        return [row.method, keep, floor, row.status, *[_NONE] * (len(headers(tasks, reference, unit)) - 4)]
    scores: list[str] = []
    for task in tasks:
        score = row.tasks.get(task)
        share = _NONE if score is None else share_text(score, interval=intervals)
        scores += [_NONE if score is None else accuracy_text(score), share]
        if reference is not None:
            scores.append(points_text(difference_of(row, task), interval=intervals))
    tokens = _NONE if row.average_tokens is None else f"{row.average_tokens:.1f}"
    prefill = _NONE if row.prefill_ratio is None else f"{row.prefill_ratio:.2f}"
    counts = [] if unit is None else flop_texts(row, unit)
    return [row.method, keep, tokens, *scores, percent(row.flops_share), *counts, percent(row.kv_share), prefill]


def legend(rows: Sequence[Row], *, compared: bool = True, conventions: bool = False) -> str:
    """What the columns mean, with the numbers of this run.

    `compared` explains the comparison, if there is one, `conventions` the three counts of FLOPs.
    """
    first = rows[0]
    counts = [f"{task_label(task)} {s.questions} questions on {s.images} images" for task, s in first.tasks.items()]
    total = "" if first.visual_tokens is None else f" of {first.visual_tokens:.0f}"
    return (
        f"tokens: visual tokens{total} that enter a decoder layer, averaged over the layers. "
        f"Accuracy: exact match, 95 % interval by bootstrap over images ({'; '.join(counts)}). "
        "of full: share of the unpruned accuracy, * where the paired 95 % interval of the loss excludes 0. "
        "FLOPs, KV: share of the unpruned decoder prefill and cache. "
        "time: prefill against unpruned, vision tower included, medians of one interleaved run."
        f"{_FLOPS_LEGEND if conventions else ''}{_reference_legend(rows) if compared else ''}"
    )


def _reference_legend(rows: Sequence[Row]) -> str:
    """What a row is compared with, and which share of the FLOPs that had."""
    found = [
        (row.against.tokens, row.against.reference_share, row.against.share)
        for row in rows
        if row.against is not None and row.against.tokens is not None and row.against.reference_share is not None
    ]
    if not found:
        return ""
    name = reference_of(rows)
    tokens, shares, mine = zip(*found, strict=True)
    above = max(0.0, *(100 * (share - own) for share, own in zip(shares, mine, strict=True)))
    most = "; all tokens where that is not enough" if any(map(operator.lt, shares, mine)) else ""
    return (
        f" vs {name}: points of accuracy beyond {name} at the same FLOPs of decoder prefill (what is saved in the "
        "tower not counted), * where the paired 95 % interval excludes 0. "
        f"{name} kept the fewest tokens that cost no less than the row{most}: {min(tokens):.4g} to {max(tokens):.4g} "
        f"tokens, {100 * min(shares):.1f} to {100 * max(shares):.1f} % of the unpruned FLOPs, at most {above:.2f} % of "
        "them above the row."
    )


def rich_table(rows: Sequence[Row], width: int = 120, *, conventions: bool = False) -> Table:
    """The table for a terminal of `width` columns, one block a method; two tasks fit into 80.

    Below 100 columns the comparison with a reference is left out, and its legend with it. `conventions` adds the three
    counts of FLOPs in use, and wants a terminal of 130 columns.
    """
    tasks, wide = tasks_of(rows), width >= 100
    unit = flop_unit(rows) if conventions else None
    reference = reference_of(rows) if wide else None
    table = Table(
        title="Accuracy against token budget",
        caption=legend(rows, compared=wide, conventions=conventions),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1 if wide else 0, 0, 0),
    )
    for index, title in enumerate(headers(tasks, reference, unit)):
        words = title.replace(" ", "\n") if index > 2 else title
        # only these fold: chains are long, and the tokens column also holds the floor of a budget out of reach
        folds = index in (0, 2)
        justify = "left" if index < 2 else "right"
        least = {0: 8, 2: 6}.get(index)
        table.add_column(words, justify=justify, no_wrap=not folds, min_width=least, overflow="fold")
    for row, following in pairwise([*rows, None]):
        if row is not None:
            ends = following is None or following.method != row.method
            style = "bold" if row.method == UNPRUNED_ROW else "red" if row.status == "failed" else None
            method, *cells = row_cells(row, tasks, reference, unit=unit)
            table.add_row("\n+".join(split_methods(method, "+")), *cells, end_section=ends, style=style)
    return table


def markdown(rows: Sequence[Row], *, conventions: bool = False) -> str:
    """The same table as Markdown, legend below."""
    tasks, reference = tasks_of(rows), reference_of(rows)
    unit = flop_unit(rows) if conventions else None
    titles = headers(tasks, reference, unit)
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    lines += ["| " + " | ".join(row_cells(row, tasks, reference, unit=unit)) + " |" for row in rows]
    return "\n".join([*lines, "", legend(rows, conventions=conventions)]) + "\n"
