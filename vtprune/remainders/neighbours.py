"""Survivors add what is around them to themselves, and one token sums up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.errors import PlanError
from vtprune.remainders.summary import Summary
from vtprune.rules import REMAINDERS, Merge, Remainder, require_scores
from vtprune.similarity import nearest_others, unit_states
from vtprune.views import TokenView

__all__ = ["Neighbours"]


@REMAINDERS.register("neighbours")
@dataclass(frozen=True)
class Neighbours(Remainder):
    """PruMerge's merge (arXiv 2403.15388): each survivor takes in its k nearest tokens, and one is the sum of the rest.

    With a_j the score of token j, which must not be negative (a negative one counts as 0), survivor i becomes
    x_i + sum over its neighbours j of a_j x_j. Neighbours are the k tokens with the highest cosine to i, survivors
    among them, by `memory["metric"]` if the method remembers it (PruMerge: the keys of a block) or else by the states;
    ties go to the earlier. So one token may go into several survivors. One more survivor is the sum over the whole
    rest of a_j x_j; it counts in the budget, and takes the place and the position of the best-scored token of the rest,
    as in `summary`. With keep=1 it is that sum over all tokens. No sum is divided, as in the authors' code.
    The report says that the rest went into that last token, which therefore has its size; what survivors take in
    besides moves neither positions nor sizes.
    Cost: O(V T D) cosines for T survivors in blocks, and k T D multiply-adds.

    Attributes:
        k: neighbours of a survivor, >= 1. The authors' 32.

    Raises:
        PlanError: if the knob is out of range.
    """

    name: ClassVar[str] = "neighbours"
    summary: ClassVar[str] = "added to the survivors around it by score, and summed up in one (arXiv 2403.15388)"

    k: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise PlanError(f"neighbours k must be an int >= 1, got {self.k!r}. The authors use 32.")

    @property
    def needs_scores(self) -> bool:
        """See `Remainder.needs_scores`."""
        return True

    def places(self, view: TokenView) -> Tensor:
        """[B] 1 where something leaves."""
        return Summary().places(view)

    def merge(self, view: TokenView, selected: Tensor, scores: Tensor | None) -> Merge:
        """See `Remainder.merge`."""
        weight = require_scores(scores, self.name).float().nan_to_num(nan=0.0).clamp(min=0.0)
        one = Summary().merge(view, selected, scores)
        rest = view.valid & ~selected
        metric = view.memory.get("metric", view.hidden)
        near, found = nearest_others(unit_states(metric, view.valid), selected, view.valid, self.k)
        taken = weight.gather(1, near.flatten(1)).view_as(near)
        # where nothing leaves nothing changes
        share = taken.where(found & rest.any(1)[:, None, None], 0.0)
        return Merge(one.kept, one.owner, weight.where(rest, 1.0), summed=True, near=near, share=share)
