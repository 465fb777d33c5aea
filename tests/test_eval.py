"""Parts of the evaluation that need no model: budgets, statistics, questions, table, plot, page."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import eval_helpers
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.errors import BudgetError, InputError, VtpruneError
from vtprune.eval import BUNDLED_TASKS, TASKS_DIR, task_data
from vtprune.eval.keeps import parse_keeps
from vtprune.eval.plot import draw_task, plot_rows
from vtprune.eval.report_html import write_report
from vtprune.eval.rows import Row, read_rows, write_rows
from vtprune.eval.stats import mean_interval, paired_difference
from vtprune.eval.table import markdown, rich_table, row_cells

# budgets


def test_keeps_are_read_as_shares_and_tokens() -> None:
    read = [(keep.text, keep.value, type(keep.value)) for keep in parse_keeps("1, 1/2,25%,64,1t,64t")]
    # 64t is the same budget as 64, so it appears once
    assert read == [("1", 1.0, float), ("1/2", 0.5, float), ("25%", 0.25, float), ("64", 64, int), ("1t", 1, int)]
    assert [str(keep) for keep in parse_keeps("1,1/4,1t")] == [
        "1 = all visual tokens (the unpruned model)",
        "1/4 = 0.25 of the visual tokens",
        "1t = 1 visual token",
    ]


@pytest.mark.parametrize(("text", "match"), [("", "got ''"), ("1/2,x", "'x'"), ("0.5t", "'0.5t'"), ("2/1", "2/1")])
def test_bad_keeps_name_the_value(text: str, match: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(match)):
        parse_keeps(text)


# statistics


def test_interval_agrees_with_the_normal_approximation() -> None:
    scores = [1.0] * 120 + [0.0] * 280
    interval = mean_interval(scores, range(400))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert interval.value == pytest.approx(0.3)
    assert interval.low == pytest.approx(0.3 - half, abs=0.01)
    assert interval.high == pytest.approx(0.3 + half, abs=0.01)


def test_repeating_the_questions_of_an_image_does_not_narrow_the_interval() -> None:
    scores = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    once = mean_interval(scores, range(8), seed=3)
    assert mean_interval(scores * 5, [*range(8)] * 5, seed=3) == once
    # as if they were independent, five times the questions would narrow it
    independent = mean_interval(scores * 5, range(40), seed=3)
    assert independent.high - independent.low < 0.7 * (once.high - once.low)


def test_a_clean_sheet_gets_the_exact_binomial_bound() -> None:
    right = mean_interval([1.0] * 40, range(40))
    assert (right.value, right.high) == (1.0, 1.0)
    assert right.low == pytest.approx(0.025 ** (1 / 40))
    wrong = mean_interval([0.0] * 40, range(40))
    assert (wrong.value, wrong.low) == (0.0, 0.0)
    assert wrong.high == pytest.approx(1 - 0.025 ** (1 / 40))


def test_pairing_removes_the_difficulty_of_the_questions() -> None:
    reference = [1.0, 0.0] * 50
    same = paired_difference(reference, reference, range(100))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    worse = [0.0, 0.0] * 5 + reference[10:]
    lost = paired_difference(worse, reference, range(100))
    assert lost.value == pytest.approx(-0.05)
    assert lost.low < -0.05 < lost.high <= 0.0


def test_statistics_refuse_what_does_not_pair() -> None:
    with pytest.raises(ValueError, match="got 0 and 0"):
        mean_interval([], [])
    with pytest.raises(ValueError, match="got 2 and 3"):
        paired_difference([1.0, 0.0], [1.0, 0.0, 1.0], range(2))


# questions


@pytest.mark.parametrize("make", [task_data.scenes_docs, task_data.easy_vqa_docs])
def test_questions_are_fixed_and_spread_over_images(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_data, "IMAGES", 6)
    first, again = make(None), make(None)
    columns = ("question_id", "image_id", "question", "answer", "kind")
    assert [first[name] for name in columns] == [again[name] for name in columns]
    assert [image.tobytes() for image in first["image"]] == [image.tobytes() for image in again["image"]]
    # any prefix touches as many images as it can
    assert len(set(first["image_id"][:6])) == 6
    assert len(first) > 6
    assert len(set(first["question_id"])) == len(first)
    with task_data.question_seed(5):
        other = make(None)
    assert other["image_id"] != first["image_id"]
    with task_data.question_seed(0, "dev"):
        dev = make(None)
    assert len(dev) > 6
    assert not set(dev["image_id"]) & set(first["image_id"])
    assert not {image.tobytes() for image in dev["image"]} & {image.tobytes() for image in first["image"]}


@pytest.mark.parametrize(
    ("said", "score"), [("Red star.", 1.0), (" red  STAR ", 1.0), ("red", 0.0), ("red star red star", 0.0), ("", 0.0)]
)
def test_the_whole_answer_must_match(said: str, score: float) -> None:
    doc = {"answer": "red star", "kind": "obj_loc"}
    assert task_data.process_results(doc, [said])["acc"] == score


def test_mean_over_kinds_weighs_kinds_alike() -> None:
    items = [{"kind": "a", "score": 1.0}] * 3 + [{"kind": "b", "score": 0.0}]
    assert task_data.mean_over_kinds(items) == 0.5


def test_every_bundled_task_is_a_yaml_that_lmms_eval_can_include() -> None:
    assert {path.parent.name for path in TASKS_DIR.glob("*/*.yaml")} == set(BUNDLED_TASKS)
    output = CliRunner().invoke(app, ["eval", "--tasks-dir"])
    assert output.exit_code == 0
    assert Path(output.stdout.strip()) == TASKS_DIR


# rows, table, plot, page


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = eval_helpers.rows()
    write_rows(rows, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    with pytest.raises(InputError, match="colour"):
        Row.from_dict({**rows[0].to_dict(), "colour": 1})


def test_table_shows_every_cell() -> None:
    unpruned, ran, unreachable, *_, failed = (row_cells(row, eval_helpers.TASKS) for row in eval_helpers.rows())
    assert unpruned[:5] == ["unpruned", "all", "256.0", "90.0 [85, 95]", "100 %"]
    # starred: a loss of 10 points with a paired interval from 15 to 5
    assert ran == ["fastv", "1/2", "128.0", *["80.0 [75, 85]", "89 %*"] * 2, "55 %", "56 %", "0.65"]
    assert unreachable[:4] == ["fastv", "1/16", "floor 22.2", "not possible"]
    assert failed[:4] == ["random", "1/16", "-", "failed"]
    lines = markdown(eval_helpers.rows()).splitlines()
    assert len({line.count("|") for line in lines[:7]}) == 1
    assert rich_table(eval_helpers.rows()).row_count == 5


def test_many_methods_look_different() -> None:
    from matplotlib.figure import Figure

    base = eval_helpers.rows()
    pruned = next(row for row in base if row.status == "ok" and row.method != base[0].method)
    rows = [base[0], *(dataclasses.replace(pruned, method=f"method {n}") for n in range(20))]
    axes = Figure().subplots()
    draw_task(axes, rows, "vtp_scenes")
    lines = [line for line in axes.get_lines() if str(line.get_label()).startswith("method")]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == 20


def test_plot_draws_one_line_a_method_and_the_unpruned_model_dashed(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_task(axes, eval_helpers.rows(), "vtp_scenes")
    lines = {line.get_label(): line for line in axes.lines}
    assert {"unpruned", "fastv", "random"} <= set(lines)
    assert lines["unpruned"].get_linestyle() == "--"
    assert set(np.ravel(lines["unpruned"].get_ydata())) == {90.0}
    # only the cell that ran
    assert list(np.ravel(lines["fastv"].get_xdata())) == pytest.approx([0.55])
    assert list(np.ravel(lines["fastv"].get_ydata())) == pytest.approx([80.0])
    plot_rows(eval_helpers.rows(), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert min(image.size) > 400


def test_page_is_escaped(tmp_path: Path) -> None:
    plot_rows(eval_helpers.rows(), tmp_path / "plot.png")
    write_report(eval_helpers.rows(), tmp_path / "plot.png", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ValueError: &lt;boom&gt;" in page
    assert "<boom>" not in page
    assert "--out &lt;b&gt;" in page
    # 1/16 must sort below 1/2: by value, not by text
    assert 'data-value="0.0625">1/16<' in page
    assert page.count('<tr class="missing"') == 2


# doors


def test_entry_point_target_is_light() -> None:
    code = "import sys, vtprune.eval.lmms_manifest; sys.exit('torch' in sys.modules or 'lmms_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_lmms_eval_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.eval.harness import require_lmms_eval

    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(VtpruneError, match=re.escape("pip install 'vtprune[eval]'")):
        require_lmms_eval()
