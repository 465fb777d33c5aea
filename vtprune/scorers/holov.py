"""HoloV: CLS attention with a quota for every part of the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.contract import METHODS
from vtprune.scorers.tower_end import TowerEndScorer
from vtprune.selections.crops import Crops

__all__ = ["HoloV"]


@METHODS.register("holov")
@dataclass(frozen=True)
class HoloV(TowerEndScorer):
    """Deals the budget to runs of the picture by attention and variety, and keeps the most attended of each run.

    Paper: HoloV, "Don't Just Chase Highlighted Tokens in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS
    2025. The attention of CLS in the block that the projector reads, mean over heads, and the features before the
    projector go into `vtprune.selections.crops`, which has the rule. Reads no text.
    As in the authors' code the tokens of a run are ranked by attention, and not by the score that deals the quotas.
    Differs from it: a quota above a run's size is dealt again, where the code pads with zero vectors; what is left over
    after rounding goes to the heaviest runs, one each. Towers without CLS: the attention that a patch receives.
    Positions: survivors keep theirs.
    Cost: one attention row, and V^2 D / crops multiply-adds.

    Attributes:
        crops: runs of the picture. The authors' 16.
        balance: weight of variety in the quotas. The authors' 0.09.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "holov"
    summary: ClassVar[str] = "CLS attention with quotas for runs of the picture (HoloV, NeurIPS 2025)"

    crops: int = 16
    balance: float = 0.09

    def __post_init__(self) -> None:
        _ = self.selection

    @property
    def selection(self) -> Crops:
        """The set that is made of the attention."""
        return Crops(self.crops, self.balance)
