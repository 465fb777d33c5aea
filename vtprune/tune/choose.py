"""From finished trials to one plan, the front of what was tried, and the comparison on questions nobody has seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtprune.contract import Scorer
from vtprune.errors import VtpruneError
from vtprune.eval.stats import Interval
from vtprune.plan import Plan
from vtprune.tune.budgets import Costs, behind, solve_chain
from vtprune.tune.goal import Goal
from vtprune.tune.questions import Answered, Portion, Questions, join
from vtprune.tune.search import Found

__all__ = ["Chosen", "Compared", "Point", "choose", "compare", "finalists", "front_points", "mark_front"]

_FINALISTS = 5
_BRANCHES, _FRACTIONS = 3, (1 / 2, 1 / 4)


@dataclass(frozen=True)
class Chosen:
    """The tuned plan.

    Attributes:
        found: its trial.
        validation: its answers to the validation questions.
        value: see `Goal.value`, on these.
    """

    found: Found
    validation: Answered
    value: float


def finalists(trials: Sequence[Found]) -> list[Found]:
    """The best different plans that were asked everything, and with them the best single method as it comes.

    Raises:
        VtpruneError: if no trial was asked everything.
    """
    asked = [trial for trial in trials if trial.value is not None]
    if not asked:
        reasons = sorted({trial.note for trial in trials if trial.note})
        raise VtpruneError(f"no candidate could be asked; {'; '.join(reasons[:3]) or 'there was no trial'}.")
    # equal values go to the earlier trial: singles first
    ranked = sorted(asked, key=lambda trial: (-(trial.value or 0.0), trial.number))
    different: list[Found] = []
    for trial in ranked:
        if all(trial.plan != other.plan for other in different):
            different.append(trial)
    best = different[:_FINALISTS]
    return best + [trial for trial in different if trial.single and trial not in best][:1]


def choose(
    found: Sequence[Found], questions: Questions, goal: Goal, portion: Portion, tell: Callable[[str], object]
) -> list[Chosen]:
    """The finalists with their answers to the validation questions, the best first; ties go to the better trial."""
    unpruned = questions.ask(None, portion)
    judged = []
    for trial in finalists(found):
        answers = questions.ask(_plan(trial), portion)
        # what it costs was settled on the tuning questions; only what it answers is new
        value = goal.value(answers.accuracy, unpruned.accuracy, trial.share or 1.0, trial.ratio)
        judged.append(Chosen(trial, answers, value))
        tell(trial.text)
    return sorted(judged, key=lambda chosen: -chosen.value)


@dataclass(frozen=True)
class Point:
    """A plan in the picture of accuracy against FLOPs, on the tuning questions.

    Attributes:
        role: "trial", "single" (a method as it comes), "branch" (a good plan with a smaller budget) or "tuned".
        on_front: nothing that was tried is as cheap and better, or as good and cheaper.
    """

    text: str
    role: str
    share: float
    accuracy: float
    plan: Plan
    on_front: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}


def front_points(
    found: Sequence[Found],
    tuned: Found,
    ask: Callable[[Plan], Answered],
    costs: Costs,
    branches: int,
    tell: Callable[[str], object],
) -> list[Point]:
    """Every plan that was asked everything, and smaller budgets of the best ones if the search had one budget only."""
    points = []
    for trial in found:
        if trial.value is not None and trial.share is not None and trial.accuracy is not None:
            role = "tuned" if trial.number == tuned.number else "single" if trial.single else "trial"
            points.append(Point(trial.text, role, trial.share, trial.accuracy, _plan(trial)))
    for trial in finalists(found)[:branches]:
        for fraction in _FRACTIONS:
            record: Mapping[str, Any] = trial.candidate
            methods = [Scorer.from_dict(method) for method in record["methods"]]
            try:
                plan = solve_chain(costs, methods, record["split"], record["share"] * fraction)
                answers = ask(plan)
            except VtpruneError:
                continue  # out of this method's reach
            finally:
                tell(trial.text)
            points.append(Point(trial.text, "branch", answers.share, answers.accuracy, plan))
    return mark_front(points)


def mark_front(points: Sequence[Point]) -> list[Point]:
    """The points in order of cost, with those on the front marked; of equal ones the first given."""
    best, marked = float("-inf"), []
    for point in sorted(points, key=lambda p: (p.share, -p.accuracy)):
        marked.append(dataclasses.replace(point, on_front=point.accuracy > best))
        best = max(best, point.accuracy)
    return marked


@dataclass(frozen=True)
class Compared:
    """A single method beside the tuned plan on held-out questions.

    Attributes:
        method: its name.
        share: what it spent of the unpruned FLOPs there: no less than the tuned plan, as far as that can be counted.
        accuracy: with its interval.
        difference: accuracy of the tuned plan minus its own, paired.
        note: why there are no figures, or what to know about them.
    """

    method: str
    share: float | None = None
    accuracy: Interval | None = None
    difference: Interval | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Of the tuned plan: better or worse if the interval of the difference excludes 0, else a tie."""
        if self.difference is None:
            return self.note
        low, high = self.difference.low, self.difference.high
        word = "better" if low > 0 else "worse" if high < 0 else "the same answers" if low == high else "tie"
        return f"{word}, {self.note}" if self.note else word


def compare(
    tuned: Plan,
    singles: Mapping[str, Scorer],
    questions: Questions,
    portions: Sequence[Portion],
    costs: Costs,
    seed: int,
    tell: Callable[[str], object],
) -> tuple[Answered, Answered, list[Compared]]:
    """The tuned plan beside the unpruned model and every single method that was given as many FLOPs.

    Each method gets the smallest budget that costs no less than the tuned plan.

    Returns:
        answers of the tuned plan and of the unpruned model, and a row a method, the strongest first.
    """

    def ask(plan: Plan | None) -> Answered:
        return join([questions.ask(plan, portion) for portion in portions])

    mine, unpruned = ask(tuned), ask(None)
    spent = costs.share(tuned)
    rows = []
    for name, method in singles.items():
        try:
            plan = equal_cost(method, costs, spent)
            theirs = ask(plan)
            note = "" if method.takes_budget else "but not at equal FLOPs: it decides by itself"
            rows.append(Compared(name, theirs.share, theirs.interval(seed), mine.minus(theirs, seed), note))
        except VtpruneError as error:
            rows.append(Compared(name, note=f"not possible: {error}"))
        tell(name)
    rows.sort(key=lambda row: row.difference.value if row.difference else float("inf"))
    return mine, unpruned, rows


def equal_cost(method: Scorer, costs: Costs, share: float) -> Plan:
    """The method's plan with the smallest budget that costs no less than `share`.

    Raises:
        VtpruneError: if its schedule cannot be as cheap.
    """
    build = behind(costs, method)
    if not method.takes_budget:
        return build(1)
    plan = build(costs.least(build, share))
    floor = costs.share(build(1))
    if floor > share * 1.02:
        raise VtpruneError(f"{method.name} costs at least {100 * floor:.1f} % of the prefill FLOPs")
    return plan


def _plan(trial: Found) -> Plan:
    if trial.plan is None:
        raise VtpruneError(f"trial {trial.number} has no plan.")
    return trial.plan
