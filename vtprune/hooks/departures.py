"""What the tower dropped, told to the decoder.

`generate` encodes the images before it calls the model, so a tower run knows its images but not the prompts they belong
to. What left is therefore written into the features themselves: the projector's output is scattered back to one row a
visual token, and the row of a token that left is zero but for channel 0, which holds the ordinal (1, 2, ...) of the
stage at which it left. The rows travel with the features through beam expansion, caching and copies, and are dropped
before the decoder sees them.

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
from vtprune.plan import Stage
from vtprune.report import Kept

__all__ = ["Departures", "book_departures", "read_departures"]


def read_departures(features: Tensor, valid: Tensor) -> Tensor:
    """[B, V, D] visual embeddings -> [B, V] ordinal of the tower stage at which each token left, 0 for survivors."""
    gone = (features[..., 1:] == 0).all(-1) & valid
    return torch.where(gone, features[..., 0].float().round().long(), 0)


def book_departures(
    stages: Sequence[Stage], alive: Alive, left: Tensor, expected: list[int]
) -> tuple[list[Kept], Alive]:
    """What the tower's stages kept, and what is alive after them.

    Args:
        stages: the tower's; those that cut are numbered 1, 2, ...
        alive: every visual token.
        left: see `read_departures`.
        expected: survivors that each sample should have (the target, if the last stage is adaptive).

    Raises:
        InputError: if the features come from elsewhere.
    """
    valid = alive.valid
    survivors, kept = (left == 0) & valid, []
    for ordinal, stage in enumerate(stages, start=1):
        here = ((left == 0) | (left > ordinal)) & valid
        kept.append(Kept(stage.site, tuple(row.nonzero()[:, 0] for row in here)))
    counts = survivors.sum(1).tolist()
    if counts != expected and not stages[-1].adaptive:
        raise InputError(
            f"the image features hold {counts} tokens a sample instead of {expected}: they were encoded while this "
            "pruning was not attached. Encode the images again under the session."
        )
    return kept, alive if counts == alive.counts else alive.keep(survivors, counts)[0]


class Departures:
    """The projector's rows during one tower run. `kept` [K] are those of cells that are left, None while all are."""

    def __init__(self, units: Sequence[Unit], device: torch.device) -> None:
        sizes = [unit.outputs for unit in units]
        first = list(itertools.accumulate(sizes[:-1], initial=0))
        # [U, V] projector row of each cell, [S] when it left
        self._row = table([unit.output for unit in units], device) + torch.tensor(first, device=device)[:, None]
        self._ordinal = torch.zeros(sum(sizes), dtype=torch.long, device=device)
        staying = [start + lead for start, unit in zip(first, units, strict=True) for lead in range(unit.lead)]
        self._staying = torch.tensor(staying, dtype=torch.long, device=device)
        self.kept: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Move to another device."""
        self._row, self._ordinal, self._staying = (t.to(device) for t in (self._row, self._ordinal, self._staying))
        self.kept = None if self.kept is None else self.kept.to(device)

    @property
    def total(self) -> int:
        """S."""
        return len(self._ordinal)

    def note(self, ordinal: int, before: Alive, after: Alive) -> None:
        """The cells of `before` that `after` no longer has left at stage `ordinal`."""
        self._ordinal[self.rows_of(before)] = ordinal
        kept = self.rows_of(after)
        self._ordinal[kept] = 0
        # a projector inside the tower gets its rows in the order in which the tower has them
        self.kept = torch.cat([kept, self._staying]).sort().values

    def scatter(self, features: Tensor, *, marked: bool = False) -> Tensor:
        """[K, D] -> [S, D]; rows that left hold zeros, or (`marked`) when they left."""
        full = features.new_zeros(self.total, features.shape[-1])
        if marked:
            full[:, 0] = self._ordinal.to(full.dtype)
        return features if self.kept is None else full.index_copy(0, self.kept, features)

    def rows_of(self, cells: Alive) -> Tensor:
        """[K] projector row of each cell, unit by unit."""
        return self._row.gather(1, cells.original)[cells.valid]
