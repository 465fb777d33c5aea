"""The search: an optuna study in SQLite that a kill does not hurt.

Trial k draws from a sampler seeded by (seed, k) that reads the finished trials, and nothing else; what was tried before
is drawn again. A trial that a kill
cut off is marked as failed and drawn again, so an interrupted search ends with the trials of an uninterrupted one,
bit for bit where the model answers alike (and nothing is timed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, VtpruneError
from vtprune.plan import Plan
from vtprune.tune.budgets import Costs, solve_chain
from vtprune.tune.goal import Goal
from vtprune.tune.questions import Answered, Portion, Questions, join

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

    from vtprune.tune.space import Candidate, Space

__all__ = ["Found", "Search", "found_of", "open_study", "require_optuna"]

_FEWEST_RIVALS = 4  # below that half of them say little
_SLACK = 0.05  # batches of a part may be padded more than those of the whole
_GUIDED_DRAWS, _DRAWS = 5, 30  # until a candidate comes that was not tried before
_AT_RANDOM = 10  # trials behind the single methods that no others guide


def require_optuna() -> None:
    """Import optuna.

    Raises:
        VtpruneError: with the command that installs it.
    """
    try:
        import optuna
    except ImportError as error:
        raise VtpruneError(f"vtprune tune needs optuna ({error}). Run: pip install 'vtprune[tune,eval]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def open_study(folder: Path, settings: Mapping[str, Any]) -> Iterator[Study]:
    """The study in `folder/study.db`, new or as it was left.

    Raises:
        InputError: if it was begun with other settings.
    """
    import optuna

    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'study.db'}")
    try:
        study = optuna.create_study(
            study_name="tune", storage=storage, direction="maximize", load_if_exists=True, pruner=_halving()
        )
        before = study.user_attrs.get("settings")
        if before is None:
            study.set_user_attr("settings", dict(settings))
        elif before != settings:
            other = sorted(k for k in {*before, *settings} if before.get(k) != settings.get(k))
            changes = "; ".join(f"{k} was {before.get(k)!r}, now {settings.get(k)!r}" for k in other)
            raise InputError(
                f"{str(folder)!r} holds a search with other settings ({changes}). Repeat its command to go on with it, "
                "or name another --out."
            )
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _halving() -> Any:
    import optuna

    class Halving(optuna.pruners.BasePruner):
        """Stops a trial that is not in the better half of the finished ones that were asked as much.

        optuna's own successive halving also counts trials that never ended, which a resumed search would count twice.
        """

        def prune(self, study: Study, trial: FrozenTrial) -> bool:
            done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
            step = trial.last_step
            values = [t.intermediate_values.get(step) for t in study.get_trials(deepcopy=False, states=done)]  # type: ignore[arg-type]
            rivals = sorted((v for v in values if v is not None), reverse=True)
            if step is None or len(rivals) < _FEWEST_RIVALS:
                return False
            return trial.intermediate_values[step] < rivals[len(rivals) // 2]

    return Halving()


@dataclass(frozen=True)
class Found:
    """A finished trial.

    Attributes:
        number: of the trial.
        text: its methods.
        single: a method alone, as it comes.
        candidate: its methods, split and share, JSON-ready.
        state: "asked" all questions, "stopped" after a part of them, or "not possible".
        note: why it was not possible, or how far beyond the limit it is.
        value: see `Goal.value`; None unless it was asked everything.
        plan, accuracy, share, ratio: None where it did not get that far.
    """

    number: int
    text: str
    single: bool
    candidate: dict[str, Any]
    state: str = "not possible"
    note: str = ""
    value: float | None = None
    plan: Plan | None = None
    accuracy: float | None = None
    share: float | None = None
    ratio: float | None = None


def found_of(study: Study) -> list[Found]:
    """The finished trials, in order."""
    from optuna.trial import TrialState

    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        record: dict[str, Any] = dict(trial.user_attrs["record"])
        plan = record.pop("plan")
        value = trial.value if trial.state == TrialState.COMPLETE else None
        found.append(Found(trial.number, value=value, plan=None if plan is None else Plan.from_dict(plan), **record))
    return found


class Search:
    """Runs the trials of one study.

    Args:
        study: from `open_study`.
        space: what is tried.
        costs: counts FLOPs on the tuning questions.
        questions: answers them.
        goal: what counts.
        portions: the tuning questions in equal parts; after each the worse half of the trials is stopped.
        unpruned: the unpruned model's answers to each part.
        seed: of the sampler.
        timed: prefill time of a plan against unpruned; only called if the goal is about time.
    """

    def __init__(
        self,
        study: Study,
        space: Space,
        costs: Costs,
        questions: Questions,
        goal: Goal,
        portions: Sequence[Portion],
        unpruned: Sequence[Answered],
        seed: int,
        timed: Callable[[Plan], float],
    ) -> None:
        self.study, self.space, self.costs, self.questions, self.goal = study, space, costs, questions, goal
        self.portions, self.unpruned, self.seed, self.timed = tuple(portions), tuple(unpruned), seed, timed
        self._seen: set[str] = set()
        # where the share is searched a single method begins in the middle
        self.first = space.stock(goal.limit if goal.kind == "flops" else (space.low + space.high) / 2)

    def run(self, trials: int, tell: Callable[[str], object]) -> None:
        """Finish every single method and `trials` more; `tell` is called with the text of each finished trial."""
        from optuna.trial import TrialState

        for cut_off in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(cut_off.number, state=TrialState.FAIL)
        finished = (TrialState.COMPLETE, TrialState.PRUNED)
        done = len(self.study.get_trials(deepcopy=False, states=finished))
        self._seen = {_likeness(trial.plan, trial.text) for trial in found_of(self.study)}
        for place in range(done, len(self.first) + trials):
            tell(self._one(place))

    def _one(self, place: int) -> str:
        """Ask one candidate; one that was tried before is drawn again, which the finished trials do not show."""
        from optuna.trial import TrialState

        for attempt in range(_DRAWS):
            trial, candidate = self._drawn(place, attempt)
            plan, note = None, ""
            try:
                plan = solve_chain(self.costs, candidate.methods, candidate.split, candidate.share)
                self.questions.attach(plan)
            except VtpruneError as error:
                note = str(error)
            likeness = _likeness(plan, candidate.text)
            if place < len(self.first) or likeness not in self._seen or attempt == _DRAWS - 1:
                break
            self.study.tell(trial, state=TrialState.FAIL)
        self._seen.add(likeness)
        # one entry, written at the end: every write waits for the disk
        record: dict[str, Any] = {
            "text": candidate.text,
            "single": place < len(self.first),
            "candidate": _record(candidate),
            "plan": None if plan is None else plan.to_dict(),
            "state": "not possible",
            "note": note,
        }
        value = None if note or plan is None else self._value(trial, plan, record)
        trial.set_user_attr("record", record)
        self.study.tell(trial, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)
        return candidate.text

    def _drawn(self, place: int, attempt: int) -> tuple[Trial, Candidate]:
        import optuna

        seed = _mixed(self.seed, place, attempt)
        # single methods as they come say little about chains and knobs
        guided = optuna.samplers.TPESampler(
            seed=seed, multivariate=False, n_startup_trials=len(self.first) + _AT_RANDOM
        )
        # who draws what is known again and again has converged
        self.study.sampler = guided if attempt < _GUIDED_DRAWS else optuna.samplers.RandomSampler(seed=seed)
        waiting = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        if place < len(self.first) and not waiting:
            self.study.enqueue_trial(self.first[place])
        trial = self.study.ask()
        return trial, self.space.draw(trial)

    def _value(self, trial: Trial, plan: Plan, record: dict[str, Any]) -> float | None:
        """What a plan is worth; None if it was stopped or cannot run. `record` gets what is to be remembered."""
        ratio = record["ratio"] = self.timed(plan) if self.goal.kind == "latency" else None
        if self.goal.excess(0.0, ratio) > 0:
            record["note"] = f"its prefill takes {100 * (ratio or 0):.1f} % of the unpruned time."
            return None
        parts: list[Answered] = []
        for step, portion in enumerate(self.portions, start=1):
            try:
                parts.append(self.questions.ask(plan, portion))
            except VtpruneError as error:
                record["note"] = str(error)
                return None
            asked, unpruned = join(parts), join(self.unpruned[:step])
            record |= {"accuracy": asked.accuracy, "share": asked.share}
            if step == len(self.portions):
                break
            beyond = self.goal.excess(asked.share, ratio) > _SLACK * self.goal.limit
            if beyond and not record["single"]:
                # it decides for itself, and too much
                record["state"] = "stopped"
                record["note"] = f"costs {100 * asked.share:.1f} % of the prefill FLOPs, beyond the limit"
                return None
            trial.report(self.goal.so_far(asked.accuracy, unpruned.accuracy), step)
            if trial.should_prune() and not record["single"]:
                record["state"] = "stopped"
                return None
        record["state"] = "asked"
        if self.goal.excess(asked.share, ratio) > 0:
            record["note"] = f"costs {100 * asked.share:.1f} % of the prefill FLOPs, beyond the limit"
        return self.goal.value(asked.accuracy, unpruned.accuracy, asked.share, ratio)


def _record(candidate: Candidate) -> dict[str, Any]:
    methods = [method.to_dict() for method in candidate.methods]
    return {"methods": methods, "split": candidate.split, "share": candidate.share}


def _likeness(plan: Plan | None, text: str) -> str:
    """The same for candidates that are the same, or that cannot be solved with the same methods and knobs."""
    return text if plan is None else repr(plan)


def _mixed(*numbers: int) -> int:
    """One number for several, below 2 ** 32."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
