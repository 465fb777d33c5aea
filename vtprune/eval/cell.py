"""One cell of a sweep: attach, ask every question, and put scores and costs, or what went wrong, into its row."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vtprune.errors import BudgetError, UntrainedError, VtpruneError
from vtprune.eval.rows import UNPRUNED_ROW, KindScore, Row, TaskScore
from vtprune.eval.stats import Interval, mcnemar, mean_interval, paired_difference, ratio_interval
from vtprune.processes import several_processes

if TYPE_CHECKING:
    from vtprune.budget import Geometry
    from vtprune.eval.counts import Totals
    from vtprune.eval.harness import Harness, Sample
    from vtprune.eval.lmms_base import LmmsVtprune
    from vtprune.eval.replaying import Replaying

__all__ = ["Answers", "fill_row", "paired", "run_cell"]


@dataclass(frozen=True)
class Answers:
    """What a cell said and what that cost.

    Attributes:
        samples: by task, in order of doc id.
        totals: sums over the questions.
        geometry: the model's shape, None if nothing was attached.
    """

    samples: Mapping[str, Sequence[Sample]]
    totals: Totals
    geometry: Geometry | None = None

    @classmethod
    def of(cls, samples: Mapping[str, Sequence[Sample]], geometry: Geometry | None) -> Answers:
        """Samples with the sums of what they cost."""
        from vtprune.eval.counts import Totals

        return cls(samples, Totals.of(sample.counts for task in samples.values() for sample in task), geometry)


def run_cell(
    row: Row,
    lm: LmmsVtprune,
    harness: Harness,
    tasks: Sequence[str] | None = None,
    replaying: Replaying | None = None,
) -> Answers | None:
    """Attach and ask; None if the cell cannot run, with the reason in the row.

    Args:
        row: method and budget; `unpruned` attaches nothing.
        lm: the model.
        harness: the questions.
        tasks: which of its tasks, all if None.
        replaying: recorded sets to keep, in place of what the row's method would choose.
    """
    try:
        if row.method == UNPRUNED_ROW:
            lm.detach()
        elif replaying is not None:
            lm.replay(replaying)
            row.plan = replaying.plan.to_dict()
        else:
            row.plan = lm.attach(row.method, row.keep_value, basis=row.basis).plan.to_dict()
        samples = harness.run(lm, tasks)
        return Answers.of(samples, None if lm.session is None else lm.session.geometry)
    except BudgetError as error:
        row.status = "failed" if error.floor is None else "not possible"
        row.message, row.floor = str(error), error.floor
    except UntrainedError as error:
        row.status, row.message = "not trained", str(error)
    # what a method, the host or a task can raise on odd sizes; anything else is a bug in the sweep and stops it
    except (VtpruneError, RuntimeError, ValueError, IndexError) as error:
        if several_processes() and not isinstance(error, VtpruneError):
            # the others do not know of it, and would wait for this process for ever
            raise
        row.status = "failed"
        row.message = "".join(traceback.format_exception(error))
    return None


def fill_row(row: Row, answers: Answers, baseline: Answers, seed: int) -> None:
    """Scores and costs of a cell that ran, and the name of what it kept."""
    hashes = [sample.counts.get("kept_hash") for samples in answers.samples.values() for sample in samples]
    if all(hashes):
        row.kept_hash = hashlib.sha256("".join(map(str, hashes)).encode()).hexdigest()[:12]
    for name, value in answers.totals.to_dict().items():
        setattr(row, name, value)
    for task, samples in answers.samples.items():
        row.tasks[task] = _task_score(samples, baseline.samples[task], seed)


def paired(samples: Sequence[Sample], reference: Sequence[Sample], seed: int) -> Interval:
    """Accuracy minus that of the reference on the same questions, bootstrap over images."""
    images = [sample.image_id for sample in samples]
    return paired_difference([s.score for s in samples], [s.score for s in reference], images, seed)


def _task_score(samples: Sequence[Sample], baseline: Sequence[Sample], seed: int) -> TaskScore:
    images = [sample.image_id for sample in samples]
    scores = [sample.score for sample in samples]
    reference = [sample.score for sample in baseline]
    unpruned = sum(reference) / len(reference)
    accuracy = mean_interval(scores, images, seed)
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.kind is not None:
            by_kind.setdefault(sample.kind, []).append(sample)
    return TaskScore(
        accuracy=accuracy,
        share=accuracy.value / unpruned if unpruned else None,
        difference=paired(samples, baseline, seed),
        questions=len(samples),
        images=len(set(images)),
        kinds={kind: _kind_score(group) for kind, group in sorted(by_kind.items())},
        retention=ratio_interval(scores, reference, images, seed),
        mcnemar=mcnemar(scores, reference),
    )


def _kind_score(samples: Sequence[Sample]) -> KindScore:
    tokens = [sample.counts.get("average_tokens") for sample in samples]
    known = [float(n) for n in tokens if n is not None]
    average = sum(known) / len(known) if len(known) == len(samples) else None
    return KindScore(sum(sample.score for sample in samples) / len(samples), len(samples), average)
