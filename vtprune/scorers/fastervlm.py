"""FasterVLM: what CLS attends to at the end of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.plan import Plan, Stage
from vtprune.scorers.tower_end import received_attention, solve_at_tower_end

__all__ = ["FasterVLM"]


@METHODS.register("fastervlm")
@dataclass(frozen=True)
class FasterVLM(Scorer):
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
    queries: ClassVar[Queries | None] = "cls"

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember what CLS attends to, `attention` [B, V]."""
        return {"attention": received_attention(view)}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] attention weight, fp32, in [0, 1]."""
        return view.memory["attention"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage between tower and projector.

        Raises:
            BudgetError: if the budget is missing or out of reach.
            UnsupportedModelError: if the family opens no tower.
        """
        return solve_at_tower_end(lambda site, keep: Stage(site, self, keep), geometry, budget, self.name)
