"""The rest becomes one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import REMAINDERS, Merge, Remainder, own_index, require_scores, top_k_mask
from vtprune.views import TokenView

__all__ = ["Summary"]


@REMAINDERS.register("summary")
@dataclass(frozen=True)
class Summary(Remainder):
    """One of the survivors is the mean of everything that is not selected (the "package token" of EViT, 2202.07800).

    It counts among the survivors, so that `keep` stays what was asked, and takes the place and the position of the
    best-scored token of the rest, the first one of them if nobody scores. With keep=1 it is the mean of all tokens.

    Attributes:
        weights: "equal" counts every original token once; "score" weights the mean by the scores, which must not be
            negative (negative ones count as 0), as EViT does.

    Raises:
        PlanError: if the knob is out of range.
    """

    name: ClassVar[str] = "summary"
    summary: ClassVar[str] = "one survivor is the mean of the rest (arXiv 2202.07800)"

    weights: Literal["equal", "score"] = "equal"

    def __post_init__(self) -> None:
        if self.weights not in ("equal", "score"):
            raise PlanError(f"summary weights must be 'equal' or 'score', got {self.weights!r}.")

    @property
    def needs_scores(self) -> bool:
        """See `Remainder.needs_scores`."""
        return self.weights == "score"

    def places(self, view: TokenView) -> Tensor:
        """[B] 1 where something leaves."""
        return ((view.keep > 0) & (view.valid.sum(1) > view.keep)).to(view.keep)

    def merge(self, view: TokenView, selected: Tensor, scores: Tensor | None) -> Merge:
        """See `Remainder.merge`."""
        rest, own = view.valid & ~selected, own_index(selected)
        place = top_k_mask(-own.float() if scores is None else scores, self.places(view), rest)
        at = place.float().argmax(1, keepdim=True)
        owner = own.where(~rest | ~place.any(1, keepdim=True), at)
        weight = None
        if self.weights == "score":
            # survivors own nothing but themselves, so any weight but 0 will do for them
            weight = require_scores(scores, self.name).float().nan_to_num(nan=0.0).clamp(min=0.0).where(rest, 1.0)
            weight = weight.where(weight.masked_fill(~rest, 0.0).sum(1, keepdim=True) > 0, 1.0)
            weight = weight if view.size is None else weight * view.size
        return Merge(selected | place, owner, weight)
