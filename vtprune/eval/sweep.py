"""What a sweep is to run, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtprune.errors import InputError
from vtprune.eval.against import require_reference
from vtprune.eval.cell import Answers
from vtprune.eval.keeps import OWN, SweepKeep
from vtprune.eval.rows import UNPRUNED_ROW, Row
from vtprune.specs import row_chain

__all__ = ["Sweep", "SweepResult"]


@dataclass(frozen=True)
class Sweep:
    """What to run. Defaults are those of `vtprune eval`.

    Attributes:
        methods: names of methods, or chains that take the row's budget in one member (see `vtprune.specs`).
        keeps: budgets; those that mean all tokens stand for the unpruned model, which is always run once.
        tasks: lmms-eval task names.
        model: what `vtprune.loading.load_model` accepts.
        limit: questions a task and seed.
        batch_size: questions a call.
        seeds: of the bundled questions and of methods that draw. A row has the answers of all of them together.
        basis: what a budget counts, `average` or `final`.
        against: the method that every row is compared with at equal FLOPs, None for no comparison.
        rounds: measurements of each prefill, 0 for no timing.
        device, dtype, attn_implementation, device_map: for loading.
        save_kept: write down which tokens each stage kept of each question.
        replay: the folder of a sweep whose recorded sets are kept, in place of `methods` and `keeps`.
        command: how the user started it, kept with the results.

    Raises:
        VtpruneError: if a method is not known, a chain does not take one budget, `against` cuts inside the model, or
            seeds are missing or twice there.
    """

    methods: tuple[str, ...]
    keeps: tuple[SweepKeep, ...]
    tasks: tuple[str, ...]
    model: str = "tiny:llava"
    limit: int | None = None
    batch_size: int = 16
    seeds: tuple[int, ...] = (0,)
    basis: str = "average"
    against: str | None = "random"
    rounds: int = 7
    device: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    device_map: str | None = None
    save_kept: bool = True
    replay: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for method in self.methods:
            row_chain(method)
        if self.against is not None:
            require_reference(self.against)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InputError(f"seeds must be different numbers, at least one, got {list(self.seeds)}.")

    @property
    def seed(self) -> int:
        """Of the bootstrap: the first one."""
        return self.seeds[0]

    @property
    def loading(self) -> dict[str, Any]:
        """What the model is loaded and asked with, for `load_chat`."""
        names = ("device", "dtype", "attn_implementation", "device_map", "batch_size", "save_kept")
        return {name: getattr(self, name) for name in names}

    def cells(self) -> list[tuple[str, SweepKeep]]:
        """(method, budget) of every pruned cell; a method that can decide by itself has a cell where it does."""
        cells: list[tuple[str, SweepKeep]] = []
        for method in self.methods:
            chain = row_chain(method)
            cells += [(method, keep) for keep in self.keeps if any(chain.open) and not keep.is_all]
            cells += [(method, OWN)] * chain.decides
        return cells


@dataclass
class SweepResult:
    """Rows in order, the unpruned model first, and every answer behind them by row name.

    Attributes:
        rows, answers: see above.
        broken_tasks: why the unpruned model has no answers to a task, by task; no row has any then.
        found: cells that were on disk already.
    """

    rows: list[Row]
    answers: dict[str, Answers] = field(default_factory=dict)
    broken_tasks: dict[str, str] = field(default_factory=dict)
    found: int = 0

    @property
    def failures(self) -> dict[str, str]:
        """Why cells and references broke, by name (a cell whose budget cannot be reached is not among them)."""
        found = {f"task {task}": message for task, message in self.broken_tasks.items()}
        for row in self.rows:
            if row.status == "failed":
                found[row.name] = row.message
            if row.method != UNPRUNED_ROW:
                found |= {f"{row.name} on {task}": message for task, message in row.missing.items()}
        lost = [row.against for row in self.rows if row.against is not None and row.against.message]
        return found | {f"{other.method} at {other.keep:.4g}, to compare with": other.message for other in lost}
