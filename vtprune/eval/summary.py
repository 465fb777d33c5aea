"""What a sweep comes to: areas under the accuracy-FLOPs curves, Pareto fronts, and which differences are noise."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from vtprune.errors import InputError
from vtprune.eval.curves import pareto_front, trapezoid_weights
from vtprune.eval.rows import UNPRUNED_ROW, Row, by_method
from vtprune.eval.stats import Interval, by_image, image_weights, percentile_interval
from vtprune.eval.table import tasks_of

if TYPE_CHECKING:
    from vtprune.eval.cell import Answers

__all__ = ["Area", "Pair", "Summary", "TaskSummary", "compare_at", "front_of", "summarise"]

_FEWEST_POINTS = 2


@dataclass(frozen=True)
class Area:
    """Area under the accuracy-FLOPs curve of one method.

    Attributes:
        method: its name.
        points: pruned rows the curve goes through, beside the unpruned model.
        area: mean accuracy over the range of FLOPs divided by the unpruned accuracy, 95 % interval over images; None
            if the method is not ranked.
        behind: area minus that of the best method, paired; None for the best and where nothing is ranked.
        message: why the method is not ranked.
    """

    method: str
    points: int
    area: Interval | None = None
    behind: Interval | None = None
    message: str = ""


@dataclass(frozen=True)
class Pair:
    """Two rows on the same questions of a task: accuracy of the first minus that of the second."""

    first: str
    second: str
    difference: Interval


@dataclass(frozen=True)
class TaskSummary:
    """One task, or the mean over all tasks (`areas` only).

    Attributes:
        low, high: the range of FLOPs shares that the areas are taken over; `low` is None if no method is ranked.
        areas: best first, then methods that are not ranked.
        front: names of the rows on the Pareto front, cheapest first.
        leaders: by budget as written, the best row beside each other row at that budget.
    """

    low: float | None
    high: float
    areas: tuple[Area, ...]
    front: tuple[str, ...] = ()
    leaders: dict[str, tuple[Pair, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """By task, and the mean of the tasks' areas (None where there is one task)."""

    tasks: dict[str, TaskSummary]
    mean: TaskSummary | None = None


@dataclass(frozen=True)
class _Scores:
    """Scores of several rows on the same questions.

    Attributes:
        sums: [images, rows] points by image.
        counts: [images] questions by image.
        names: of the rows, in order.
    """

    sums: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]

    def accuracies(self) -> np.ndarray:
        """[rows]"""
        return self.sums.sum(axis=0) / self.counts.sum()

    def draws(self, seed: int | Sequence[int]) -> np.ndarray:
        """[RESAMPLES, rows] accuracies, the same images drawn for all rows."""
        weights = image_weights(len(self.counts), seed)
        return (weights @ self.sums) / (weights @ self.counts)[:, None]


def _scores(answers: Mapping[str, Answers], task: str, names: Sequence[str]) -> _Scores:
    """Of the rows that answered the task.

    Raises:
        InputError: if two rows were not asked the same questions.
    """
    asked = {name: answers[name].samples[task] for name in names}
    first = next(iter(asked.values()))
    for name, samples in asked.items():
        if [s.doc_id for s in samples] != [s.doc_id for s in first]:
            raise InputError(
                f"rows must answer the same questions of {task!r} in one order to be compared, but {name!r} and "
                f"{names[0]!r} differ. Run them in one sweep."
            )
    images = [sample.image_id for sample in first]
    grouped = [by_image([sample.score for sample in samples], images) for samples in asked.values()]
    return _Scores(np.stack([sums for sums, _ in grouped], axis=1), grouped[0][1], tuple(names))


def _ran(rows: Sequence[Row], answers: Mapping[str, Answers], task: str) -> list[Row]:
    """Pruned rows with figures for a task."""
    return [row for row in _points(rows, task) if row.name in answers and task in answers[row.name].samples]


def _points(rows: Sequence[Row], task: str) -> list[Row]:
    """Pruned rows with an accuracy and a cost."""
    known = (row for row in rows if row.status == "ok" and row.method != UNPRUNED_ROW)
    return [row for row in known if task in row.tasks and row.flops_share is not None]


def front_of(rows: Sequence[Row], task: str) -> tuple[str, ...]:
    """Names of the rows, the unpruned one included, that no other beats in accuracy and FLOPs; cheapest first."""
    full = [row for row in rows if row.method == UNPRUNED_ROW and task in row.tasks]
    found = [((1.0, row) if row in full else (row.flops_share or 0.0, row)) for row in [*full, *_points(rows, task)]]
    on = pareto_front([cost for cost, _ in found], [row.tasks[task].accuracy.value for _, row in found])
    chosen = [entry for entry, kept in zip(found, on, strict=True) if kept]
    return tuple(row.name for _, row in sorted(chosen, key=lambda entry: entry[0]))


def compare_at(rows: Sequence[Row], answers: Mapping[str, Answers], task: str, keep: str, seed: int = 0) -> list[Pair]:
    """Every two methods at one budget, paired over the same questions; the better one first, best pairs first.

    Args:
        rows: of a sweep.
        answers: by row name.
        task: which questions.
        keep: a budget as written in the sweep.
        seed: of the bootstrap over images.

    Raises:
        InputError: if two rows were not asked the same questions.
    """
    chosen = [row.name for row in _ran(rows, answers, task) if row.keep == keep]
    if len(chosen) < 2:
        return []
    scores = _scores(answers, task, chosen)
    values, draws = scores.accuracies(), scores.draws(seed)
    # a stable sort: of equal rows the one that was named first leads
    order = np.argsort(-values, kind="stable")
    return [
        Pair(chosen[a], chosen[b], percentile_interval(float(values[a] - values[b]), draws[:, a] - draws[:, b]))
        for a, b in itertools.combinations(order, 2)
    ]


def summarise(rows: Sequence[Row], answers: Mapping[str, Answers], seed: int = 0) -> Summary:
    """Areas, fronts and comparisons of a sweep.

    Args:
        rows: of one sweep; a row may lack a task.
        answers: by row name; a row without answers has no area and no comparison.
        seed: of the bootstrap over images.

    Raises:
        InputError: if two rows were not asked the same questions.
    """
    tasks: dict[str, TaskSummary] = {}
    drawn: list[dict[str, np.ndarray]] = []
    for index, task in enumerate(tasks_of(rows)):
        low, areas, draws = _areas(rows, answers, task, (seed, index))
        drawn.append(draws)
        budgets = dict.fromkeys(row.keep for row in _points(rows, task) if row.keep_value is not None)
        leaders = {keep: compare_at(rows, answers, task, keep, seed) for keep in budgets}
        kept = {keep: tuple(p for p in pairs if p.first == pairs[0].first) for keep, pairs in leaders.items() if pairs}
        tasks[task] = TaskSummary(low, 1.0, areas, front_of(rows, task), kept)
    return Summary(tasks, _mean(tasks, drawn) if len(tasks) > 1 else None)


def _areas(
    rows: Sequence[Row], answers: Mapping[str, Answers], task: str, seed: tuple[int, int]
) -> tuple[float | None, tuple[Area, ...], dict[str, np.ndarray]]:
    """(lower bound, areas, draws of each ranked method's area) of one task.

    The range ends at the unpruned model (1) and starts where every method with a row at each budget of the sweep has
    one: a method whose schedule cannot reach the small budgets does not narrow it for the others, and is left out.
    """
    methods = by_method(_ran(rows, answers, task))
    budgets = {row.keep for row in rows if row.method != UNPRUNED_ROW and row.keep_value is not None}
    cheapest = {name: min(row.flops_share or 0.0 for row in cells) for name, cells in methods.items()}
    enough = [name for name, cells in methods.items() if len(cells) >= _FEWEST_POINTS]
    whole = [name for name in enough if budgets <= {row.keep for row in methods[name]}]
    low = max((cheapest[name] for name in whole or enough), default=1.0)
    full = answers.get(UNPRUNED_ROW)
    usable = full is not None and task in full.samples and low < 1 and any(s.score for s in full.samples[task])
    values: dict[str, float] = {}
    draws: dict[str, np.ndarray] = {}
    for name in (name for name in enough if usable and cheapest[name] <= low):
        scores = _scores(answers, task, [UNPRUNED_ROW, *(row.name for row in methods[name])])
        weights = trapezoid_weights([1.0, *(row.flops_share or 0.0 for row in methods[name])], low, 1.0)
        accuracies, drawn = scores.accuracies(), scores.draws(seed)
        values[name] = float(accuracies @ weights / accuracies[0])
        # a draw of images on which the unpruned model has no point says nothing: nan, left out of the percentiles
        draws[name] = (drawn @ weights) / np.where(drawn[:, 0] > 0, drawn[:, 0], np.nan)
    counts = {name: len(cells) for name, cells in methods.items()}
    reasons = {name: _why_not(counts[name], cheapest[name], low) for name in methods}
    return (low if values else None), _ranked(values, draws, counts, reasons), draws


def _why_not(points: int, cheapest: float, low: float) -> str:
    if points < _FEWEST_POINTS:
        return f"too few points: {points}, at least {_FEWEST_POINTS} needed"
    if cheapest > low:
        return f"its cheapest row costs {100 * cheapest:.1f} % of the FLOPs, above the range"
    return "the unpruned model has no accuracy here, or no row costs less"


def _ranked(
    values: Mapping[str, float], draws: Mapping[str, np.ndarray], counts: Mapping[str, int], reasons: Mapping[str, str]
) -> tuple[Area, ...]:
    """Best first; methods without a value last, with their reason."""
    order = sorted(values, key=lambda name: -values[name])
    areas = []
    for name in order:
        behind = None
        if name != order[0]:
            behind = _interval(values[name] - values[order[0]], draws[name] - draws[order[0]])
        areas.append(Area(name, counts[name], _interval(values[name], draws[name]), behind))
    areas += [Area(name, counts[name], message=reasons[name]) for name in reasons if name not in values]
    return tuple(areas)


def _interval(value: float, draws: np.ndarray) -> Interval:
    return percentile_interval(value, draws[~np.isnan(draws)])


def _mean(tasks: Mapping[str, TaskSummary], drawn: Sequence[Mapping[str, np.ndarray]]) -> TaskSummary:
    """Areas averaged over tasks, each task with equal weight; a method must be ranked on all of them."""
    found = [{area.method: area for area in task.areas} for task in tasks.values()]
    names = dict.fromkeys(name for areas in found for name in areas)
    ranked = [name for name in names if all(name in draws for draws in drawn)]
    values = {
        name: sum(area.area.value for areas in found if (area := areas[name]).area is not None) / len(found)
        for name in ranked
    }
    draws = {name: np.mean([each[name] for each in drawn], axis=0) for name in ranked}
    counts = {name: sum(areas[name].points for areas in found if name in areas) for name in names}
    reasons = dict.fromkeys(names, "not ranked on every task")
    lows = [task.low for task in tasks.values() if task.low is not None]
    return TaskSummary(max(lows, default=None), 1.0, _ranked(values, draws, counts, reasons))
