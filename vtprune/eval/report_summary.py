"""The summary's part of the page: areas, fronts, tests, and what is noise, one block a task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from vtprune.eval.rows import Row
from vtprune.eval.summary import Summary, TaskSummary
from vtprune.eval.summary_text import (
    AREA_NOTE,
    FRONT_NOTE,
    MEAN_NOTE,
    MULTIPLE,
    TEST_NOTE,
    area_range,
    area_table,
    pair_sentence,
    unpruned_sentences,
    unpruned_table,
)
from vtprune.eval.table import task_label

__all__ = ["html_table", "summary_html"]


def summary_html(rows: Sequence[Row], summary: Summary | None) -> str:
    """One block a task, that of all tasks first; nothing without a summary."""
    if summary is None:
        return ""
    parts = [f'<h2>Which method is ahead</h2><p class="note">{escape(AREA_NOTE)}</p>']
    if summary.mean is not None:
        parts.append(f'<h3>All tasks</h3><p class="note">{escape(MEAN_NOTE)}</p>{_scroll(*area_table(summary.mean))}')
    # several tasks are folded: the mean comes first
    opened = "" if len(summary.tasks) > 1 else " open"
    for task, found in summary.tasks.items():
        title = f"<summary><b>{escape(task_label(task))}</b>: {escape(_first(found))}</summary>"
        parts.append(f"<details{opened}>{title}{_task(rows, task, found)}</details>")
    return "".join(parts)


def _first(found: TaskSummary) -> str:
    """Who leads, for the folded heading."""
    ranked = [area for area in found.areas if area.area is not None]
    if not ranked:
        return "no areas"
    level = [area.method for area in ranked[1:] if area.behind is not None and not area.behind.excludes_zero]
    return f"{ranked[0].method} first" + (f", {', '.join(level)} within noise of it" if level else "")


def _task(rows: Sequence[Row], task: str, found: TaskSummary) -> str:
    area = _scroll(*area_table(found)) if found.areas else ""
    pairs = [pair for pairs in found.leaders.values() for pair in pairs]
    apart = [pair_sentence(pair, task) for pair in pairs if pair.difference.excludes_zero]
    noise = [pair_sentence(pair, task) for pair in pairs if not pair.difference.excludes_zero]
    noise += unpruned_sentences(rows, task)
    tests = _folded("Against the unpruned model", TEST_NOTE, _scroll(*unpruned_table(rows, task)))
    return (
        f'<p class="note">{escape(area_range(found))}</p>{area}'
        f"<p>{escape(FRONT_NOTE)} <b>{escape(', '.join(found.front))}</b>.</p>{tests}"
        f"{_folded(f'Within noise: {len(noise)} pairs', MULTIPLE, _listed(noise))}"
        f"{_folded(f'Beyond noise: {len(apart)} pairs', MULTIPLE, _listed(apart))}"
    )


def _folded(title: str, note: str, body: str) -> str:
    return f'<details><summary>{escape(title)}</summary><p class="note">{escape(note)}</p>{body}</details>'


def _listed(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _scroll(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f'<div class="scroll">{html_table(titles, lines, words=2)}</div>'


def html_table(titles: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A plain table of texts, the first `words` columns set as words and the others as figures."""
    marks = [' class="word"' if place < words else "" for place in range(len(titles))]
    head = "".join(f'<th scope="col"{mark}>{escape(title)}</th>' for mark, title in zip(marks, titles, strict=True))
    cells = ((f"<td{mark}>{escape(text)}</td>" for mark, text in zip(marks, line, strict=True)) for line in lines)
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
