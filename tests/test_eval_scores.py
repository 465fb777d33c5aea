"""Scores of single answers, read from what tasks of lmms-eval log: by hand, and against the tasks' own aggregation."""

from __future__ import annotations

from typing import Any

import pytest

from vtprune.errors import InputError
from vtprune.eval.harness import require_lmms_eval
from vtprune.eval.scores import sample_kind, sample_score


@pytest.mark.parametrize(
    ("logged", "score"),
    [
        ({"acc": 0.3}, 0.3),
        ({"acc": True}, 1.0),
        # a number out of range is a figure of another kind; the next metric counts
        ({"acc": 7, "other": 0.5}, 0.5),
        ({"acc": {"question_id": 1, "score": 1.0, "category": "OCR"}}, 1.0),
        ({"acc": {"prediction": "B. a dog", "answer": "B"}}, 1.0),
        ({"acc": {"prediction": "(b)", "answer": "B"}}, 1.0),
        ({"acc": {"prediction": "Blue", "answer": "B"}}, 0.0),
        ({"acc": {"prediction": "A or B", "answer": "B"}}, 0.0),
        ({"acc": {"pred_answer": "Cat ", "answer": "cat"}}, 1.0),
        ({"acc": {"pred": 2, "ground_truth": "2"}}, 1.0),
        ({"acc": {"pred": 2, "ground_truth": "3"}}, 0.0),
    ],
)
def test_a_score_is_read_from_numbers_and_records(logged: dict[str, Any], score: float) -> None:
    assert sample_score("t", ["acc", "other"], logged) == score


@pytest.mark.parametrize("logged", [{}, {"acc": "yes"}, {"acc": {"prediction": "x"}}, {"acc": -1}])
def test_a_task_that_scores_no_sample_is_refused(logged: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="task 't' gives no sample a score"):
        sample_score("t", ["acc"], logged)


@pytest.mark.parametrize(
    ("box", "score"),
    [
        ([0, 0, 10, 10], 1.0),
        ([0, 0, 10, 5], 1.0),  # half of the union
        ([0, 0, 10, 4.9], 0.0),
        ([5, 0, 15, 10], 0.0),  # a third
        ([20, 20, 30, 30], 0.0),
        ([10, 10, 0, 0], 0.0),
        ([0, 0, 10], 0.0),
    ],
)
def test_boxes_count_from_half_an_overlap(box: list[float], score: float) -> None:
    logged = {"iou": {"pred": box, "bbox": [0, 0, 10, 10], "answer": "the dog", "ann_id": 1}}
    assert sample_score("refcoco", ["iou"], logged) == score


def test_boxes_are_scored_as_refcoco_does() -> None:
    require_lmms_eval()
    from lmms_eval.tasks.refcoco.utils_rec import refcoco_bbox_rec_acc05

    for pred in ([0.1, 0.1, 0.6, 0.6], [0.1, 0.1, 0.9, 0.9], [0.3, 0.1, 0.6, 0.6], [0.0, 0.0, 0.0, 0.0]):
        record = {"answer": "x", "pred": pred, "ann_id": 1, "bbox": [0.1, 0.1, 0.6, 0.6]}
        assert sample_score("refcoco", ["iou"], {"iou": record}) == refcoco_bbox_rec_acc05([record])


def test_kinds_come_from_the_document_or_the_record() -> None:
    assert sample_kind(["acc"], {"doc": {"kind": "count"}, "acc": {"category": "OCR"}}) == "count"
    assert sample_kind(["acc"], {"doc": {}, "acc": {"category": "OCR", "score": 1}}) == "OCR"
    assert sample_kind(["acc"], {"acc": {"task_type": "order"}}) == "order"
    assert sample_kind(["acc"], {"acc": 1.0}) is None
