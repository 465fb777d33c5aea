"""The summary's part of the page: areas, fronts, tests, and what is noise, one block a task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from vtprune.eval.rows import Row
from vtprune.eval.summary import Summary, TaskSummary
from vtprune.eval.summary_text import (
    FRONT_NOTE,
    MULTIPLE,
    TEST_NOTE,
    area_note,
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
    parts = ["<h2>Which method is ahead</h2>"]
    if summary.mean is not None:
        note = "The mean of the tasks' areas under their accuracy-FLOPs curves, each task with equal weight."
        parts += [f'<h3>All tasks</h3><p class="note">{note}</p>', _scroll(*area_table(summary.mean))]
    for task, found in summary.tasks.items():
        parts += [f"<h3>{escape(task_label(task))}</h3>", _task(rows, task, found)]
    return "".join(parts)


def _task(rows: Sequence[Row], task: str, found: TaskSummary) -> str:
    area = _scroll(*area_table(found)) if found.areas else ""
    pairs = [pair for pairs in found.leaders.values() for pair in pairs]
    apart = [pair_sentence(pair, task) for pair in pairs if pair.difference.excludes_zero]
    noise = [pair_sentence(pair, task) for pair in pairs if not pair.difference.excludes_zero]
    noise += unpruned_sentences(rows, task)
    tests = _folded("Against the unpruned model", TEST_NOTE, _scroll(*unpruned_table(rows, task)))
    return (
        f'<p class="note">{escape(area_note(found))}</p>{area}'
        f"<p>{escape(FRONT_NOTE)} <b>{escape(', '.join(found.front))}</b>.</p>{tests}"
        f"{_folded(f'Within noise: {len(noise)} pairs', MULTIPLE, _listed(noise))}"
        f"{_folded(f'Beyond noise: {len(apart)} pairs', MULTIPLE, _listed(apart))}"
    )


def _folded(title: str, note: str, body: str) -> str:
    return f'<details><summary>{escape(title)}</summary><p class="note">{escape(note)}</p>{body}</details>'


def _listed(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _scroll(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f'<div class="scroll">{html_table(titles, lines)}</div>'


def html_table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A plain table of texts."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
