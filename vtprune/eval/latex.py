r"""The sweep as a LaTeX table: needs `\usepackage{booktabs}` and, for wide tables, `\usepackage{graphicx}`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from vtprune.eval.flops import flop_unit
from vtprune.eval.rows import Row
from vtprune.eval.table import headers, legend, reference_of, row_cells, task_label, tasks_of

__all__ = ["latex_escape", "latex_table"]

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "²": "$^2$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_LETTER = re.compile("|".join(re.escape(letter) for letter in _ESCAPES))
_NUMBER = re.compile(r"^([+-]?)(\d+(?:\.\d+)?)((?: %)?)(\*?)((?: \[[^\]]*\])?)$")


def latex_escape(text: str) -> str:
    """The text as LaTeX prints it letter by letter."""
    return _LETTER.sub(lambda found: _ESCAPES[found.group()], text)


def latex_table(rows: Sequence[Row], *, conventions: bool = False, label: str = "tab:vtprune") -> str:
    r"""The table of the Markdown file with booktabs rules, one block a method, the legend as its caption.

    Args:
        rows: of one sweep, the unpruned row first.
        conventions: the three counts of FLOPs in use as columns.
        label: for `\ref`.
    """
    tasks, reference = tasks_of(rows), reference_of(rows)
    unit = flop_unit(rows) if conventions else None
    titles = headers(tasks, reference, unit)
    each = 2 if reference is None else 3
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex_escape(legend(rows, conventions=conventions))}}}",
        rf"\label{{{label}}}",
        # tables of two tasks are wider than a column: scaled to the text, never up
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{ll{'r' * (len(titles) - 2)}}}",
        r"\toprule",
        *_heads(titles, tasks, each),
        r"\midrule",
    ]
    for row, following in pairwise([*rows, None]):
        if row is not None:
            cells = row_cells(row, tasks, reference, intervals=True, unit=unit)
            lines.append(" & ".join(_cell(cell) for cell in cells) + r" \\")
            if following is not None and following.method != row.method:
                lines.append(r"\midrule")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


def _heads(titles: Sequence[str], tasks: Sequence[str], each: int) -> list[str]:
    """Two lines of titles: tasks over the columns that belong to them, and the rules between."""
    groups = [rf"\multicolumn{{{each}}}{{c}}{{{latex_escape(task_label(task))}}}" for task in tasks]
    rules = [rf"\cmidrule(lr){{{4 + each * i}-{3 + each * (i + 1)}}}" for i in range(len(tasks))]
    after = [""] * (len(titles) - 3 - each * len(tasks))
    names = ["accuracy \\%" if title.endswith(" %") else latex_escape(title) for title in titles]
    return [" & ".join(["", "", "", *groups, *after]) + r" \\", "".join(rules), " & ".join(names) + r" \\"]


def _cell(text: str) -> str:
    """A figure with a sign and a star as math and its interval small; anything else as text."""
    found = _NUMBER.match(text)
    if found is None:
        return "--" if text == "-" else latex_escape(text)
    sign, digits, unit, star, bounds = found.groups()
    figure = f"{'$' + sign + '$' if sign else ''}{digits}{unit.replace(' %', chr(92) + ',' + chr(92) + '%')}"
    small = rf" {{\scriptsize {latex_escape(bounds.strip()).replace('-', '$-$')}}}" if bounds else ""
    return f"{figure}{'$^*$' if star else ''}{small}"
