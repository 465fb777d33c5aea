"""Asking questions with the sets of tokens that an earlier run kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vtprune
from vtprune.errors import InputError
from vtprune.eval.rows import Row, read_rows
from vtprune.eval.store import read_cells
from vtprune.plan import Plan
from vtprune.specs import with_seed

__all__ = ["Recording", "Replaying"]


@dataclass(frozen=True)
class Replaying:
    """The recorded sets of one cell.

    Attributes:
        plan: of the cell.
        sets: by task and doc id what each stage kept of the question.
    """

    plan: Plan
    sets: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]

    def attach(self, model: Any, places: Sequence[tuple[str, int]], session: Any) -> Any:
        """Prune the next call, a batch of the questions at `places`; the batch before had `session`.

        Raises:
            InputError: if a question was not recorded.
        """
        if session is not None:
            session.remove()
        records = []
        for task, doc_id in places:
            if (task, doc_id) not in self.sets:
                raise InputError(f"nothing is recorded for question {doc_id} of {task!r}; replay what was asked.")
            records.append(self.sets[task, doc_id])
        kept = [
            {"site": str(stage.site), "indices": [record[at]["indices"] for record in records]}
            for at, stage in enumerate(self.plan.stages)
        ]
        return vtprune.prune(model, vtprune.replay(self.plan, kept))


class Recording:
    """A sweep that wrote down which tokens it kept.

    Args:
        folder: its results.

    Attributes:
        rows: its pruned rows that ran.

    Raises:
        InputError: if the folder holds no sweep, or one that kept no sets.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "rows.jsonl").is_file():
            raise InputError(f"the folder {str(folder)!r} holds no rows.jsonl. Pass the --out of `vtprune eval`.")
        self._cells: dict[tuple[Any, ...], Replaying] = {}
        for key, cell in read_cells(folder):
            kept = {(s.task, s.doc_id): s.counts["kept"] for s in cell.samples if "kept" in s.counts}
            if cell.plan is not None and len(kept) == len(cell.samples) > 0:
                place = (key["method"], key["keep"], key["task"], key["seed"])
                self._cells[place] = Replaying(Plan.from_dict(cell.plan), kept)
        self.rows: list[Row] = [row for row in read_rows(folder / "rows.jsonl") if row.kept_hash is not None]
        if not self.rows or not self._cells:
            raise InputError(f"the sweep in {str(folder)!r} wrote down no kept sets. Run it without --no-save-kept.")

    def replaying(self, method: str, keep: int | float | None, task: str, seed: int) -> Replaying:
        """What one cell kept.

        Raises:
            InputError: if the recording does not hold it.
        """
        text = with_seed(method, seed) if seed else method
        for drawn in (seed, None):
            if (text, keep, task, drawn) in self._cells:
                return self._cells[text, keep, task, drawn]
        raise InputError(
            f"{method} at {keep} on {task!r} with seed {seed} is not in the recording. Replay with the tasks and seeds "
            "that were recorded."
        )
