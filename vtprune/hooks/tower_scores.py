"""What the tower's scorers gave, told to the report.

A tower run knows the rows of its projector and not the prompts they go to, and beside the features nothing travels
from one to the other. Most hosts lay those rows into the prompts one by one in their order; where they do, and where
the sets that were kept are the same on both sides, a score belongs to a token. Elsewhere (LLaVA-NeXT's crops and row
ends, beams, images and videos in one call) there are none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtprune.report import Kept

__all__ = ["StageScores", "TowerScores", "with_tower_scores"]


@dataclass(frozen=True)
class StageScores:
    """One cut, by row of the projector.

    Attributes:
        rows: [n] increasing; the tokens that were scored.
        values: [n] fp32, their scores; None if the scorer only selects.
        kept: [k] increasing; the rows that are left.
    """

    rows: Tensor
    values: Tensor | None
    kept: Tensor


@dataclass
class TowerScores:
    """All cuts of one tower run.

    Attributes:
        total: rows of the projector if nothing had left.
        stages: by ordinal (1, 2, ...) of the stage; those that dropped nothing are missing.
    """

    total: int
    stages: dict[int, StageScores] = field(default_factory=dict)


def with_tower_scores(kept: Sequence[Kept], counts: Sequence[int], read: TowerScores | None) -> tuple[Kept, ...]:
    """The records with scores at the tower's sites, where they are known.

    Args:
        kept: of all stages, the tower's first.
        counts: visual tokens of each sample.
        read: the tower run that encoded them.
    """
    if read is None or sum(counts) != read.total:
        return tuple(kept)
    found = list(kept)
    for ordinal, record in enumerate(kept, start=1):
        stage = read.stages.get(ordinal)
        if record.site.kind != "vision" or stage is None or stage.values is None:
            continue
        first = list(itertools.accumulate(counts[:-1], initial=0))
        mine = torch.cat([indices + start for indices, start in zip(record.indices, first, strict=True)])
        if not torch.equal(mine.cpu(), stage.kept.cpu()):
            return tuple(kept)
        found[ordinal - 1] = _scored(record, stage.rows, stage.values, first, counts)
    return tuple(found)


def _scored(record: Kept, rows: Tensor, values: Tensor, first: Sequence[int], counts: Sequence[int]) -> Kept:
    device = record.indices[0].device
    rows, values = rows.to(device), values.to(device)
    spans = [(rows >= start) & (rows < start + count) for start, count in zip(first, counts, strict=True)]
    scores = tuple(values[span] for span in spans)
    alive = tuple(rows[span] - start for span, start in zip(spans, first, strict=True))
    return dataclasses.replace(record, scores=scores, alive=alive)
