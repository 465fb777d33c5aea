"""The sweep as one self-contained HTML page: plots, summary, sortable table, pictures, papers, how it was made."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from vtprune.eval.flops import flop_texts, flop_unit
from vtprune.eval.interactive import figures_json, require_plotly
from vtprune.eval.report_published import published_html
from vtprune.eval.report_summary import summary_html
from vtprune.eval.rows import UNPRUNED_ROW, Row
from vtprune.eval.table import difference_of, headers, legend, percent, reference_of, row_cells, task_label, tasks_of

if TYPE_CHECKING:
    from PIL import Image

    from vtprune.eval.examples import Example
    from vtprune.eval.summary import Summary

__all__ = ["write_report"]

_TEMPLATE = Path(__file__).with_name("report_template.html")
_PLOT_NOTE = (
    "Bars are 95 % intervals over images. Point at a mark for its figures; click a method in the legend to hide it, "
    "twice to see it alone. The broad line is the Pareto front: the best accuracy for so many FLOPs or less."
)
_STAYS_NOTE = (
    "Chosen to show failures: questions that the unpruned model answers right and pruned rows do not come first "
    "(framed in red), then one that all answer right. Tokens that outlive every stage (in brackets: how many), at the "
    "budget in the middle of the sweep; the rest is greyed out. A method that drops inside the decoder has read the "
    "grey cells in its first layers; one that merges has averaged them into the cells that are left."
)
_KINDS_NOTE = (
    "Accuracy in percent; the number of questions stands beside each kind. Few questions a kind: read differences of a "
    "few points as noise."
)


def write_report(
    rows: Sequence[Row],
    plot: Path,
    path: Path,
    examples: Sequence[Example] = (),
    summary: Summary | None = None,
    *,
    conventions: bool = False,
) -> None:
    """Write the page.

    Args:
        rows: of one sweep, the unpruned row first.
        plot: the PNG to embed.
        path: where to write.
        examples: images with kept tokens, may be empty.
        summary: of the same rows; its part of the page is left out if None.
        conventions: the table shows the three counts of FLOPs in use.
    """
    run = rows[0].run
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        subtitle=escape(_subtitle(rows)),
        plot=base64.b64encode(plot.read_bytes()).decode(),
        legend=escape(legend(rows, conventions=conventions)),
        summary=summary_html(rows, summary),
        table=_cells_table(rows, flop_unit(rows) if conventions else None),
        failures=_failures(rows),
        kinds=_kinds(rows),
        examples=_examples(examples),
        published=published_html(rows),
        plot_note=_PLOT_NOTE,
        figures=figures_json(rows),
        plotly=require_plotly(),
        command=escape(str(run.get("command") or "vtprune eval")),
        facts=_facts(run),
    )
    path.write_text(page, encoding="utf-8")


def _subtitle(rows: Sequence[Row]) -> str:
    methods = dict.fromkeys(row.method for row in rows if row.method != UNPRUNED_ROW)
    tasks = ", ".join(task_label(task) for task in tasks_of(rows))
    return f"{rows[0].run.get('model', 'model')}, {len(methods)} methods, tasks: {tasks}."


def _number(value: float | None) -> str:
    """Sort key of a cell; empty cells sort last either way."""
    return "" if value is None else f"{value:.6g}"


def _sort_keys(row: Row, tasks: Sequence[str], reference: str | None, unit: str | None) -> list[str]:
    """One key a column of `headers`: figures sort by value, not by their text."""
    keys = [row.method, _number(row.keep_value), _number(row.average_tokens)]
    for task in tasks:
        score = row.tasks.get(task)
        keys += ["", ""] if score is None else [_number(score.accuracy.value), _number(score.share)]
        if reference is not None:
            difference = difference_of(row, task)
            keys.append(_number(None if difference is None else difference.value))
    counts = [] if unit is None else ["" if text == "-" else text for text in flop_texts(row, unit)]
    return [*keys, _number(row.flops_share), *counts, _number(row.kv_share), _number(row.prefill_ratio)]


def _head(titles: Sequence[str]) -> str:
    cells = "".join(f'<th scope="col"><button type="button">{escape(title)}</button></th>' for title in titles)
    return f"<thead><tr>{cells}</tr></thead>"


def _cells_table(rows: Sequence[Row], unit: str | None) -> str:
    tasks, reference = tasks_of(rows), reference_of(rows)
    lines = []
    for row in rows:
        texts = row_cells(row, tasks, reference, intervals=True, unit=unit)
        keys = _sort_keys(row, tasks, reference, unit)
        cells = "".join(
            f'<td data-value="{escape(key)}">{escape(text)}</td>' for text, key in zip(texts, keys, strict=True)
        )
        style = "unpruned" if row.method == UNPRUNED_ROW else "" if row.status == "ok" else "missing"
        lines.append(f'<tr class="{style}" title="{escape(row.message or _beside(row))}">{cells}</tr>')
    return f'<table class="sortable">{_head(headers(tasks, reference, unit))}<tbody>{"".join(lines)}</tbody></table>'


def _beside(row: Row) -> str:
    """What the row is compared with."""
    other = row.against
    if other is None or other.tokens is None:
        return ""
    return (
        f"beside {other.method} with {other.tokens:.4g} tokens: {percent(other.reference_share, 1)} of the FLOPs "
        f"(decoder prefill), this row {percent(other.share, 1)}"
    )


def _kinds(rows: Sequence[Row]) -> str:
    """The tables of all tasks with kinds of question; nothing if none has."""
    tables = "".join(_kinds_table(rows, task) for task in tasks_of(rows))
    return tables and f'<h2>By kind of question</h2><p class="note">{escape(_KINDS_NOTE)}</p>{tables}'


def _kinds_table(rows: Sequence[Row], task: str) -> str:
    """Accuracy of every cell by kind of question; nothing for a task without kinds."""
    # of the row that has the task: the unpruned one, unless the task failed there
    kinds = next(row.tasks[task].kinds for row in rows if task in row.tasks)
    if not kinds:
        return ""
    titles = ["method", "keep", *(f"{kind} ({score.questions})" for kind, score in kinds.items())]
    lines = []
    for row in rows:
        if task not in row.tasks:
            continue
        keep = "all" if row.method == UNPRUNED_ROW else row.keep
        cells = [(row.method, row.method), (keep, _number(row.keep_value))]
        for kind in kinds:
            score = row.tasks[task].kinds.get(kind)
            if score is None:
                cells.append(("-", ""))
                continue
            spent = f" ({score.tokens:.0f} tokens)" if row.keep_value is None and score.tokens is not None else ""
            cells.append((f"{100 * score.accuracy:.0f}{spent}", _number(score.accuracy)))
        style = "unpruned" if row.method == UNPRUNED_ROW else ""
        texts = "".join(f'<td data-value="{escape(key)}">{escape(text)}</td>' for text, key in cells)
        lines.append(f'<tr class="{style}">{texts}</tr>')
    table = f'<table class="sortable">{_head(titles)}<tbody>{"".join(lines)}</tbody></table>'
    return f'<h3>{escape(task_label(task))}</h3><div class="scroll">{table}</div>'


def _failures(rows: Sequence[Row]) -> str:
    """Why cells have no figures."""
    found = [(f"{row.name}: {row.status}", row.message) for row in rows if row.status != "ok"]
    found += [(f"{row.name}, {task_label(task)}", text) for row in rows for task, text in row.missing.items()]
    if not found:
        return ""
    parts = [f"<p>{escape(title)}</p><pre>{escape(message.strip())}</pre>" for title, message in found]
    return f"<details><summary>Cells without figures: {len(found)}</summary>{''.join(parts)}</details>"


def _picture(image: Image.Image) -> str:
    """A JPEG as text: a page has hundreds of these."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    parts = ["<h2>What stays</h2>", f'<p class="note">{escape(_STAYS_NOTE)}</p>']
    for task in dict.fromkeys(example.task for example in examples):
        parts.append(f"<h3>{escape(task_label(task))}</h3>" if task else "")
        parts += [_example(example) for example in examples if example.task == task]
    return "".join(parts)


def _example(example: Example) -> str:
    lost = f" <span>lost by {example.lost} of {len(example.tiles) - 1}</span>" if example.lost else ""
    tiles = []
    for tile in example.tiles:
        verdict = "right" if tile.right else "wrong"
        source = f"data:image/jpeg;base64,{_picture(tile.image)}"
        tiles.append(
            f'<div class="tile{" lost" if tile.lost else ""}"><img alt="{escape(tile.caption)}" src="{source}">'
            f'{escape(tile.caption)}<span class="{verdict}">{escape(tile.prediction) or "(nothing)"}</span></div>'
        )
    asked = f'<p class="question">{escape(example.question)} <b>{escape(example.answer)}</b>{lost}</p>'
    return f'{asked}<div class="tiles">{"".join(tiles)}</div>'


def _facts(run: dict[str, object]) -> str:
    """The run's settings and versions as a definition list."""
    pairs: list[tuple[str, object]] = []
    for name, value in run.items():
        if name == "command":
            continue
        if isinstance(value, dict):
            pairs += value.items()
        else:
            pairs.append((name.replace("_", " "), "all" if name == "limit" and value is None else value))
    return "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs)
