"""One row a cell (method x budget) of a sweep: what goes into the JSONL file, the table, the plot and the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vtprune.errors import InputError
from vtprune.eval.stats import Interval, McNemar

__all__ = [
    "REPLAY",
    "UNPRUNED_ROW",
    "Against",
    "FlopCounts",
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
        retention: `share` with its paired 95 % interval over images.
        mcnemar: exact test against the unpruned model on the same questions.
    """

    accuracy: Interval
    share: float | None
    difference: Interval
    questions: int
    images: int
    kinds: dict[str, KindScore] = field(default_factory=dict)
    retention: Interval | None = None
    mcnemar: McNemar | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskScore:
        """Inverse of `dataclasses.asdict`; rows written before there was a retention or a test have none."""
        fields = dict(data)
        fields["kinds"] = {name: KindScore(**kind) for name, kind in data["kinds"].items()}
        for name in ("accuracy", "difference"):
            fields[name] = Interval(**data[name])
        fields["retention"] = None if data.get("retention") is None else Interval(**data["retention"])
        fields["mcnemar"] = None if data.get("mcnemar") is None else McNemar(**data["mcnemar"])
        return cls(**fields)


@dataclass(frozen=True)
class FlopCounts:
    """Decoder prefill of one question on average, in the three units that papers call FLOPs.

    Attributes:
        image_macs: multiply-accumulates of the image tokens alone (`vtprune.cost.image_macs`: TransPrune, FastV).
        image_flops: twice that (`vtprune.cost.image_flops`: YOPO).
        prefill: 2 x multiply-accumulates, text and attention included, as run with padding and with every pass that
            a method makes (`vtprune.cost.prefill_flops`); None if nothing was counted.
    """

    image_macs: float
    image_flops: float
    prefill: float | None = None


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
        flop_counts: decoder prefill a question in the three units in use, None if it was not counted.
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
    flop_counts: FlopCounts | None = None
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
            if fields.get("flop_counts") is not None:
                fields["flop_counts"] = FlopCounts(**fields["flop_counts"])
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
