"""Statistics of a sweep against numbers worked out by hand: tests, retention, areas, fronts, statements, FLOPs."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from eval_helpers import LLAVA_7B, TASKS, answered, pruned_row, rows
from scipy.stats import binomtest

from vtprune.cost import image_flops, image_macs, prefill_flops
from vtprune.errors import InputError
from vtprune.eval.cell import Answers, fill_row
from vtprune.eval.counts import Totals
from vtprune.eval.curves import pareto_front, trapezoid_weights
from vtprune.eval.flops import count_flops, flop_texts, flop_unit
from vtprune.eval.harness import Sample
from vtprune.eval.latex import latex_escape, latex_table
from vtprune.eval.plot import plot_rows
from vtprune.eval.report_html import write_report
from vtprune.eval.rows import FlopCounts, Row, TaskScore, read_rows, write_rows
from vtprune.eval.stats import Interval, McNemar, mcnemar, paired_difference, ratio_interval
from vtprune.eval.summary import Area, Pair, compare_at, summarise
from vtprune.eval.summary_text import pair_sentence, summary_markdown
from vtprune.eval.table import headers, legend, markdown, rich_table, row_cells
from vtprune.plan import Plan, Site, Stage
from vtprune.specs import parse_method

# tests and retention


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (5, 0, 2 / 32),
        # 2 (C(12,0) + C(12,1) + C(12,2)) / 2^12
        (2, 10, 2 * (1 + 12 + 66) / 4096),
        # an even split: the tails overlap in the middle
        (3, 3, 1.0),
        (4, 3, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int, p: float) -> None:
    scores = [1.0] * wins + [0.0] * losses + [1.0, 0.0]
    reference = [0.0] * wins + [1.0] * losses + [1.0, 0.0]
    found = mcnemar(scores, reference)
    assert (found.wins, found.losses) == (wins, losses)
    assert found.p == pytest.approx(p)


@pytest.mark.parametrize(("wins", "losses"), [(310, 402), (1900, 2100), (7, 3000)])
def test_mcnemar_of_many_questions_neither_overflows_nor_drifts(wins: int, losses: int) -> None:
    found = mcnemar([1.0] * wins + [0.0] * losses, [0.0] * wins + [1.0] * losses)
    assert found.p == pytest.approx(binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_graded_scores_are_tested_by_their_sign() -> None:
    assert mcnemar([0.6, 0.3, 1.0], [0.3, 0.6, 0.9]) == McNemar(2, 1, 1.0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        mcnemar([1.0], [1.0, 0.0])


def test_retention_pairs_the_questions() -> None:
    reference = [1.0] * 80 + [0.0] * 20
    scores = [1.0] * 60 + [0.0] * 40
    kept = ratio_interval(scores, reference, range(100))
    assert kept is not None
    assert kept.value == pytest.approx(0.75)
    # of those the unpruned model has right each is kept with probability 3/4
    half = 1.96 * math.sqrt(0.75 * 0.25 / 80)
    assert kept.low == pytest.approx(0.75 - half, abs=0.01)
    assert kept.high == pytest.approx(0.75 + half, abs=0.01)
    same = ratio_interval(reference, reference, range(100))
    assert same == Interval(1.0, 1.0, 1.0)
    assert ratio_interval(scores, [0.0] * 100, range(100)) is None
    # draws without a right answer of the reference are left out, not divided by
    rare = ratio_interval([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], range(3))
    assert rare == Interval(1.0, 1.0, 1.0)


def test_repeating_an_image_does_not_narrow_the_retention() -> None:
    scores, reference = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    once = ratio_interval(scores, reference, range(6), seed=2)
    assert ratio_interval(scores * 4, reference * 4, [*range(6)] * 4, seed=2) == once


# areas and fronts


def test_the_area_is_the_trapezoid_rule() -> None:
    costs, accuracies = [1.0, 0.2, 0.5], np.array([0.9, 0.3, 0.7])
    # 0.3 wide at (0.3 + 0.7) / 2, 0.5 wide at (0.7 + 0.9) / 2
    assert trapezoid_weights(costs, 0.2, 1.0) @ accuracies == pytest.approx((0.3 * 0.5 + 0.5 * 0.8) / 0.8)
    # cut off at 0.35, where the line is at 0.5: 0.15 wide at 0.6
    assert trapezoid_weights(costs, 0.35, 1.0) @ accuracies == pytest.approx((0.15 * 0.6 + 0.5 * 0.8) / 0.65)
    assert trapezoid_weights(costs, 0.25, 0.75).sum() == pytest.approx(1.0)
    # two rows of one cost count as one, at their mean
    twice = trapezoid_weights([1.0, 0.2, 0.2, 0.5], 0.2, 1.0)
    assert twice @ np.array([0.9, 0.2, 0.4, 0.7]) == pytest.approx((0.3 * 0.5 + 0.5 * 0.8) / 0.8)
    for low, high in ((0.1, 1.0), (0.2, 1.1), (0.5, 0.5)):
        with pytest.raises(ValueError, match="costs must span"):
            trapezoid_weights(costs, low, high)


def test_the_front_keeps_ties_and_drops_what_is_beaten_in_one() -> None:
    points = [(1.0, 0.9), (0.5, 0.9), (0.5, 0.9), (0.5, 0.8), (0.2, 0.5), (0.3, 0.5), (0.1, 0.4)]
    on = pareto_front([cost for cost, _ in points], [value for _, value in points])
    assert on.tolist() == [False, True, True, False, True, False, True]
    assert pareto_front([], []).tolist() == []
    with pytest.raises(ValueError, match="got 1 costs and 2 values"):
        pareto_front([1.0], [1.0, 2.0])


def sweep() -> tuple[list[Row], dict[str, Answers]]:
    """100 questions, each on an image of its own, of which the first so many are right.

    `short` cannot reach the small budget, `lone` has one row, and `broken` fails on the second task.
    """
    right = {
        "unpruned 1": (1.0, 80),
        "good 1/2": (0.5, 80),
        "good 1/4": (0.25, 60),
        "bad 1/2": (0.5, 40),
        "bad 1/4": (0.2, 20),
        "short 1/2": (0.6, 78),
        "short 3/4": (0.8, 80),
        "lone 1/2": (0.5, 80),
        "broken 1/2": (0.5, 70),
        "broken 1/4": (0.25, 70),
    }
    found, answers = [], {}
    for text, (share, count) in right.items():
        method, keep = text.split()
        row = dataclasses.replace(pruned_row(method, keep, share, count / 100), flops_share=share)
        mine = {task: answered(task, count) for task in TASKS}
        if method == "broken":
            del mine[TASKS[1]], row.tasks[TASKS[1]]
        found.append(row)
        answers[row.name] = Answers(mine, Totals())
    return found, answers


def test_areas_are_ranked_over_what_methods_share() -> None:
    found, answers = sweep()
    # the budget 3/4 is asked of one method only, so none has all: the range starts where all have a row
    narrow = summarise(found, answers).tasks[TASKS[0]]
    assert narrow.low == 0.6
    found = [row for row in found if row.name != "short 3/4"] + [
        dataclasses.replace(found[6], keep="1/4", status="not possible", tasks={}, message="cannot"),
    ]
    summary = summarise(found, answers)
    task = summary.tasks[TASKS[0]]
    assert (task.low, task.high) == (0.25, 1.0)
    areas = {area.method: area for area in task.areas}
    assert [area.method for area in task.areas] == ["good", "broken", "bad", "short", "lone"]
    # 0.25 wide at 70, 0.5 wide at 80, over 0.75 x 80
    assert areas["good"].area is not None
    assert areas["good"].area.value == pytest.approx((0.25 * 70 + 0.5 * 80) / (0.75 * 80))
    # the line is at 20 + 20 / 6 where the range starts
    assert areas["bad"].area is not None
    start = 20 + 20 * 0.05 / 0.3
    assert areas["bad"].area.value == pytest.approx((0.25 * (start + 40) / 2 + 0.5 * 60) / (0.75 * 80))
    assert areas["good"].behind is None
    assert areas["bad"].behind is not None
    assert areas["bad"].behind.value == pytest.approx(areas["bad"].area.value - areas["good"].area.value)
    assert areas["bad"].behind.high < 0
    assert areas["short"] == Area("short", 1, message="too few points: 1, at least 2 needed")
    assert areas["lone"].message.startswith("too few points: 1")
    assert summary.mean is not None
    assert [area.method for area in summary.mean.areas if area.area is not None] == ["good", "bad"]
    assert {area.message for area in summary.mean.areas if area.area is None} == {"not ranked on every task"}


def test_a_method_that_stays_expensive_does_not_narrow_the_range() -> None:
    found, answers = sweep()
    found = [row for row in found if row.method != "lone"]
    whole = dataclasses.replace(found[1], keep="3/4", flops_share=0.75)
    answers[whole.name] = answers["good 1/2"]
    task = summarise([*found, whole], answers).tasks[TASKS[0]]
    assert task.low == 0.25
    short = next(area for area in task.areas if area.method == "short")
    assert short.message == "its cheapest row costs 60.0 % of the FLOPs, above the range"


def test_the_interval_of_an_area_is_that_of_its_accuracies() -> None:
    found, answers = sweep()
    found = found[:3]
    # nothing between the bounds but one straight line from 1/4 up to 1: weights 1/2 and 1/2
    found[1].flops_share = 1.0
    answers["good 1/2"] = answers["unpruned"]
    (area,) = summarise(found, answers).tasks[TASKS[0]].areas
    kept = ratio_interval([1.0] * 60 + [0.0] * 40, [1.0] * 80 + [0.0] * 20, range(100))
    assert area.area is not None
    assert kept is not None
    assert area.area.value == pytest.approx((1 + kept.value) / 2)
    assert area.area.low == pytest.approx((1 + kept.low) / 2, abs=0.01)
    assert area.area.high == pytest.approx((1 + kept.high) / 2, abs=0.01)


def test_nothing_is_ranked_without_an_unpruned_accuracy() -> None:
    found, answers = sweep()
    answers["unpruned"] = Answers({task: answered(task, 0) for task in TASKS}, Totals())
    task = summarise(found, answers).tasks[TASKS[0]]
    assert task.low is None
    assert all(area.area is None for area in task.areas)
    assert "No method has an area" in summary_markdown(found, summarise(found, answers))


def test_pairs_share_their_questions() -> None:
    found, answers = sweep()
    pairs = compare_at(found, answers, TASKS[0], "1/2", seed=4)
    # five methods, each two of them, the better one first
    assert len(pairs) == 10
    assert [(pair.first, pair.second) for pair in pairs[:2]] == [("good 1/2", "lone 1/2"), ("good 1/2", "short 1/2")]
    expected = paired_difference([1.0] * 80 + [0.0] * 20, [1.0] * 40 + [0.0] * 60, range(100), seed=4)
    found_pair = next(pair for pair in pairs if (pair.first, pair.second) == ("good 1/2", "bad 1/2"))
    assert dataclasses.astuple(found_pair.difference) == pytest.approx(dataclasses.astuple(expected))
    assert compare_at(found, answers, TASKS[0], "3/4") == []
    # a row without the task is not among them
    assert len(compare_at(found, answers, TASKS[1], "1/2")) == 6


def test_rows_with_other_questions_are_not_compared() -> None:
    found, answers = sweep()
    others = [dataclasses.replace(sample, doc_id=sample.doc_id + 1) for sample in answered(TASKS[0], 10)]
    answers["bad 1/2"] = Answers({TASKS[0]: others}, Totals())
    with pytest.raises(InputError, match=r"'bad 1/2' and 'good 1/2' differ"):
        compare_at(found, answers, TASKS[0], "1/2")


def test_noise_is_said_in_plain_words() -> None:
    pair = Pair("flowcut 1/2", "fastv 1/2", Interval(0.007, -0.021, 0.035))
    expected = "flowcut 1/2 and fastv 1/2 cannot be told apart on scenes: +0.7 points [-2.1, +3.5]."
    assert pair_sentence(pair, "vtp_scenes") == expected
    ahead = dataclasses.replace(pair, difference=Interval(0.05, 0.001, 0.1))
    assert (
        pair_sentence(ahead, "vtp_scenes") == "flowcut 1/2 is ahead of fastv 1/2 on scenes: +5.0 points [+0.1, +10.0]."
    )
    found, answers = sweep()
    for row in found:
        if row.name in answers:
            fill_row(row, answers[row.name], answers["unpruned"], 0)
            row.flops_share = {"1": 1.0, "1/2": 0.5, "1/4": 0.25, "3/4": 0.75}[row.keep]
    text = summary_markdown(found, summarise(found, answers))
    assert "- good 1/2 and lone 1/2 cannot be told apart on scenes: +0.0 points [+0.0, +0.0]." in text
    assert "- good 1/2 is ahead of bad 1/2 on scenes." in text
    assert "good 1/2 and the unpruned model cannot be told apart on scenes: +0.0 points [+0.0, +0.0]." in text
    assert "bad 1/2 and the unpruned model" not in text
    # 40 of 80 right answers lost: 2 / 2^40
    assert re.search(r"\| bad \| 1/2 \| 40\.0 \[3., [45].\] \| 50\.0 % \[3.\.., 6.\..\] \| -40\.0\* ", text)
    assert "| 0 | 40 | 1.8e-12 |" in text
    assert re.search(r"cheapest first: broken 1/4, good 1/2, lone 1/2\.", text)


def test_scores_of_a_row_carry_test_and_retention(tmp_path: Path) -> None:
    found, answers = sweep()
    row = found[3]
    fill_row(row, answers[row.name], answers["unpruned"], 0)
    score = row.tasks[TASKS[0]]
    assert score.mcnemar is not None
    assert (score.mcnemar.wins, score.mcnemar.losses) == (0, 40)
    assert score.retention is not None
    assert score.retention.value == score.share == 0.5
    write_rows([row], tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == [row]
    # files of earlier versions
    old = {name: value for name, value in dataclasses.asdict(score).items() if name not in ("mcnemar", "retention")}
    assert TaskScore.from_dict(old) == dataclasses.replace(score, mcnemar=None, retention=None)


# FLOPs


def test_the_conventions_are_those_of_the_papers() -> None:
    tokens = [576] * 32
    assert image_macs(LLAVA_7B, tokens) / 1e12 == pytest.approx(3.82, abs=0.005)
    assert image_flops(LLAVA_7B, tokens) / 1e12 == pytest.approx(7.63, abs=0.005)
    # 2 x MACs with the text: 8.6 to 8.8 T in HiPrune, EvoCut and FlowCut
    assert 8.5 < prefill_flops(LLAVA_7B, [576 + 64] * 32) / 1e12 < 8.85
    high = [576] * 7 + [504] * 2 + [360] * 3 + [72] * 20
    assert image_macs(LLAVA_7B, high) / 1e12 == pytest.approx(1.557178, abs=5e-7)


def counted() -> tuple[list[Row], dict[str, Answers]]:
    """The unpruned model, a schedule and a restart, two questions each, on the shape of LLaVA-1.5-7B."""
    high = tuple([576] * 7 + [504] * 2 + [360] * 3 + [72] * 20)
    found = rows()[:2]
    restart = pruned_row("gemfilter", "1/8", 0.125, 0.8)
    scorer = parse_method("gemfilter")
    restart.plan = Plan((Stage(Site.parse("restart[13]"), scorer, 72),)).to_dict()
    found.append(restart)
    answers = {}
    for row, tokens in zip(found, (None, high, (72,) * 32), strict=True):
        counts = {"visual_tokens": 576} | ({} if tokens is None else {"tokens_per_layer": list(tokens)})
        samples = [dataclasses.replace(sample, counts=counts) for sample in answered(TASKS[0], 1)[:2]]
        totals = Totals(2) if tokens is None else Totals(2, flops=6_000_000_000_000, flops_full=17_600_000_000_000)
        answers[row.name] = Answers({TASKS[0]: samples}, totals, None if tokens is None else LLAVA_7B)
    return found, answers


def test_rows_count_flops_in_three_units(tmp_path: Path) -> None:
    found, answers = counted()
    count_flops(found, answers)
    unit = flop_unit(found)
    assert unit == "T"
    assert flop_texts(found[0], unit) == ["3.817", "7.634", "8.8"]
    assert flop_texts(found[1], unit) == ["1.557", "3.114", "3"]
    # a restart runs its first layers twice, the first time with every token
    first = image_macs(LLAVA_7B, [576] * 13) + image_macs(LLAVA_7B, [72] * 32)
    assert found[2].flop_counts == FlopCounts(first, 2 * first, 3e12)
    write_rows(found, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == found


def test_prompts_of_other_sizes_are_counted_by_their_share() -> None:
    """A plan has the counts of one usual image; questions about smaller ones kept as large a part."""
    found, answers = counted()
    restart = found[2]
    plan = Plan.from_dict(restart.plan or {})
    (before,) = plan.stages
    cut = dataclasses.replace(before, site=Site("vision", 3), keep=288)
    restart.plan = Plan((cut, dataclasses.replace(before, keep=144))).to_dict()
    samples = [Sample("t", 0, "0", "", "", None, "", 1.0, {"visual_tokens": 100, "tokens_per_layer": [25] * 32})]
    answers[restart.name] = dataclasses.replace(answers[restart.name], samples={"t": samples})
    count_flops([restart], answers)
    # half of the 100 leave the tower and are asked
    macs = image_macs(LLAVA_7B, [50] * before.site.index + [25] * 32)
    assert restart.flop_counts is not None
    assert (restart.flop_counts.image_macs, restart.flop_counts.image_flops) == (macs, 2 * macs)


def test_tables_show_the_conventions_on_request() -> None:
    found, answers = counted()
    count_flops(found, answers)
    failed = rows()[-1]
    titles = headers(TASKS, None, "T")
    assert titles[-6:] == ["FLOPs", "image MACs, T", "image FLOPs, T", "prefill FLOPs, T", "KV", "time"]
    assert row_cells(found[1], TASKS, unit="T")[-6:-2] == ["55 %", "1.557", "3.114", "3"]
    assert row_cells(failed, TASKS, unit="T")[-4:] == ["-"] * 4
    text = markdown([*found, failed], conventions=True)
    assert len({line.count("|") for line in text.splitlines()[:6]}) == 1
    assert "| 3.817 | 7.634 | 8.8 |" in text
    assert "4nd²+2n²d+3ndm" in text
    assert "image MACs" not in markdown(found)
    assert rich_table(found, 140, conventions=True).columns[-3].header == "prefill\nFLOPs,\nT"
    # the shape is not known
    alone = rows()[:1]
    count_flops(alone, {"unpruned": answers["unpruned"]})
    assert alone[0].flop_counts is None
    assert flop_texts(alone[0], flop_unit(alone)) == ["-"] * 3


# LaTeX


def test_latex_escapes_what_it_would_read() -> None:
    assert latex_escape("a_b & 50 % {x} #1 $2 ~ ^ \\ n²") == (
        r"a\_b \& 50 \% \{x\} \#1 \$2 \textasciitilde{} \textasciicircum{} \textbackslash{} n$^2$"
    )


def test_the_latex_table_has_the_columns_of_the_others() -> None:
    found = rows()
    found[1].method = "flowcut@1/2+fast_v(layer=1)"
    text = latex_table(found)
    lines = text.splitlines()
    titles = headers(TASKS)
    assert f"\\begin{{tabular}}{{ll{'r' * (len(titles) - 2)}}}" in text
    body = [line for line in lines if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count(" & ") for line in body} == {len(titles) - 1}
    assert len(body) == len(found) + 1
    assert [lines.count(rule) for rule in (r"\toprule", r"\bottomrule", r"\midrule")] == [1, 1, 4]
    assert r"\multicolumn{2}{c}{easy-vqa} & \multicolumn{2}{c}{scenes}" in text
    assert r"\cmidrule(lr){4-5}\cmidrule(lr){6-7}" in text
    assert r"flowcut@1/2+fast\_v(layer=1) & 1/2 & 128.0 & 80.0 {\scriptsize [75, 85]} & 89\,\%$^*$ &" in text
    assert r"random & 1/16 & -- & failed & -- & --" in text
    # nothing is left that LaTeX would read: all percent signs are escaped, but the one that ends a line
    assert re.findall(r"(?<!\\)%(?!\n)", text) == []
    assert re.findall(r"(?<!\\)[_#]", text) == []
    for opening, closing in (("{", "}"), (r"\begin{", r"\end{")):
        assert text.count(opening) == text.count(closing)
    assert latex_escape(legend(found)) in text
    assert "image MACs" in latex_table(found, conventions=True)


def test_a_minus_in_latex_is_a_minus() -> None:
    found = rows()
    score = found[1].tasks[TASKS[0]]
    found[1].tasks[TASKS[0]] = dataclasses.replace(score, retention=Interval(-0.1, -0.2, 0.1))
    assert r"89\,\%$^*$ {\scriptsize [$-$20, 10]}" in latex_table(found)


# the page


def test_the_page_holds_the_summary(tmp_path: Path) -> None:
    found, answers = counted()
    count_flops(found, answers)
    plot_rows(found, tmp_path / "plot.png")
    summary = summarise(found, answers)
    write_report(found, tmp_path / "plot.png", tmp_path / "with.html", (), summary, conventions=True)
    write_report(found, tmp_path / "plot.png", tmp_path / "bare.html")
    page, bare = ((tmp_path / name).read_text(encoding="utf-8") for name in ("with.html", "bare.html"))
    assert "fastv 1/2 and the unpruned model" not in page
    assert "<h3>All tasks</h3>" in page
    assert "too few points: 1" in page
    # counts sort by value and are left out where nobody asked
    assert '<td data-value="7.634">7.634</td>' in page
    assert "image FLOPs" in page
    assert "image FLOPs" not in bare
    assert "Which method is ahead" not in bare
