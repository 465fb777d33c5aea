"""SCOPE: what CLS attends to and what covers the rest of the picture, in one greedy set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.contract import METHODS
from vtprune.scorers.tower_end import TowerEndScorer
from vtprune.selections.coverage import Coverage

__all__ = ["SCOPE"]


@METHODS.register("scope")
@dataclass(frozen=True)
class SCOPE(TowerEndScorer):
    """Chooses patches one by one, each for what it covers that is not covered yet, times what CLS pays it of attention.

    Paper: SCOPE, arXiv 2510.24214, NeurIPS 2025. Site: between tower and projector, on the features that enter the
    projector; the attention is that of the block that it reads, mean over heads. `vtprune.selections.coverage` has the
    rule. Reads no text. This follows the paper alone (the authors' repository names no licence).
    Coverage starts from 0, so that features at more than a right angle cover nothing of each other; ties go to the
    earlier patch.
    Towers without CLS, of which the paper says nothing: the attention that a patch receives. Positions: survivors keep
    theirs.
    Cost: one attention row, and the V^2 cosines of an image.

    Attributes:
        alpha: exponent of the attention, not negative; 0 is coverage alone. The paper's 1.

    Raises:
        PlanError: if the knob is out of range.
    """

    name: ClassVar[str] = "scope"
    summary: ClassVar[str] = "CLS attention times the coverage that a patch adds, greedily (arXiv 2510.24214)"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _ = self.selection

    @property
    def selection(self) -> Coverage:
        """The set that is made of the attention."""
        return Coverage(self.alpha)
