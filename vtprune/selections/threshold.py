"""As many tokens as pass a threshold: the content decides how many stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import SELECTIONS, Selection, require_scores, top_k_mask
from vtprune.views import TokenView

__all__ = ["Threshold"]


@SELECTIONS.register("threshold")
@dataclass(frozen=True)
class Threshold(Selection):
    """Keeps what scores at least `at`; the stage's `keep` is the fewest that stay.

    Attributes:
        at: the threshold.
        unit: of `at`: "max" is a share of the sample's best score, "mass" keeps the fewest best tokens that hold this
            share of the sum of all scores (which must not be negative), "score" is the score itself.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "threshold"
    summary: ClassVar[str] = "as many as score above a threshold"
    adaptive: ClassVar[bool] = True

    at: float = 0.5
    unit: Literal["max", "mass", "score"] = "mass"

    def __post_init__(self) -> None:
        if self.unit not in ("max", "mass", "score"):
            raise PlanError(f"threshold unit must be 'max', 'mass' or 'score', got {self.unit!r}.")
        number = isinstance(self.at, (int, float)) and not isinstance(self.at, bool)
        if not number or (self.unit != "score" and not 0.0 < self.at <= 1.0):
            legal = "a number" if self.unit == "score" else f"a number in (0, 1] with unit={self.unit!r}"
            raise PlanError(f"threshold at must be {legal}, got {self.at!r}.")

    @property
    def needs_scores(self) -> bool:
        """See `Selection.needs_scores`."""
        return True

    def count(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """[B] tokens that pass."""
        score = (
            require_scores(scores, self.name)
            .float()
            .nan_to_num(nan=float("-inf"))
            .masked_fill(~view.valid, float("-inf"))
        )
        if self.unit == "mass":
            share = score.clamp(min=0.0).double().sort(dim=1, descending=True).values
            total = share.sum(1, keepdim=True)
            # a token stays if those before it do not hold the mass yet; all scores 0: nobody says who may go
            before = share.cumsum(1) - share
            missing = before < self.at * total * (1.0 - 1e-9)
            return torch.where(total[:, 0] > 0, (missing & (share > 0)).sum(1), view.valid.sum(1))
        least = self.at * score.amax(1, keepdim=True) if self.unit == "max" else self.at
        return ((score >= least) & view.valid).sum(1)

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """The `view.keep` best, which are those that pass."""
        return top_k_mask(require_scores(scores, self.name), view.keep, view.valid)
