"""Answers of a row: cell by cell, from disk where they are there, from the model where they are not."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vtprune.eval import BUNDLED_TASKS
from vtprune.eval.cell import Answers, run_cell
from vtprune.eval.rows import UNPRUNED_ROW, Row
from vtprune.eval.store import CellKey, CellResult, CellStore
from vtprune.processes import from_main, is_main
from vtprune.specs import with_seed

if TYPE_CHECKING:
    from vtprune.eval.harness import Harness
    from vtprune.eval.lmms_base import LmmsVtprune
    from vtprune.eval.replaying import Recording

__all__ = ["Asker"]


class Asker:
    """Asks a model the questions of a sweep.

    Args:
        lm: the model.
        harnesses: the questions, by seed.
        store: where cells are kept.
        settings: that cells are found again by, see `CellKey`.
        recording: cells to replay, if the sweep replays some.
        on_found: called with the number of questions of each cell that needed no asking.

    Attributes:
        found: cells that were there.
    """

    def __init__(
        self,
        lm: LmmsVtprune,
        harnesses: Mapping[int, Harness],
        store: CellStore,
        settings: Mapping[str, Any],
        recording: Recording | None,
        on_found: Callable[[int], object],
    ) -> None:
        self._lm, self._harnesses, self._store, self._settings = lm, harnesses, store, settings
        self._recording, self._on_found = recording, on_found
        self.found = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that could be loaded."""
        return next(iter(self._harnesses.values())).tasks

    def questions(self, tasks: tuple[str, ...]) -> int:
        """How many a row is asked."""
        return sum(harness.count(task) for harness in self._harnesses.values() for task in tasks)

    def answers(self, row: Row, tasks: tuple[str, ...]) -> Answers | None:
        """All answers of a row, those of several seeds one behind the other; None if there are none.

        Plan, and where something is missing status and message, go into the row: a task that breaks takes the others
        along as little as a method does.
        """
        results: dict[str, list[CellResult]] = {}
        for task in tasks:
            for seed in self._harnesses:
                results.setdefault(task, []).append(self._cell(row, task, seed))
                if results[task][-1].status == "not trained":
                    break
        whole = {task: cells for task, cells in results.items() if all(cell.status == "ok" for cell in cells)}
        bad = {task: next(c for c in cells if c.status != "ok") for task, cells in results.items() if task not in whole}
        if not whole:
            # a budget out of reach everywhere is one thing, a failure anywhere another
            worst = next((cell for cell in bad.values() if cell.status == "failed"), next(iter(bad.values())))
            row.status, row.message, row.floor = worst.status, worst.message, worst.floor  # type: ignore[assignment]
            return None
        row.missing = {task: cell.message for task, cell in bad.items()}
        row.plan = next(iter(whole.values()))[0].plan
        samples = {task: [sample for cell in cells for sample in cell.samples] for task, cells in whole.items()}
        return Answers.of(samples, None if row.method == UNPRUNED_ROW else self._lm.geometry)

    def _cell(self, row: Row, task: str, seed: int) -> CellResult:
        seeded = row.method != UNPRUNED_ROW and seed != 0
        method = with_seed(row.method, seed) if seeded and not row.replays else row.method
        drawn = seed if task in BUNDLED_TASKS else None
        settings = self._settings if not row.replays else {**self._settings, "replayed": row.kept_hash}
        key = CellKey(method, row.keep_value, task, drawn, row.basis, settings)
        found = from_main(self._store.load(key) if is_main() else None, getattr(self._lm, "accelerator", None))
        harness = self._harnesses[seed]
        if found is not None:
            self.found += 1
            self._on_found(harness.count(task))
            return found
        start = time.perf_counter()
        tried = dataclasses.replace(row, method=method, missing={}, tasks={})
        replaying = None
        if row.replays and self._recording is not None:
            replaying = self._recording.replaying(row.replays, row.keep_value, task, seed)
        answers = run_cell(tried, self._lm, harness, (task,), replaying)
        result = CellResult(tried.status, tried.message, tried.floor, tried.plan)
        result.seconds = time.perf_counter() - start
        if answers is None:
            self._on_found(harness.count(task))
        else:
            result.samples = [dataclasses.replace(sample, seed=drawn) for sample in answers.samples[task]]
        if is_main():
            self._store.save(key, result, f"{harness.log}\n{result.message}".strip() + "\n")
        return result
