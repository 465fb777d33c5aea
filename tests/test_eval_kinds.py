"""Cells of methods that decide by themselves, what they spend by kind of question, and learned ones without weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from eval_helpers import TASKS, pruned_row, rows
from PIL import Image

from vtprune.errors import BudgetError, UntrainedError
from vtprune.eval.cell import run_cell
from vtprune.eval.keeps import OWN, parse_keeps
from vtprune.eval.kinds import deciding_rows, kinds_markdown, plot_kinds
from vtprune.eval.plot import legend_columns, plot_rows
from vtprune.eval.report_html import write_report
from vtprune.eval.rows import KindScore, Row, read_rows, write_rows
from vtprune.eval.sweep import Sweep
from vtprune.eval.table import markdown
from vtprune.specs import row_chain


def decided() -> list[Row]:
    """The usual rows and one that decided: counting costs more than colours, which it answers less well."""
    row = dataclasses.replace(pruned_row("dyvte", "own", 0.4, 0.88), keep_value=None)
    kinds = {"count": KindScore(0.91, 25, 200.0), "color": KindScore(0.85, 25, 40.0)}
    row.tasks = {task: dataclasses.replace(score, kinds=kinds) for task, score in row.tasks.items()}
    return [*rows(), row]


def test_cells_of_a_sweep() -> None:
    keeps = tuple(parse_keeps("1,1/2,64"))

    def cells(*methods: str) -> list[tuple[str, str]]:
        return [(m, k.text) for m, k in Sweep(methods, keeps, ("t",)).cells()]

    assert cells("fastv") == [("fastv", "1/2"), ("fastv", "64")]
    # takes no budget; can be given one; decides behind a method that has its own
    assert cells("dyvte", "atp") == [("dyvte", "own"), ("atp", "1/2"), ("atp", "64"), ("atp", "own")]
    assert cells("uniform@1/2+dyvte") == [("uniform@1/2+dyvte", "own")]
    assert cells("uniform@1/2+fastv") == [("uniform@1/2+fastv", "1/2"), ("uniform@1/2+fastv", "64")]
    assert str(OWN) == "own = what the method decides"
    for chain in ("uniform@1/2+fastv@8", "uniform+fastv", "uniform+fastv+dyvte"):
        with pytest.raises(BudgetError, match="exactly one method of a chain takes the row's budget"):
            row_chain(chain)


def test_what_each_kind_costs_is_listed_cheapest_first() -> None:
    text = kinds_markdown(decided())
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(lines) == 4
    assert [line.split(" | ")[1] for line in lines] == ["color", "color", "count", "count"]
    assert lines[0].endswith("| color | 25 | 40.0 | 85.0 | 90.0 |")
    assert text.startswith("dyvte: 102.4 of 256 visual tokens")
    assert kinds_markdown(rows()) == ""


def test_rows_without_kinds_or_with_a_budget_are_no_deciding_rows() -> None:
    all_rows = decided()
    assert [row.name for row in deciding_rows(all_rows)] == ["dyvte own"]
    bare = dataclasses.replace(all_rows[-1])
    bare.tasks = {task: dataclasses.replace(score, kinds={}) for task, score in bare.tasks.items()}
    assert deciding_rows([bare]) == []


def test_figure_and_page_show_them(tmp_path: Path) -> None:
    found = decided()
    plot_kinds(found, tmp_path / "kinds.png")
    with Image.open(tmp_path / "kinds.png") as image:
        assert min(image.size) > 200
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert (0, 114, 178) in {colour for _, colour in colours}
    write_report(found, tmp_path / "kinds.png", tmp_path / "report.html", [])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "91 (200 tokens)" in page
    assert "90 (" not in page.split("<h3>")[1]
    assert "| dyvte | own | 102.4 |" in markdown(found)
    write_rows(found, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == found
    assert TASKS[0] in found[-1].tasks


def test_a_learned_method_without_weights_is_no_failure() -> None:
    class Nobody:
        def attach(self, *given: object, **more: object) -> None:
            raise UntrainedError("dyvte is learned, and has no weights for this model")

    row = Row("dyvte", "own", None)
    assert run_cell(row, Nobody(), None) is None  # type: ignore[arg-type]
    assert (row.status, row.floor) == ("not trained", None)
    assert "has no weights" in row.message
    assert "| dyvte | own | - | not trained |" in markdown([*rows(), row])


def test_legends_stay_inside_their_figure(tmp_path: Path) -> None:
    """Names of chains are long; nothing but white touches the sides."""
    names = ("flowcut(text_cut=False)@1/2+gemfilter(layer=3)", "flowcut@1/3+transprune(layers=(5,6,8))", "a", "b", "c")
    found = [rows()[0], *(pruned_row(name, "1/2", 0.5, 0.8) for name in names)]
    plot_rows(found, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        grey = image.convert("L")
        below = grey.crop((0, int(0.8 * grey.height), grey.width, grey.height))
        sides = [below.crop((x, 0, x + 4, below.height)).getextrema()[0] for x in (0, below.width - 4)]
    assert sides == [255, 255]
    assert legend_columns(["x"] * 9, 11.2) == 9
    assert legend_columns([], 5.0) == 1
