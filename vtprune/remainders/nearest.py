"""The rest is averaged into the survivors that are most like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.rules import REMAINDERS, Merge, Remainder, own_index
from vtprune.similarity import nearest_target, unit_states
from vtprune.views import TokenView

__all__ = ["Nearest"]


@REMAINDERS.register("nearest")
@dataclass(frozen=True)
class Nearest(Remainder):
    """Each token that leaves goes into the survivor whose state has the highest cosine with its own.

    A survivor becomes the mean of itself and what it takes in, every original token counting once however often tokens
    are merged, and keeps its position. Ties go to the earlier survivor. No survivor, as where a layer lets all tokens
    go: the rest is dropped.
    Cost: O(V T D) for T survivors, in blocks.
    """

    name: ClassVar[str] = "nearest"
    summary: ClassVar[str] = "averaged into the most similar survivor"

    def merge(self, view: TokenView, selected: Tensor, scores: Tensor | None) -> Merge:
        """See `Remainder.merge`."""
        own = own_index(selected)
        owner = nearest_target(unit_states(view.hidden, view.valid), selected)
        return Merge(selected, own.where(selected | ~view.valid, owner))
