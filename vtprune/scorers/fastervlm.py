"""FasterVLM: what CLS attends to at the end of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.contract import METHODS
from vtprune.scorers.tower_end import TowerEndScorer

__all__ = ["FasterVLM"]


@METHODS.register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(TowerEndScorer):
    """Keeps the patches that CLS attends to most in the block whose output the projector reads; before the projector.

    Paper: FasterVLM, arXiv 2412.01818 (its first version; the second is VisPruner). score_j = mean over heads of
    softmax(q_CLS K^T / sqrt(d))_j, CLS among the keys. Reads no text.
    Towers without CLS, which the paper does not treat: the attention that a patch receives from all others
    (`received_attention`).
    Positions: survivors keep theirs. The authors' code for LLaVA-1.5 closes the gaps up; a stage behind it with
    positions="compact" does so.
    Cost: one attention row.
    """

    name: ClassVar[str] = "fastervlm"
    summary: ClassVar[str] = "CLS attention at the end of the vision tower (arXiv 2412.01818)"
