"""One row a cell (method x budget) of a sweep: what goes into the JSONL file, the table, the plot and the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vtprune.errors import InputError
from vtprune.eval.stats import Interval

__all__ = [
    "REPLAY",
    "UNPRUNED_ROW",
    "Against",
    "KindScore",
    "Row",
    "Status",
    "TaskScore",
    "by_method",
    "read_rows",
    "write_rows",
]

Status = Literal["ok", "not possible", "not trained", "failed"]
UNPRUNED_ROW = "unpruned"
REPLAY = "replay:"


@dataclass(frozen=True)
class KindScore:
    """Accuracy on one kind of question.

    Attributes:
        accuracy: mean score.
        questions: how many.
        tokens: visual tokens that entered a decoder layer, averaged over layers and questions; None if nothing was
            attached.
    """

    accuracy: float
    questions: int
    tokens: float | None = None


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one cell on one task.

    Attributes:
        accuracy: mean score, 95 % interval over images.
        share: accuracy / accuracy of the unpruned model; None where that is 0.
        difference: accuracy minus unpruned on the same questions, paired interval.
        questions, images: how many.
        kinds: accuracy by kind of question, where the task has kinds.
    """

    accuracy: Interval
    share: float | None
    difference: Interval
    questions: int
    images: int
    kinds: dict[str, KindScore] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskScore:
        """Inverse of `dataclasses.asdict`."""
        kinds = {name: KindScore(**kind) for name, kind in data["kinds"].items()}
        intervals = {name: Interval(**data[name]) for name in ("accuracy", "difference")}
        return cls(share=data["share"], questions=data["questions"], images=data["images"], kinds=kinds, **intervals)


@dataclass(frozen=True)
class Against:
    """A row beside a reference method that was given as many FLOPs of decoder prefill.

    Attributes:
        method: the reference.
        keep: its budget: tokens, or a share where questions differ in their visual tokens.
        share: FLOPs of the row against unpruned.
        tokens: that entered a decoder layer of the reference, a question.
        reference_share: FLOPs of the reference against unpruned: `share` or little more, at most 1.
        differences: by task, accuracy of the row minus the reference's on the same questions, paired interval.
        message: why the reference has no figures.
    """

    method: str
    keep: int | float
    share: float
    tokens: float | None = None
    reference_share: float | None = None
    differences: dict[str, Interval] = field(default_factory=dict)
    message: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Against:
        """Inverse of `dataclasses.asdict`."""
        differences = {task: Interval(**interval) for task, interval in data["differences"].items()}
        return cls(**{**data, "differences": differences})


@dataclass
class Row:
    """One cell.

    Attributes:
        method: a method or chain as the user wrote it, or `unpruned`.
        keep: the budget as the user wrote it, "own" where the method decides.
        keep_value: how it was read: share (float), tokens (int), or None where the method decides.
        basis: what the budget counts.
        status: `not possible` if the method's schedule cannot reach the budget, `not trained` if it is learned and has
            no weights for this model.
        message: why the cell has no figures.
        floor: smallest average number of tokens the schedule reaches, for a cell that is not possible.
        tasks: score by task.
        missing: why tasks are not among them, by name.
        kept_hash: names what was kept of all questions; None where nothing was attached.
        visual_tokens: a question, before pruning.
        average_tokens: that entered a decoder layer, averaged over layers and questions.
        flops_share, vision_flops_share, kv_share: against unpruned, decoder prefill / tower / cache.
        prefill_ratio: prefill seconds (tower included) against unpruned, medians of one interleaved run.
        prefill_ms: the median itself.
        against: the comparison with a reference at equal FLOPs, None if there is none.
        plan: the plan as JSON.
        run: what the row was made with: model, versions, device, seed, command.
    """

    method: str
    keep: str
    keep_value: int | float | None
    basis: str = "average"
    status: Status = "ok"
    message: str = ""
    floor: float | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    kept_hash: str | None = None
    visual_tokens: float | None = None
    average_tokens: float | None = None
    flops_share: float | None = None
    vision_flops_share: float | None = None
    kv_share: float | None = None
    prefill_ratio: float | None = None
    prefill_ms: float | None = None
    against: Against | None = None
    plan: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`fastv 1/4`, for messages and as a key."""
        return self.method if self.method == UNPRUNED_ROW else f"{self.method} {self.keep}"

    @property
    def replays(self) -> str | None:
        """The method whose recorded sets the row keeps, None if it chooses itself."""
        return self.method.removeprefix(REPLAY) if self.method.startswith(REPLAY) else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of `to_dict`.

        Raises:
            InputError: if a field is missing or not known.
        """
        fields = dict(data)
        try:
            fields["tasks"] = {name: TaskScore.from_dict(score) for name, score in data["tasks"].items()}
            if fields.get("against") is not None:
                fields["against"] = Against.from_dict(fields["against"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise InputError(f"not a row of `vtprune eval`: {error} (fields {sorted(data)}).") from error


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    return [Row.from_dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Pruned rows of each method in order of appearance, largest budget first as they came."""
    methods: dict[str, list[Row]] = {}
    for row in rows:
        if row.method != UNPRUNED_ROW:
            methods.setdefault(row.method, []).append(row)
    return methods
