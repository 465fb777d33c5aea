"""VisPruner: important patches by CLS attention, and diverse ones of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.contract import METHODS
from vtprune.scorers.tower_end import TowerEndScorer
from vtprune.selections.pairs import Pairs

__all__ = ["VisPruner"]


@METHODS.register("vispruner")
@dataclass(frozen=True)
class VisPruner(TowerEndScorer):
    """Half of the budget by CLS attention, half by removing look-alikes; on the features before the projector.

    Paper: VisPruner, arXiv 2412.01818 (second version of FasterVLM). floor(important T) patches by the attention of CLS
    in the block that the projector reads, mean over heads; of the others the most redundant leave, a few at a time, by
    the cosine of their features (`vtprune.selections.pairs`). Reads no text.
    Differs from the authors' code: it fails for odd numbers of patches, which are served here; what is left stays in
    raster order between rounds. Towers without CLS: the attention that a patch receives (`received_attention`).
    Positions: survivors keep theirs; the code for LLaVA-1.5 closes the gaps up.
    Cost: one attention row, and (V / 2)^2 D multiply-adds for each of about V / 8 rounds, smaller each time.

    Attributes:
        important: share of the survivors that attention chooses, in [0, 1]. The paper's 0.5.
        at_once: most patches that leave in a round. The authors' 8.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "vispruner"
    summary: ClassVar[str] = "CLS attention for half, removal of look-alikes for the rest (arXiv 2412.01818)"

    important: float = 0.5
    at_once: int = 8

    def __post_init__(self) -> None:
        _ = self.selection

    @property
    def selection(self) -> Pairs:
        """The set that is made of the attention."""
        return Pairs(self.important, self.at_once)
