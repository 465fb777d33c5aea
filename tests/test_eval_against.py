"""Rows beside a reference method at equal FLOPs: which budget it gets, whose run it is, what the table says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import eval_helpers
import models
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import vtprune
from vtprune.cli import app
from vtprune.errors import PlanError
from vtprune.eval.against import InputCut, compare, require_reference
from vtprune.eval.cell import Answers
from vtprune.eval.harness import Sample
from vtprune.eval.keeps import parse_keeps
from vtprune.eval.plot import plot_rows
from vtprune.eval.report_html import write_report
from vtprune.eval.rows import Against, Row, read_rows, write_rows
from vtprune.eval.stats import Interval, paired_difference
from vtprune.eval.table import headers, legend, markdown, rich_table, row_cells

if TYPE_CHECKING:
    from vtprune.eval.counts import Totals
    from vtprune.eval.lmms_model import VtpruneChat


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    yield from eval_helpers.few_images(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_helpers.save_askable(tmp_path_factory.mktemp("askable"))


def totals_of(batches: list[list[tuple[int, int]]], compute: int) -> Totals:
    """Sums of a cell that spent so many FLOPs on prompts of (text, visual) tokens."""
    from vtprune.eval.counts import Totals

    questions = sum(map(len, batches))
    return Totals(questions, flops=compute, flops_full=1_000_000, batches=[tuple(batch) for batch in batches])


# what the reference gets


@pytest.mark.parametrize("keep", [1, 5, 16, 0.2, 0.75])
@torch.no_grad()
def test_the_cost_of_the_reference_is_counted_exactly(keep: float) -> None:
    from vtprune.eval.counts import BatchCost, PrunedTokenCounts, Totals

    # prompts of different lengths, and of one and two images where the budget is a share
    second = models.Row(images=1 if isinstance(keep, int) else 2, after=2, seed=1)
    counts: list[PrunedTokenCounts] = []
    model = models.llava()
    with vtprune.prune(model, "random", keep) as session:
        for rows in ((models.Row(after=9), second), (models.Row(),)):
            model(**models.batch(*rows))
            seen = session.report.visual_tokens
            cost = BatchCost.of(f"batch of {len(rows)}", len(rows), 1.0, session.report)
            counts += PrunedTokenCounts.of_batch([1] * len(rows), [1] * len(rows), seen, session.report, cost)
        totals = Totals.of(count.to_dict() for count in counts)
        assert totals.questions == 3
        assert totals.vision_flops > 0
        assert InputCut(vtprune.Random(), session.geometry, totals).flops(keep) == totals.flops


def test_the_reference_is_never_given_less_and_at_most_a_token_more() -> None:
    shape = vtprune.geometry(models.config())
    batches = [[(10, 16), (12, 16)], [(11, 16)]]
    cut = InputCut(vtprune.Random(), shape, totals_of(batches, 0))
    assert list(cut.keeps) == list(range(1, 17))
    for n in (1, 7, 16):
        assert cut.match(cut.flops(n)) == n
        assert cut.match(cut.flops(n) + 1) == min(n + 1, 16)
    assert cut.match(0) == 1


def test_questions_that_differ_in_visual_tokens_give_up_the_same_share() -> None:
    shape = vtprune.geometry(models.config())
    cut = InputCut(vtprune.Random(), shape, totals_of([[(10, 16), (12, 32)]], 0))
    assert cut.keeps == [n / 32 for n in range(1, 33)]
    same = InputCut(vtprune.Random(), shape, totals_of([[(12, 32), (12, 32)]], 0))
    # the batch is as long as its longest prompt, here the second
    assert cut.flops(0.25) == same.flops(8)
    assert cut.match(cut.flops(0.25)) == 0.25


@pytest.mark.parametrize(("text", "site"), [("fastv", "fastv"), ("flowcut", "flowcut"), ("gemfilter(layer=3)", "gem")])
def test_the_reference_must_cut_before_the_decoder(text: str, site: str) -> None:
    with pytest.raises(PlanError, match=rf"\(cdpruner, divprune, evs, [^)]*vidcom2\) or none, got '{site}"):
        require_reference(text)
    assert require_reference("random(seed=3)") == vtprune.Random(seed=3)


# whose run it is


class Sweep:
    """A made-up sweep: 20 images with one question each; remembers what was asked beyond its rows."""

    def __init__(self) -> None:
        self.shape = vtprune.geometry(models.config())
        self.batches = [[(10, 16)] * 20]
        self.cut = InputCut(vtprune.Random(), self.shape, totals_of(self.batches, 0))
        self.rows: list[Row] = []
        self.answers: dict[str, Answers] = {}
        self.begun: list[int] = []
        self.asked: list[int | float] = []
        self.broken: set[int] = set()

    def answers_of(self, right: int, compute: int) -> Answers:
        """The first `right` questions are answered."""
        samples = [Sample("t", i, str(i), "", "", None, "", float(i < right)) for i in range(20)]
        return Answers({"t": samples}, totals_of(self.batches, compute), self.shape)

    def add(self, method: str, keep: str, right: int, compute: int, **changes: Any) -> Row:
        self.rows.append(Row(method, keep, 0.5, **changes))
        self.answers[self.rows[-1].name] = self.answers_of(right, compute)
        return self.rows[-1]

    def ask(self, row: Row) -> Answers | None:
        self.asked.append(row.keep_value)
        if row.keep_value in self.broken:
            row.message = "Traceback\nRuntimeError: out of memory"
            return None
        return self.answers_of(10, self.cut.flops(row.keep_value))

    def compare(self, reference: str = "random") -> None:
        compare(self.rows, self.answers, reference, 0, self.begun.append, self.ask)


@pytest.fixture
def sweep() -> Sweep:
    sweep = Sweep()
    sweep.add("unpruned", "1", 20, 0)
    # nothing was attached, so nothing was counted
    sweep.answers["unpruned"].totals.flops_full = 0
    return sweep


def test_equal_budgets_share_a_run_and_rows_of_the_sweep_are_reused(sweep: Sweep) -> None:
    cost = sweep.cut.flops
    better = sweep.add("fastv", "1/2", 19, cost(8) + 1)
    worse = sweep.add("uniform", "1/2", 4, cost(9))
    beside = sweep.add("uniform", "1/4", 10, cost(4))
    own = sweep.add("random", "1/4", 12, cost(4))
    seeded = sweep.add("random(seed=1)", "1/4", 12, cost(4))
    gone = sweep.add("fastv", "1/16", 0, 0, status="not possible")
    sweep.compare()
    assert sweep.asked == [9]
    assert sweep.begun == [1]
    assert own.against is gone.against is sweep.rows[0].against is None
    assert better.against is not None
    assert worse.against is not None
    assert (better.against.keep, worse.against.keep) == (9, 9)
    assert better.against.share == (cost(8) + 1) / 1_000_000
    assert better.against.reference_share == worse.against.reference_share == cost(9) / 1_000_000
    expected = paired_difference([1.0] * 19 + [0.0], [1.0] * 10 + [0.0] * 10, range(20))
    assert better.against.differences == {"t": expected}
    assert expected.value == pytest.approx(0.45)
    assert worse.against.differences["t"].value == pytest.approx(-0.3)
    # these beside the row of the sweep, with its 12 right answers
    for row in (beside, seeded):
        assert row.against is not None
        assert row.against.keep == 4
        assert row.against.differences["t"].value == pytest.approx((row is beside) * -0.1)


def test_a_row_that_costs_more_than_the_unpruned_model_is_compared_with_that(sweep: Sweep) -> None:
    row = sweep.add("gemfilter", "7/8", 18, 2 * sweep.cut.flops(16))
    sweep.compare()
    assert sweep.asked == []
    assert row.against is not None
    assert (row.against.keep, row.against.reference_share) == (16, 1.0)
    assert row.against.differences["t"].value == pytest.approx(-0.1)
    row.against = dataclasses.replace(row.against, share=1.25)
    assert "cost no less than the row; all tokens where that is not enough: " in legend([*eval_helpers.rows(), row])


def test_a_reference_that_fails_leaves_the_others_alone(sweep: Sweep) -> None:
    sweep.broken = {9}
    lost = sweep.add("fastv", "1/2", 19, sweep.cut.flops(9))
    ran = sweep.add("fastv", "1/4", 19, sweep.cut.flops(5))
    sweep.compare()
    assert lost.against == Against(
        "random", 9, sweep.cut.flops(9) / 1e6, message="Traceback\nRuntimeError: out of memory"
    )
    assert lost.status == "ok"
    assert ran.against is not None
    assert ran.against.differences["t"].value == pytest.approx(0.45)


def test_nothing_to_compare_asks_nothing(sweep: Sweep) -> None:
    sweep.add("random", "1/4", 12, sweep.cut.flops(4))
    sweep.compare()
    assert (sweep.begun, sweep.asked) == ([], [])


# a whole sweep


class Steps:
    """Progress that counts."""

    def __init__(self) -> None:
        self.phases: dict[str, list[int]] = {}

    def start(self, title: str, steps: int) -> None:
        self.phases[title] = [steps, 0]

    def step(self, title: str, count: int = 1) -> None:
        list(self.phases.values())[-1][1] += count


def test_a_sweep_measures_what_was_predicted(folder: Path) -> None:
    from vtprune.eval.runner import run_sweep
    from vtprune.eval.sweep import Sweep as Settings

    # flowcut saves in the tower, the chain in both, gemfilter runs some layers twice
    methods = ("random", "uniform", "flowcut", "fastv", "flowcut@3/4+fastv(layer=1)", "gemfilter(layer=1)")
    settings = Settings(methods, tuple(parse_keeps("1,1/2,1/4")), eval_helpers.TASKS, str(folder), limit=4, rounds=0)
    steps = Steps()
    result, _, lm = run_sweep(settings, steps)
    rows = {row.name: row for row in result.rows}
    assert not result.failures
    assert lm.session is None
    budgets = set()
    for name, row in rows.items():
        if row.method in ("unpruned", "random") or row.status != "ok":
            assert row.against is None
            continue
        answers, other = result.answers[name], row.against
        assert other is not None
        cut = InputCut(vtprune.Random(), answers.geometry, answers.totals)  # type: ignore[arg-type]
        full = answers.totals.flops_full
        assert other.share == answers.totals.flops / full
        assert other.reference_share == cut.flops(other.keep) / full >= other.share
        assert other.keep == 1 or cut.flops(other.keep - 1) < answers.totals.flops
        assert other.tokens == other.keep
        assert set(other.differences) == set(eval_helpers.TASKS)
        budgets.add(other.keep)
    # what is saved in the tower does not make the reference weaker
    assert rows["flowcut 1/2"].vision_flops_share < 1.0  # type: ignore[operator]
    assert rows["flowcut 1/2"].against.keep == rows["uniform 1/2"].against.keep == 8  # type: ignore[union-attr]
    assert rows["flowcut@3/4+fastv(layer=1) 1/2"].average_tokens == pytest.approx(8, abs=0.5)
    extra = steps.phases["random at equal FLOPs"]
    assert extra == [8 * len(budgets - {4, 8}), 8 * len(budgets - {4, 8})]
    assert extra[0] > 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_command_compares_and_isolates(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    from vtprune.eval.lmms_model import VtpruneChat

    original = VtpruneChat.attach

    def attach(self: VtpruneChat, method: Any, keep: Any = None, **options: Any) -> Any:
        if fails and method == "uniform":
            raise RuntimeError("uniform broke")
        return original(self, method, keep, **options)

    monkeypatch.setattr(VtpruneChat, "attach", attach)
    command = f"eval --model {folder} --methods fastv --keeps 1/2 --limit 3 --fast --against uniform --out {tmp_path}"
    result = CliRunner().invoke(app, command.split())
    _, row = read_rows(tmp_path / "rows.jsonl")
    assert row.status == "ok"
    assert row.against is not None
    assert row.against.method == "uniform"
    assert result.exit_code == fails, result.output
    assert ("FAILED uniform at 8, to compare with: RuntimeError: uniform broke" in result.output) is fails
    assert ("RuntimeError: uniform broke" in row.against.message) is fails
    assert bool(row.against.differences) is not fails
    assert len((tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 2 * 2 * 3


def test_the_comparison_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    command = f"eval --model {folder} --methods fastv --keeps 1/2 --limit 3 --fast --against none --out {tmp_path}"
    result = CliRunner().invoke(app, [*command.split(), "--flops-conventions"])
    assert result.exit_code == 0, result.output
    found = read_rows(tmp_path / "rows.jsonl")
    assert [row.against for row in found] == [None, None]
    assert "random" not in result.output
    # the option shows what the rows hold either way
    assert all(row.flop_counts is not None for row in found)
    assert "(YOPO)" in " ".join(result.output.split())
    for name in ("table.md", "table.tex", "report.html"):
        assert "image MACs, M" in (tmp_path / name).read_text(encoding="utf-8")
    assert "cannot be told apart" in (tmp_path / "summary.md").read_text(encoding="utf-8")


# what the table says


def compared_rows() -> list[Row]:
    """The rows of `eval_helpers`, one of them compared on two tasks, and a chain without a reference."""
    rows = eval_helpers.rows()
    easy, scenes = eval_helpers.TASKS
    differences = {easy: Interval(0.0726, 0.0204, 0.125), scenes: Interval(-0.24, -0.3, -0.18)}
    rows[1].against = Against("random", 131, 0.55, 131.0, 0.5525, differences)
    chain = eval_helpers.pruned_row("flowcut@1/2+transprune(layers=(5,6,8))", "1/4", 0.25, 0.8)
    chain.against = Against("random", 40, 0.3, message="ValueError: <boom>")
    return [*rows, chain]


def test_one_column_a_task_with_a_star_either_way() -> None:
    rows = compared_rows()
    titles = headers(eval_helpers.TASKS, "random")
    unpruned, ran, unreachable, *_, chain = (
        dict(zip(enumerate(titles), row_cells(row, eval_helpers.TASKS, "random"), strict=True)) for row in rows
    )
    assert titles[3:9] == ["easy-vqa %", "of full", "vs random", "scenes %", "of full", "vs random"]
    columns = [(5, "vs random"), (8, "vs random")]
    assert [ran[column] for column in columns] == ["+7.3*", "-24.0*"]
    for row in (unpruned, unreachable, chain):
        assert [row[column] for column in columns] == ["-", "-"]
    rows[1].against = Against("random", 131, 0.55, 131.0, 0.5525, {"vtp_scenes": Interval(0.03, -0.01, 0.07)})
    assert row_cells(rows[1], eval_helpers.TASKS, "random")[5:9:3] == ["-", "+3.0"]
    lines = markdown(rows).splitlines()
    assert len({line.count("|") for line in lines[:8]}) == 1
    assert "vs random" in lines[0]
    assert "vs random" not in markdown(eval_helpers.rows())


def test_the_legend_says_what_the_reference_had() -> None:
    text = legend(compared_rows())
    assert "FLOPs of decoder prefill (what is saved in the tower not counted)" in text
    assert "131 to 131 tokens, 55.2 to 55.2 % of the unpruned FLOPs, at most 0.25 % of them above the row." in text
    assert "all tokens where" not in text


@pytest.mark.parametrize(("width", "shown"), [(120, True), (80, False)])
def test_the_terminal_table_fits(width: int, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=width).print(rich_table(compared_rows(), width))
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    assert ("-24.0*" in output) is shown
    assert ("vs random" in re.sub(r"\s+", " ", output)) is shown
    assert output.count("80.0 [75, 85]") == 4
    # a chain has its members one below the other
    assert re.search(r"^flowcut@\S* +(\S* +)?1/4", output, re.MULTILINE)
    assert "\n+transpr" in output


def test_rows_and_page_hold_the_interval(tmp_path: Path) -> None:
    rows = compared_rows()
    write_rows(rows, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    plot_rows(rows, tmp_path / "plot.png")
    write_report(rows, tmp_path / "plot.png", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'title="beside random with 131 tokens: 55.2 % of the FLOPs (decoder prefill), this row' in page
    # sorted by value
    assert '<td data-value="0.0726">+7.3* [+2.0, +12.5]</td>' in page
    assert '<td data-value="-0.24">-24.0* [-30.0, -18.0]</td>' in page
