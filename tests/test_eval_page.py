"""The report page: nothing is fetched, plots are what plotly reads, failures come first, papers' numbers are theirs."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eval_helpers import TASKS, answered, pruned_row, rows
from PIL import Image

from vtprune.errors import VtpruneError
from vtprune.eval.cell import Answers
from vtprune.eval.counts import Totals
from vtprune.eval.examples import Example, Tile, failures_first
from vtprune.eval.harness import Sample
from vtprune.eval.interactive import DARK_COLOURS, figure, figures_json, require_plotly
from vtprune.eval.plot import COLOURS, plot_rows
from vtprune.eval.published import COLUMN_OF, applies, is_that_model, paper_marks, published
from vtprune.eval.report_html import write_report
from vtprune.eval.report_published import published_html
from vtprune.eval.rows import UNPRUNED_ROW, Row
from vtprune.eval.stats import McNemar
from vtprune.eval.suites import SUITES
from vtprune.eval.summary import summarise


class Fetched(HTMLParser):
    """Collects what a browser would fetch by itself, and the scripts and styles of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside: list[str] = []
        self.style = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside.append(tag)
        values = {name: value or "" for name, value in attrs}
        for name in ("src", "href", "srcset", "poster", "data", "action", "background"):
            if name in values and not values[name].startswith("data:"):
                self.found.append(f"{tag} {name}={values[name]}")
        if tag in ("link", "base", "iframe", "object", "embed") or values.get("http-equiv"):
            self.found.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        if self.inside and self.inside[-1] == "style":
            self.style += data


def page_of(found: list[Row], folder: Path, *more: object) -> str:
    plot_rows(found, folder / "plot.png")
    write_report(found, folder / "plot.png", folder / "report.html", *more)  # type: ignore[arg-type]
    return (folder / "report.html").read_text(encoding="utf-8")


def of_llava(task: str = "gqa") -> list[Row]:
    """The usual rows as if of LLaVA-1.5-7B on a task of the papers."""
    found = rows()
    for row in found:
        row.run = {**row.run, "model": "llava-hf/llava-1.5-7b-hf"}
        row.tasks = {task: row.tasks[TASKS[0]]} if row.tasks else {}
    return found


def test_nothing_on_the_page_is_fetched(tmp_path: Path) -> None:
    tile = Tile("fastv 1/2 (8)", "no", False, Image.new("RGB", (8, 8)), lost=True)
    page = page_of(of_llava(), tmp_path, [Example("is it?", "yes", (tile, tile), "gqa")])
    parser = Fetched()
    parser.feed(page)
    assert parser.found == []
    assert "url(" not in parser.style
    assert "@import" not in parser.style
    # beside plotly, whose source names addresses that it does not ask, no address stands on the page
    script = require_plotly()
    assert page.count(script) == 1
    rest = page.replace(script, "")
    assert "http:" not in rest
    assert "https:" not in rest
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon", rest)
    other = Fetched()
    other.feed('<img src="https://a/b.png"><link rel="icon"><script src="//c"></script><a href="data:,">')
    assert len(other.found) == 3


def test_plotly_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(VtpruneError, match=re.escape("needs plotly") + ".*pip install 'vtprune"):
        require_plotly()


@pytest.mark.parametrize("axis", ["flops", "tokens", "time"])
def test_figures_are_what_plotly_reads(axis: str) -> None:
    import plotly.graph_objects as go

    found = of_llava()
    drawn = figure(found, "gqa", axis)
    # raises on any name or value that plotly does not know
    go.Figure(drawn)
    traces = {trace["name"]: trace for trace in drawn["data"]}
    assert {"unpruned", "fastv", "random"} <= set(traces)
    assert ("Pareto front" in traces) is (axis == "flops")
    assert any(name.startswith("papers: ") for name in traces) is (axis == "tokens")
    assert traces["fastv"]["x"] == [{"flops": 0.55, "tokens": 128.0, "time": 0.65}[axis]]
    assert traces["fastv"]["y"] == [80.0]
    assert (traces["fastv"]["error_y"]["array"], traces["fastv"]["error_y"]["arrayminus"]) == ([5.0], [5.0])
    assert traces["unpruned"]["y"] == [90.0, 90.0]


def test_one_trace_a_method_in_order_of_cost_with_its_facts() -> None:
    found = [*rows()[:1], pruned_row("a<b", "1/2", 0.5, 0.8), pruned_row("a<b", "1/4", 0.25, 0.6)]
    score = found[1].tasks[TASKS[0]]
    found[1].tasks[TASKS[0]] = dataclasses.replace(score, mcnemar=McNemar(1, 6, 0.125))
    traces = {trace["name"]: trace for trace in figure(found, TASKS[0], "flops")["data"]}
    assert list(traces) == ["unpruned", "Pareto front", "a&lt;b"]
    trace = traces["a&lt;b"]
    assert trace["x"] == sorted(trace["x"])
    assert "<b>a&lt;b 1/2</b><br>accuracy 80.0 [75, 85] %" in trace["customdata"][1]
    assert "1 won, 6 lost, McNemar p 0.12" in trace["customdata"][1]
    # cheaper and worse, so both are on the front with the unpruned model at its end
    assert traces["Pareto front"]["x"] == [0.325, 0.55, 1.0]
    assert traces["Pareto front"]["y"] == [60.0, 80.0, 90.0]
    many = [rows()[0], *(pruned_row(f"method {n}", "1/2", 0.5, 0.8) for n in range(20))]
    looks = {
        (trace["meta"], trace["marker"]["symbol"], trace["line"]["dash"])
        for trace in figure(many, TASKS[0], "flops")["data"]
        if "meta" in trace
    }
    assert len(looks) == 20
    assert len(DARK_COLOURS) == len(COLOURS)


def test_the_data_of_the_plot_cannot_end_its_script() -> None:
    found = rows()
    found[1].method = "</script><b>"
    text = figures_json(found)
    assert "<" not in text
    data = json.loads(text)
    assert list(data["figures"]) == ["easy-vqa", "scenes"]
    assert list(data["figures"]["scenes"]) == ["flops", "tokens", "time"]
    for row in found:
        row.prefill_ratio = None
    assert list(json.loads(figures_json(found))["figures"]["scenes"]) == ["flops", "tokens"]


def test_a_row_may_lack_a_task(tmp_path: Path) -> None:
    found = rows()
    del found[1].tasks[TASKS[1]]
    found[1].missing = {TASKS[1]: "RuntimeError: <lost>"}
    answers = {
        row.name: Answers({task: answered(task, 50) for task in row.tasks}, Totals())
        for row in found
        if row.status == "ok"
    }
    page = page_of(found, tmp_path, (), summarise(found, answers))
    assert "RuntimeError: &lt;lost&gt;" in page
    assert "Cells without figures: 3" in page
    assert [trace["name"] for trace in figure(found, TASKS[1], "flops")["data"] if "meta" in trace] == ["random"]


def test_failures_are_shown_and_framed(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "red")
    full, kept = Tile("unpruned", "yes", True, image), Tile("fastv 1/2 (8)", "yes", True, image)
    gone = Tile("random 1/2 (8)", "<no>", False, image, lost=True)
    page = page_of(rows(), tmp_path, [Example("is it <there>?", "yes", (full, kept, gone), TASKS[1])])
    assert page.count('<div class="tile lost">') == 1
    assert "lost by 1 of 2" in page
    assert "is it &lt;there&gt;?" in page
    assert '<span class="wrong">&lt;no&gt;</span>' in page
    assert page.count("data:image/jpeg;base64,") == 3


def said(right: dict[str, str]) -> dict[str, dict[int, Sample]]:
    """Answers by row: a letter a question, `1` for right."""
    made = {}
    for name, letters in right.items():
        samples = answered(TASKS[0], 0, len(letters))
        made[name] = {
            place: dataclasses.replace(sample, score=float(letter))
            for place, (sample, letter) in enumerate(zip(samples, letters, strict=True))
        }
    return made


def test_what_pruning_lost_comes_first() -> None:
    #                     0 is wrong everywhere, 1 right everywhere, 2 lost by one, 3 by both, 4 by one, 5 won
    answers = said({UNPRUNED_ROW: "011110", "fastv": "011010", "random": "010001"})
    assert failures_first(answers, 6) == [3, 2, 4, 1, 0, 5]
    # the last place is kept for one that all have right
    assert failures_first(answers, 3) == [3, 2, 1, 4, 0, 5]
    assert failures_first(answers, 1) == [3, 1, 2, 4, 0, 5]
    # nothing lost, and nothing that all have right
    assert failures_first(said({UNPRUNED_ROW: "01", "fastv": "01"}), 2) == [1, 0]
    assert failures_first(said({UNPRUNED_ROW: "11", "fastv": "00"}), 2) == [0, 1]
    del answers["fastv"][3]
    assert 3 not in failures_first(answers, 6)


# what papers report


def test_published_numbers_are_those_of_the_papers() -> None:
    tables = {table.name: table for table in published()}
    assert {name: len(table.rows) for name, table in tables.items()} == {
        "copied": 51,
        "rerun": 24,
        "protocol": 22,
        "transprune": 6,
        "trivial": 5,
    }
    at = {(name, row.method, row.tokens): row for name, table in tables.items() for row in table.rows}
    # the two versions of one method stand side by side
    assert at["copied", "FastV (as copied)", 192].retention == 87.8
    assert at["rerun", "FastV", 192].retention == 95.9
    assert at["copied", "ToMe", 192].retention == 88.5
    assert at["rerun", "ToMe", 192].retention == 96.9
    assert at["copied", "FlowCut", 64].scores["GQA"] == 55.6
    assert at["protocol", "CDPruner", 64].average == 61.9
    assert (at["protocol", "DivPrune", 64].vizwiz, at["protocol", "DART", 64].vizwiz) == ("val", "test")
    assert at["transprune", "TransPrune-High", 238].macs == 1.56
    for table in tables.values():
        for row in table.rows:
            assert row.source, row
            assert all("arXiv" in source for source in row.source)
            assert set(row.scores) <= set(table.columns)


def test_retention_of_the_copied_rows_is_the_mean_of_their_shares() -> None:
    table = next(table for table in published() if table.name == "copied")
    names = [name for name in table.columns if name != "VizWiz"]
    for row in [*table.rows, *next(t for t in published() if t.name == "rerun").rows]:
        shares = [row.scores[name] / table.full[name] for name in names if name in row.scores]
        assert len(shares) == (row.tasks or 7), row
        assert row.retention == pytest.approx(100 * sum(shares) / len(shares), abs=0.06), row


def test_marks_are_drawn_for_the_papers_model_only() -> None:
    found = of_llava()
    marks = list(paper_marks(found, "gqa"))
    assert len(marks) == 51 + 24 + 22 + 3 + 5
    assert next(mark for mark in marks if mark.row.method == "FlowCut" and mark.tokens == 64).accuracy == 55.6
    assert list(paper_marks(of_llava("mme"), "mme")) == []
    assert list(paper_marks(rows(), "vtp_scenes")) == []
    other = of_llava()
    for row in other:
        row.run = {"model": "Qwen/Qwen2.5-VL-7B"}
    assert not is_that_model(other)
    assert list(paper_marks(other, "gqa")) == []
    # its tasks are theirs, though
    assert applies(other)
    assert not applies(rows())
    assert set(COLUMN_OF) <= set(SUITES["llava15"])


def test_what_papers_report_is_labelled_and_folded() -> None:
    theirs, ours = published_html(of_llava()), published_html(rows())
    assert "<details open>" in theirs
    assert "<details>" in ours
    for text in (theirs, ours):
        assert "Nothing in this section was measured here." in text
        assert "FlowCut (arXiv:2505.19536)" in text
        assert "RESTORE, Table 1 (arXiv:2606.01711)" in text
        assert "arXiv id not known" in text
    assert "hollow marks" in theirs
    assert "hollow marks" not in ours
