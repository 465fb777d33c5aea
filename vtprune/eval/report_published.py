"""The page's part on what papers report: tables labelled as theirs, folded where they are about another model."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vtprune.eval.published import PaperTable, applies, is_that_model, published
from vtprune.eval.report_summary import html_table
from vtprune.eval.rows import Row

__all__ = ["published_html"]

_NOTE = (
    "Nothing in this section was measured here. These are accuracies that papers print for LLaVA-1.5-7B (576 visual "
    "tokens), each with the paper it was read in. Papers disagree about the same method and budget, and their unpruned "
    "models differ as well, so shares should be compared inside one table only."
)
_SAME = (
    " In the plot against visual tokens they are hollow marks. VQAv2 and VizWiz are validation splits here and test "
    "servers there, and TextVQA prompts there hold OCR tokens."
)


def published_html(rows: Sequence[Row]) -> str:
    """A heading and the folded tables; unfolded where model or tasks are those of the papers."""
    opened = " open" if applies(rows) else ""
    tables = "".join(f"<h3>{escape(table.title)}</h3>{_table(table)}" for table in published())
    note = _NOTE + (_SAME if is_that_model(rows) else "")
    return (
        '<h2>What papers report</h2><p class="note">'
        f"{escape(note)}</p><details{opened}><summary>Published numbers, not measured here</summary>{tables}</details>"
    )


def _table(table: PaperTable) -> str:
    extra = [name for name in ("macs", "retention", "average") if any(getattr(row, name) for row in table.rows)]
    titles = {"macs": "image MACs, T", "retention": "retention %", "average": "average"}
    head = ["method", "tokens", *table.columns, *(titles[name] for name in extra), "source"]
    full = ["unpruned", "576", *(_text(table.full.get(name)) for name in table.columns), *["-"] * len(extra), "-"]
    lines = [full] if table.full else []
    for row in table.rows:
        scores = [_text(row.scores.get(name)) for name in table.columns]
        if row.vizwiz is not None:
            place = table.columns.index("VizWiz")
            scores[place] += f" ({row.vizwiz})"
        figures = [_text(getattr(row, name)) for name in extra]
        if row.tasks is not None and "retention" in extra:
            figures[extra.index("retention")] += f" ({row.tasks} tasks)"
        lines.append([row.method, _text(row.tokens), *scores, *figures, "; ".join(row.source)])
    return f'<p class="note">{escape(table.note)}</p><div class="scroll">{html_table(head, lines)}</div>'


def _text(value: float | None) -> str:
    return "-" if value is None else str(value)
