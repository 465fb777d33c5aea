"""What a single answer is worth, read from what a task of lmms-eval logs about it.

Some tasks log a number, others a record that only their aggregation understands. Paired statistics need a score of
every answer, so records are read here, as the task's own aggregation reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vtprune.errors import InputError

__all__ = ["sample_kind", "sample_score"]

_SAID = ("pred_answer", "parsed_pred", "pred", "prediction")
_TRUE = ("ground_truth", "answer", "gt")
_KINDS = ("category", "sub_category", "task_type", "question_type")
_HIT = 0.5  # overlap from which a box counts as found, as in RefCOCO's ACC@0.5


def sample_score(task: str, metrics: Sequence[str], logged: Mapping[str, Any]) -> float:
    """The score in [0, 1] of one answer: of the first metric that tells one.

    Args:
        task: for the message.
        metrics: names of the task's metrics, in order.
        logged: lmms-eval's line about the answer.

    Raises:
        InputError: if no metric does.
    """
    for name in metrics:
        value = logged.get(name)
        score = _of_record(value) if isinstance(value, Mapping) else value
        if isinstance(score, (bool, int, float)) and 0 <= score <= 1:
            return float(score)
    raise InputError(
        f"task {task!r} gives no sample a score in [0, 1]; run it with `python -m lmms_eval --model vtprune` instead."
    )


def sample_kind(metrics: Sequence[str], logged: Mapping[str, Any]) -> str | None:
    """The kind of question: the document's `kind`, or the category in a metric's record; None if neither is there."""
    kind = (logged.get("doc") or {}).get("kind")
    if kind is not None:
        return str(kind)
    for record in (logged.get(name) for name in metrics):
        if isinstance(record, Mapping):
            found = next((record[name] for name in _KINDS if isinstance(record.get(name), str)), None)
            if found is not None:
                return found
    return None


def _of_record(record: Mapping[str, Any]) -> Any:
    if "score" in record:
        return record["score"]
    said = next((record[name] for name in _SAID if name in record), None)
    if "bbox" in record and isinstance(said, Sequence) and not isinstance(said, str):
        return float(_overlap(said, record["bbox"]) >= _HIT)
    true = next((record[name] for name in _TRUE if name in record), None)
    return None if said is None or true is None else float(_same(said, true))


def _same(said: Any, true: Any) -> bool:
    """Equal but for case; where the truth is the letter of an option, the option that the answer begins with."""
    said, true = str(said).strip().lower(), str(true).strip().lower()
    if re.fullmatch("[a-z]", true):
        first = re.match(r"\W*([a-z])\b", said)
        return first is not None and first[1] == true
    return said == true


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    if len(one) != 4:
        return 0.0
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, wide) * max(0.0, high)
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0
