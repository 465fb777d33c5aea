"""What methods share that choose among the finished features of a vision tower, before the projector.

They cut at `vision[k]`, k the block that the projector reads: nothing is saved in the tower, everything behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry, solve
from vtprune.contract import AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import UnsupportedModelError
from vtprune.kernels.attention_rows import attention_rows
from vtprune.plan import Plan, Site, Stage

__all__ = ["TowerEndScorer", "received_attention"]

# attention weights of one block of query rows, all heads
_BLOCK = 1 << 24


@dataclass(frozen=True)
class TowerEndScorer(Scorer):
    """Scores the features that the projector reads by what CLS attends to, and cuts between the two.

    A method adds its selection or remainder; `received_attention` says what stands for CLS in towers without one.
    """

    queries: ClassVar[Queries | None] = "cls"

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember what CLS attends to, `attention` [B, V]."""
        return {"attention": received_attention(view)}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] attention weight, fp32, in [0, 1]."""
        return view.memory["attention"]

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage between tower and projector. A fraction stays one, so that every image gives its share.

        Raises:
            BudgetError: if the budget is missing or out of reach.
            UnsupportedModelError: if the family opens no tower.
        """
        site = self.end_of(geometry)
        solved = solve(lambda n: Plan((Stage(site, self, n),)), geometry, budget, method=self.name)
        if isinstance(budget.value, int):
            return solved
        if budget.basis == "flops" or budget.value is None:
            return Plan((Stage(site, self, min(1.0, solved.stages[0].keep / max(1, geometry.visual_tokens))),))
        return Plan((Stage(site, self, budget.value),))

    def end_of(self, geometry: Geometry) -> Site:
        """Between tower and projector.

        Raises:
            UnsupportedModelError: if the family opens no tower.
        """
        if geometry.vision is None:
            raise UnsupportedModelError(
                f"{self.name} chooses among the features of the vision tower, which the family {geometry.family!r} "
                "does not open. Use a method that cuts later, such as divprune or fastv."
            )
        return Site("vision", geometry.vision.feature_block)


def received_attention(view: AttentionView, *, by_all: bool = False, impl: str = "auto") -> Tensor:
    """[B, V] fp32: the attention that CLS pays each patch, mean over heads; `impl` as in `attention_rows`.

    In a tower without CLS the mean over all its queries (what each patch receives), as VisionZip (arXiv 2412.04467) has
    it for such towers, and with `by_all` in every tower, CLS among the queries; [H, N, N] weights are made in blocks of
    rows and not kept.
    """
    if view.every_query is None or (view.has_cls and not by_all):
        rows = attention_rows(view.query, view.key, view.scaling, real=view.real, column=view.column, impl=impl)
        return rows[:, 0]
    batch, heads, length, _ = view.every_query.shape
    asking = torch.ones(batch, length, device=view.key.device) if view.real is None else view.real.float()
    total = torch.zeros(view.column.shape, device=view.key.device)
    size = max(1, _BLOCK // max(1, batch * heads * length))
    for start in range(0, length, size):
        part = view.every_query[:, :, start : start + size]
        rows = attention_rows(part, view.key, view.scaling, real=view.real, column=view.column, impl=impl)
        # queries at padding may hold anything
        weight = asking[:, start : start + size, None]
        total = total + (weight * rows.where(weight > 0, 0.0)).sum(1)
    return total / asking.sum(1, keepdim=True).clamp(min=1.0)
