"""The questions a search asks, in portions that share none, and what was answered, kept in a file.

Tuning and validation use the dev split of the bundled tasks, the final comparison the test split. A task with one split
(any other of lmms-eval's) is cut into three parts by document.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtprune.errors import InputError, VtpruneError
from vtprune.eval.stats import Interval, mean_interval, paired_difference
from vtprune.plan import Plan, Site, Stage

if TYPE_CHECKING:
    from vtprune.budget import Geometry
    from vtprune.eval.harness import Harness
    from vtprune.eval.lmms_model import VtpruneChat

__all__ = ["Answered", "Portion", "Questions", "join"]

_TIMED, _ROUNDS = 8, 5


@dataclass(frozen=True)
class Portion:
    """Some questions of every task.

    Attributes:
        split, seed: of the bundled tasks.
        first: document that it begins with.
        count: questions a task.
    """

    split: str
    seed: int
    first: int
    count: int


@dataclass(frozen=True)
class Answered:
    """What one plan scored on one portion or more.

    Attributes:
        scores: of every question, in [0, 1].
        images: names the image of each question, over all tasks and portions.
        tasks: the task of each question.
        flops, flops_full: decoder prefill as run and unpruned.
        batches: (text, visual) tokens of every sample of each batch; only of the unpruned model.
    """

    scores: tuple[float, ...]
    images: tuple[str, ...]
    tasks: tuple[str, ...]
    flops: int
    flops_full: int
    batches: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def accuracy(self) -> float:
        """Mean over the questions; every task has as many."""
        return sum(self.scores) / len(self.scores)

    @property
    def share(self) -> float:
        """FLOPs of the decoder prefill against unpruned."""
        return self.flops / self.flops_full

    def interval(self, seed: int) -> Interval:
        """Accuracy with its interval over images."""
        return mean_interval(self.scores, self.images, seed)

    def minus(self, other: Answered, seed: int) -> Interval:
        """Accuracy beyond that of another plan on the same questions, paired, over images."""
        return paired_difference(self.scores, other.scores, self.images, seed)


def join(parts: Sequence[Answered]) -> Answered:
    """Portions as one."""
    fields = ("scores", "images", "tasks", "batches")
    joined: dict[str, Any] = {name: tuple(x for part in parts for x in getattr(part, name)) for name in fields}
    return Answered(**joined, flops=sum(p.flops for p in parts), flops_full=sum(p.flops_full for p in parts))


class Questions:
    """Asks one model the questions of some tasks; what is in the file is not asked again.

    Args:
        lm: the model with its processor.
        tasks: lmms-eval task names.
        path: JSON lines, one a plan and portion; a line that a kill cut off is dropped.
    """

    def __init__(self, lm: VtpruneChat, tasks: Sequence[str], path: Path) -> None:
        self.lm, self.tasks = lm, tuple(tasks)
        self._path = path
        self._harnesses: dict[tuple[str, int, int], Harness] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self.geometry: Geometry = lm.geometry
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                record = json.loads(line)
                self._known[record.pop("key")] = record

    def attach(self, plan: Plan) -> None:
        """Prune the model by a plan and take it off again.

        Raises:
            VtpruneError: if the model cannot be pruned so.
        """
        self.lm.attach(plan)
        self.lm.detach()

    def require(self, portions: Sequence[Portion]) -> None:
        """Check that every task has as many questions.

        Raises:
            InputError: naming the first that has not.
        """
        for portion in portions:
            for task, size in self._harness(portion).sizes.items():
                if size < portion.first + portion.count:
                    raise InputError(
                        f"task {task!r} has {size} questions, and {portion.first + portion.count} are needed (tuning, "
                        "validation and comparison share none). Lower --limit or --held-out."
                    )

    def ask(self, plan: Plan | None, portion: Portion) -> Answered:
        """What a plan, or the unpruned model (None), answers to a portion.

        Raises:
            VtpruneError: if the model cannot run the plan on these questions.
        """
        key = _key(plan, portion)
        if key not in self._known:
            record = asdict(self._asked(plan, portion))
            if plan is not None:
                record["batches"] = ()
            self._known[key] = record
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **record}) + "\n")
        record = dict(self._known[key])
        batches = tuple(tuple((int(t), int(v)) for t, v in batch) for batch in record.pop("batches"))
        lists = {name: tuple(record[name]) for name in ("scores", "images", "tasks")}
        return Answered(**{**record, **lists}, batches=batches)

    def timed(self, plan: Plan, portion: Portion) -> float:
        """Prefill seconds (vision tower included) against unpruned, medians of one interleaved run on a few questions.

        Not repeatable to the last digit, and on a busy machine not to the first.
        """
        import vtprune
        from vtprune.eval.asking import UNPRUNED
        from vtprune.eval.prefill import prefill_timings

        inputs = self.lm.encode(self._harness(portion).prompts(self.lm, self.tasks[0], _TIMED))
        timings = prefill_timings(self.lm.model, inputs, {"plan": lambda model: vtprune.prune(model, plan)}, _ROUNDS)
        return timings["plan"].median_s / timings[UNPRUNED].median_s

    def _asked(self, plan: Plan | None, portion: Portion) -> Answered:
        harness = self._harness(portion)
        # a plan that keeps everything changes nothing, and counts
        self.lm.attach(_everything() if plan is None else plan)
        try:
            samples = [s for part in harness.run(self.lm, first=portion.first).values() for s in part]
        except VtpruneError:
            raise
        # what a method or the host can raise on odd sizes; a trial fails by it, not the search
        except (RuntimeError, ValueError, IndexError) as error:
            raise VtpruneError(f"{type(error).__name__}: {error}") from error
        finally:
            totals = self.lm.totals
            self.lm.detach()
        return Answered(
            scores=tuple(s.score for s in samples),
            # other seeds ask about other images under the same number
            images=tuple(f"{s.task}/{portion.seed}/{s.image_id}" for s in samples),
            tasks=tuple(s.task for s in samples),
            flops=totals.flops,
            flops_full=totals.flops_full,
            batches=tuple(totals.batches),
        )

    def _harness(self, portion: Portion) -> Harness:
        from vtprune.eval.harness import Harness

        key = (portion.split, portion.seed, portion.count)
        if key not in self._harnesses:
            self._harnesses[key] = Harness(self.tasks, portion.count, portion.seed, portion.split)
        return self._harnesses[key]


def _everything() -> Plan:
    from vtprune.contract import METHODS

    return Plan((Stage(Site("input"), METHODS["uniform"](), 1.0),))


def _key(plan: Plan | None, portion: Portion) -> str:
    what: Mapping[str, Any] = {} if plan is None else plan.to_dict()
    text = json.dumps([what, asdict(portion)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
