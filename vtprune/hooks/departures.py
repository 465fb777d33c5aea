"""What the tower dropped, told to the decoder.

`generate` encodes the images before it calls the model, so a tower run knows its images but not the prompts they belong
to. What left is therefore written into the features themselves: the projector's output is scattered back to one row a
visual token, and the row of a token that left is zero but for its first channels, which hold a mark: the ordinal
(1, 2, ...) of the stage at which it left, 1 if it was merged into another token of its image, crop or frame, and how
many rows and columns of the grid away that one lies. The rows travel with the features through beam expansion, caching
and copies, and are dropped before the decoder sees them.

Axes: U units, V cells alive, S rows of the projector for all units, K of them left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.errors import InputError
from vtprune.hooks.alive import Alive
from vtprune.hooks.units import Unit, table
from vtprune.layout import Layout
from vtprune.plan import Stage
from vtprune.report import Kept
from vtprune.rules import own_index

__all__ = ["Departures", "book_departures", "read_departures"]

# channels of a row that tell why it left
_MARK = 4


def read_departures(features: Tensor, valid: Tensor) -> Tensor:
    """[B, V, D] visual embeddings -> [B, V, 4] the mark of each token that left the tower, 0 for survivors."""
    gone = (features[..., _MARK:] == 0).all(-1) & valid
    return torch.where(gone[..., None], features[..., :_MARK].float().round().long(), 0)


def book_departures(
    stages: Sequence[Stage], alive: Alive, marks: Tensor, expected: list[int], layout: Layout
) -> tuple[list[Kept], Alive]:
    """What the tower's stages kept, and what is alive after them.

    Args:
        stages: the tower's; those that cut are numbered 1, 2, ...
        alive: every visual token.
        marks: see `read_departures`.
        expected: survivors that each sample should have (the target, if the last stage is adaptive).
        layout: of the prompt.

    Raises:
        InputError: if the features come from elsewhere.
    """
    valid, left = alive.valid, marks[..., 0]
    survivors, kept, into = (left == 0) & valid, [], _merged_into(marks, layout)
    for ordinal, stage in enumerate(stages, start=1):
        here = ((left == 0) | (left > ordinal)) & valid
        merged = None
        if stage.merges:
            goes = (left == ordinal) & (marks[..., 1] > 0)
            alive = alive.absorb(into.where(goes, own_index(into)))
            pairs = [(mine.nonzero()[:, 0], row[mine]) for mine, row in zip(goes, into, strict=True)]
            merged = tuple(torch.stack(pair) for pair in pairs)
        kept.append(Kept(stage.site, tuple(row.nonzero()[:, 0] for row in here), merged=merged))
    counts = survivors.sum(1).tolist()
    if counts != expected and not stages[-1].adaptive:
        raise InputError(
            f"the image features hold {counts} tokens a sample instead of {expected}: they were encoded while this "
            "pruning was not attached. Encode the images again under the session."
        )
    return kept, alive if counts == alive.counts else alive.keep(survivors, counts)[0]


def _merged_into(marks: Tensor, layout: Layout) -> Tensor:
    """[B, V] the token that each one was merged into, itself if it was not."""
    own = torch.arange(marks.shape[1], device=marks.device).expand(marks.shape[:2])
    wide = max((len(grids) for grids in layout.grids), default=0)
    if not wide:
        return own
    cols = [[grid.cols for grid in grids] + [1] * (wide - len(grids)) for grids in layout.grids]
    across = torch.tensor(cols, device=marks.device).gather(1, layout.grid.to(marks.device))
    return (own + marks[..., 2] * across + marks[..., 3]).clamp(0, max(0, marks.shape[1] - 1))


class Departures:
    """The projector's rows during one tower run. `kept` [K] are those of cells that are left, None while all are."""

    def __init__(self, units: Sequence[Unit], device: torch.device) -> None:
        sizes = [unit.outputs for unit in units]
        first = list(itertools.accumulate(sizes[:-1], initial=0))
        # [U, V] projector row of each cell, [S] when it left
        self._row = table([unit.output for unit in units], device) + torch.tensor(first, device=device)[:, None]
        self._cols = torch.tensor([max(1, unit.grid[1]) for unit in units], device=device)[:, None]
        self._mark = torch.zeros(sum(sizes), _MARK, dtype=torch.long, device=device)
        staying = [start + lead for start, unit in zip(first, units, strict=True) for lead in range(unit.lead)]
        self._staying = torch.tensor(staying, dtype=torch.long, device=device)
        self.kept: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Move to another device."""
        self._row, self._mark, self._staying = (t.to(device) for t in (self._row, self._mark, self._staying))
        self._cols = self._cols.to(device)
        self.kept = None if self.kept is None else self.kept.to(device)

    @property
    def total(self) -> int:
        """S."""
        return len(self._mark)

    def note(self, ordinal: int, before: Alive, after: Alive, owner: Tensor | None = None) -> None:
        """The cells of `before` that `after` no longer has left at stage `ordinal`, into those of `owner` [U, V]."""
        mark = torch.zeros(*before.original.shape, _MARK, dtype=torch.long, device=self._mark.device)
        mark[..., 0] = ordinal
        if owner is not None:
            target = before.original.gather(1, owner.where(before.valid, 0))
            mark[..., 1] = (target != before.original).long()
            mark[..., 2] = target // self._cols - before.original // self._cols
            mark[..., 3] = target % self._cols - before.original % self._cols
        self._mark[self.rows_of(before)] = mark[before.valid]
        kept = self.rows_of(after)
        self._mark[kept] = 0
        # a projector inside the tower gets its rows in the order in which the tower has them
        self.kept = torch.cat([kept, self._staying]).sort().values

    def scatter(self, features: Tensor, *, marked: bool = False) -> Tensor:
        """[K, D] -> [S, D]; rows that left hold zeros, or (`marked`) when they left."""
        full = features.new_zeros(self.total, features.shape[-1])
        if marked:
            full[:, :_MARK] = self._mark.to(full.dtype)
        return features if self.kept is None else full.index_copy(0, self.kept, features)

    def rows_of(self, cells: Alive) -> Tensor:
        """[K] projector row of each cell, unit by unit."""
        return self._row.gather(1, cells.original)[cells.valid]
