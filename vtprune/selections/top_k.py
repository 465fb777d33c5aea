"""The best by score: what every method does that says nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.rules import SELECTIONS, Selection, require_scores, top_k_mask
from vtprune.views import TokenView

__all__ = ["TopK"]


@SELECTIONS.register("topk")
@dataclass(frozen=True)
class TopK(Selection):
    """The tokens with the highest scores; equal scores go to the earlier token."""

    name: ClassVar[str] = "topk"
    summary: ClassVar[str] = "the highest scores"

    @property
    def needs_scores(self) -> bool:
        """See `Selection.needs_scores`."""
        return True

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        return top_k_mask(require_scores(scores, self.name), view.keep, view.valid)
