"""Asking questions with the sets of tokens that an earlier run kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import vtprune
from vtprune.errors import InputError
from vtprune.plan import Plan

__all__ = ["Replaying"]


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
