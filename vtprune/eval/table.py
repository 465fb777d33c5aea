"""The sweep as a table: for the terminal (rich) and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich import box
from rich.table import Table

from vtprune.eval.rows import UNPRUNED_ROW, Row, TaskScore

__all__ = [
    "accuracy_text",
    "headers",
    "legend",
    "markdown",
    "percent",
    "rich_table",
    "row_cells",
    "share_text",
    "task_label",
    "tasks_of",
]

_NONE = "-"


def task_label(task: str) -> str:
    """A task's name as people say it: `vtp_easy_vqa` -> `easy-vqa`."""
    return task.removeprefix("vtp_").replace("_", "-")


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Task names in order of appearance."""
    return list(dict.fromkeys(task for row in rows for task in row.tasks))


def headers(tasks: Sequence[str]) -> list[str]:
    """Column titles."""
    scores = [title for task in tasks for title in (f"{task_label(task)} %", "of full")]
    return ["method", "keep", "tokens", *scores, "FLOPs", "KV", "time"]


def percent(share: float | None, digits: int = 0) -> str:
    """0.256 -> `26 %`; None -> `-`."""
    return _NONE if share is None else f"{100 * share:.{digits}f} %"


def accuracy_text(score: TaskScore) -> str:
    """`87.5 [84, 91]`: accuracy in percent with its 95 % interval."""
    interval = score.accuracy
    return f"{100 * interval.value:.1f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def share_text(score: TaskScore) -> str:
    """`92 %*`: share of the unpruned accuracy, starred if the loss on the same questions is beyond noise."""
    return percent(score.share) + ("*" if score.difference.high < 0 else "")


def row_cells(row: Row, tasks: Sequence[str]) -> list[str]:
    """The texts of one row, in the order of `headers`."""
    keep = "all" if row.method == UNPRUNED_ROW else row.keep
    if row.status != "ok":
        floor = _NONE if row.floor is None else f"floor {row.floor:.1f}"
        return [row.method, keep, floor, row.status, *[_NONE] * (2 * len(tasks) + 2)]
    scores: list[str] = []
    for task in tasks:
        score = row.tasks.get(task)
        scores += [_NONE, _NONE] if score is None else [accuracy_text(score), share_text(score)]
    tokens = _NONE if row.average_tokens is None else f"{row.average_tokens:.1f}"
    prefill = _NONE if row.prefill_ratio is None else f"{row.prefill_ratio:.2f}"
    return [row.method, keep, tokens, *scores, percent(row.flops_share), percent(row.kv_share), prefill]


def legend(rows: Sequence[Row]) -> str:
    """What the columns mean, with the numbers of this run."""
    first = rows[0]
    counts = [f"{task_label(task)} {s.questions} questions on {s.images} images" for task, s in first.tasks.items()]
    total = "" if first.visual_tokens is None else f" of {first.visual_tokens:.0f}"
    return (
        f"tokens: visual tokens{total} that enter a decoder layer, averaged over the layers. "
        f"Accuracy: exact match, 95 % interval by bootstrap over images ({'; '.join(counts)}). "
        "of full: share of the unpruned accuracy, * where the paired 95 % interval of the loss excludes 0. "
        "FLOPs, KV: share of the unpruned decoder prefill and cache. "
        "time: prefill against unpruned, vision tower included, medians of one interleaved run."
    )


def rich_table(rows: Sequence[Row], width: int = 120) -> Table:
    """The table for a terminal of `width` columns, one block a method; two tasks fit into 80."""
    tasks = tasks_of(rows)
    table = Table(
        title="Accuracy against token budget",
        caption=legend(rows),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1 if width >= 100 else 0, 0, 0),
    )
    for index, title in enumerate(headers(tasks)):
        words = title.replace(" ", "\n") if index > 2 else title
        # only the tokens column may fold: it also holds the floor of a budget out of reach
        justify = "left" if index < 2 else "right"
        table.add_column(words, justify=justify, no_wrap=index != 2, min_width=6 if index == 2 else None)
    for row, following in pairwise([*rows, None]):
        if row is not None:
            ends = following is None or following.method != row.method
            style = "bold" if row.method == UNPRUNED_ROW else "red" if row.status == "failed" else None
            table.add_row(*row_cells(row, tasks), end_section=ends, style=style)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The same table as Markdown, legend below."""
    tasks = tasks_of(rows)
    titles = headers(tasks)
    lines = ["| " + " | ".join(titles) + " |", "|---|---|" + "---:|" * (len(titles) - 2)]
    lines += ["| " + " | ".join(row_cells(row, tasks)) + " |" for row in rows]
    return "\n".join([*lines, "", legend(rows)]) + "\n"
