"""What several files check of a family in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from family_models import Case, Row

import vtprune


def batch_equals_each_alone(case: Case, model: Any, rows: Sequence[Row], method: Any, keep: Any) -> None:
    """A ragged batch gives every prompt the tokens and the kept sets that it gets alone."""
    inputs = case.batch(*rows)
    width = inputs["input_ids"].shape[1]
    with vtprune.prune(model, method, keep) as session:
        together = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        kept = session.report.kept
        for b, row in enumerate(rows):
            alone = case.batch(row)
            ids = model.generate(**alone, max_new_tokens=8, do_sample=False)
            assert torch.equal(ids[0, alone["input_ids"].shape[1] :], together[b, width:])
            if row.media:
                for mine, all_rows in zip(session.report.kept, kept, strict=True):
                    assert torch.equal(mine.indices[0], all_rows.indices[b])
