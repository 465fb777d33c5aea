"""The page that ranks methods and says where each fails: its figures are the committed data, and that adds up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from vtprune.contract import METHODS
from vtprune.eval.harness import Sample
from vtprune.eval.rows import Against, Row
from vtprune.tiny.scenes import scene_objects, scene_questions
from vtprune.tiny.vocabulary import COLORS, KINDS

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("where_methods_fail", ROOT / "benchmarks" / "where_methods_fail.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load()


def sample(task: str, doc: int, kind: str, score: float) -> Sample:
    return Sample(task, doc, f"image{doc // 2}", f"question {doc}", "yes", kind, "yes", score)


def sweep(mine: list[float], other: list[float]):
    """One model, one task of four questions on two images: all right unpruned."""
    kinds = ["color", "color", "count", "count"]
    cells = {
        ("unpruned", 1.0, "t"): [1.0] * 4,
        ("some", 0.25, "t"): mine,
        ("random", 3, "t"): other,
    }
    rows = [Row("unpruned", "1", 1.0), Row("some", "1/2", 0.5, status="not possible"), Row("some", "1/4", 0.25)]
    rows[0].tasks = {"t": None}  # type: ignore[dict-item]
    rows[2].tasks = rows[0].tasks
    rows[2].flops_share, rows[2].against = 0.3, Against("random", 3, 0.3)
    asked = {
        name: [sample("t", doc, kind, score) for doc, (kind, score) in enumerate(zip(kinds, scores, strict=True))]
        for name, scores in cells.items()
    }
    return script.Sweep(rows, asked)


def test_losses_by_group_over_two_models() -> None:
    two = [sweep([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]), sweep([1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0])]
    (line,) = script.lines(two, lambda asked: asked.kind)
    assert (line.method, line.keep, line.flops) == ("some", "1/4", 0.3)
    found = {name: (loss.accuracy, loss.lost.value, loss.beyond.value) for name, loss in line.groups.items()}
    # by hand: of color 4 of 4 right, of count 1 of 4; random has 3 of 4 and 3 of 4
    assert found == {"all": (0.625, -0.375, -0.125), "color": (1.0, 0.0, 0.25), "count": (0.25, -0.75, -0.5)}
    # the questions of one image stand and fall together: one image all right, the other one of four
    assert (line.groups["count"].lost.low, line.groups["count"].lost.high) == (-0.75, -0.75)
    assert (line.groups["all"].lost.low, line.groups["all"].lost.high) == (-0.75, 0.0)


def test_a_method_that_answers_one_task_of_two_has_no_sum() -> None:
    one = sweep([1.0, 0.0, 1.0, 1.0], [1.0] * 4)
    one.rows[0].tasks = {"t": None, "other": None}  # type: ignore[dict-item]
    one.rows[2].tasks = {"t": None}  # type: ignore[dict-item]
    one.samples["unpruned", 1.0, "other"] = one.samples["unpruned", 1.0, "t"]
    (line,) = script.lines([one], lambda asked: asked.kind)
    assert {name: loss.accuracy for name, loss in line.groups.items()} == {"color": 0.5, "count": 1.0}


def test_a_budget_must_be_reached_on_every_model() -> None:
    two = [sweep([1.0] * 4, [1.0] * 4), sweep([0.0] * 4, [1.0] * 4)]
    for each in two:
        each.rows[1].status, each.rows[1].flops_share, each.rows[1].tasks = "ok", 0.6, each.rows[0].tasks
        each.samples["some", 0.5, "t"] = each.samples["unpruned", 1.0, "t"]
    two[1].rows[2].status = "not possible"
    (line,) = script.lines(two, lambda asked: asked.kind)
    assert (line.keep, line.flops, line.groups["all"].accuracy) == ("1/2", 0.6, 1.0)


def test_a_reference_may_be_a_row_of_the_sweep() -> None:
    one = sweep([1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0])
    some = one.rows[2]
    some.against = Against("random", 2, 0.3, reference_share=0.31)
    with pytest.raises(ValueError, match="nobody answered t as random at 2, beside some 1/4"):
        one.beside(some, "t")
    one.rows.append(Row("random", "1/4", 0.25, flops_share=0.31))
    one.samples["random", 0.25, "t"] = one.samples["random", 3, "t"]
    assert one.beside(some, "t") == one.samples["random", 3, "t"]
    # as many FLOPs as all tokens cost
    one.rows[0].flops_share, some.against = 1.0, Against("random", 9, 1.0, reference_share=1.0)
    assert one.beside(some, "t") == one.samples["unpruned", 1.0, "t"]
    assert one.beside(one.rows[-1], "t") is None


def test_rows_of_other_questions_are_not_compared() -> None:
    one = sweep([1.0] * 4, [1.0] * 4)
    one.samples["some", 0.25, "t"].reverse()
    with pytest.raises(ValueError, match="other questions of t"):
        script.lines([one], lambda asked: asked.kind)


def test_tables_mark_what_is_beyond_noise() -> None:
    def loss(value: float, low: float, high: float, behind: float | None) -> dict:
        beyond = None if behind is None else {"value": behind, "low": behind - 0.05, "high": behind + 0.05}
        return {"accuracy": 0.5, "lost": {"value": value, "low": low, "high": high}, "beyond": beyond}

    groups = {"all": loss(-0.2, -0.3, -0.1, 0.1), "a": loss(-0.4, -0.5, -0.3, -0.1), "b": loss(-0.04, -0.1, 0.02, 0.0)}
    found = [{"method": "some", "keep": "1/4", "flops": 0.25, "groups": groups}]
    assert script.loss_table(found, ["all", "a", "b"]).splitlines()[2] == (
        "| some | 1/4 | 25 % | -20* | -40* (-) | -4 |"
    )
    assert script.weak_points(found) == (
        "* `some` at 1/4 loses most on a (-40 points [-50, -30]); behind `random` at the same FLOPs: a."
    )


def test_the_size_is_that_of_the_object_asked_for() -> None:
    samples, answers = [], {}
    for _, asked in scene_questions("test", 12, 1, 4):
        for question in asked:
            samples.append(Sample("t", 0, question.image_id, question.question, "", question.kind, "", 1.0))
            answers[question.image_id, question.question] = question
    sizes = script.sizes_of_scenes(samples)
    checked = 0
    for (image, text), size in sizes.items():
        question, index = answers[image, text], int(image.rsplit("-", 1)[1])
        assert question.kind not in ("exist", "count", "relation")
        if question.kind != "color":
            continue
        # found again without the generator's own notes: the only thing of its kind, in the colour of the answer
        (item,) = [
            item
            for item in scene_objects("test", 1, index)
            if item.askable and text == f"what color is the {'frame of the digit ' * item.is_digit}{KINDS[item.kind]}?"
        ]
        assert COLORS[item.color] == question.answer
        assert size == (f"digit in a frame, {item.size} px" if item.is_digit else f"{item.size} px")
        checked += 1
    assert checked >= 5
    assert len(set(sizes.values())) >= 4


def test_the_page_shows_the_data() -> None:
    data = json.loads(script.DATA.read_text(encoding="utf-8"))
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.fill(page, script.sections(data)) == page
    for name in ("kinds", "sizes", "abilities"):
        assert {line["method"] for line in data[name]} <= set(METHODS)
    with pytest.raises(ValueError, match="'kinds' 0 times"):
        script.fill("a page without marks", {"kinds": ""})
