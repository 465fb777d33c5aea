"""The files of a sweep: figures as JSONL, Markdown and LaTeX, plots, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtprune.eval.flops import count_flops
from vtprune.eval.kinds import deciding_rows, kinds_markdown, plot_kinds
from vtprune.eval.latex import latex_table
from vtprune.eval.plot import plot_rows
from vtprune.eval.report_html import write_report
from vtprune.eval.rows import Row, write_rows
from vtprune.eval.summary import Summary, summarise
from vtprune.eval.summary_text import summary_markdown
from vtprune.eval.table import markdown

if TYPE_CHECKING:
    from vtprune.eval.examples import Example
    from vtprune.eval.sweep import SweepResult

__all__ = ["write_figures", "write_page"]


def write_figures(
    result: SweepResult, out: Path, seed: int, *, conventions: bool = False
) -> tuple[dict[str, Path], Summary]:
    """Everything but the page and the predictions.

    Args:
        result: of a sweep.
        out: the folder.
        seed: of the bootstrap.
        conventions: the three counts of FLOPs in use as columns of the tables; `rows.jsonl` holds them either way.

    Returns:
        the files by name, and the summary.
    """
    count_flops(result.rows, result.answers)
    names = ("rows.jsonl", "table.md", "table.tex", "summary.md", "accuracy.png")
    paths = {name: out / name for name in names}
    # figures first: they survive if the rest cannot be written
    write_rows(result.rows, paths["rows.jsonl"])
    summary = summarise(result.rows, result.answers, seed)
    paths["table.md"].write_text(markdown(result.rows, conventions=conventions), encoding="utf-8")
    paths["table.tex"].write_text(latex_table(result.rows, conventions=conventions), encoding="utf-8")
    paths["summary.md"].write_text(summary_markdown(result.rows, summary), encoding="utf-8")
    plot_rows(result.rows, paths["accuracy.png"])
    if deciding_rows(result.rows):
        paths |= {name: out / name for name in ("kinds.md", "kinds.png")}
        paths["kinds.md"].write_text(kinds_markdown(result.rows), encoding="utf-8")
        plot_kinds(result.rows, paths["kinds.png"])
    return paths, summary


def write_page(
    rows: Sequence[Row],
    summary: Summary,
    out: Path,
    examples: Sequence[Example] = (),
    *,
    conventions: bool = False,
) -> dict[str, Path]:
    """`report.html`, beside the plot that `write_figures` wrote."""
    path = out / "report.html"
    write_report(rows, out / "accuracy.png", path, examples, summary, conventions=conventions)
    return {path.name: path}
