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

__all__ = ["TowerEndScorer", "received_attention", "summed_attention"]

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
    total = summed_attention(view, view.every_query, view.real, impl=impl)
    if view.real is None:
        return total / max(1, view.every_query.shape[2])
    return total / view.real.sum(1, keepdim=True).clamp(min=1)


def summed_attention(view: AttentionView, query: Tensor, asking: Tensor | None, *, impl: str = "auto") -> Tensor:
    """[B, V] fp32: the attention that each visual token receives, mean over heads and summed over query rows.

    [H, R, N] weights are made in blocks of rows and not kept.

    Args:
        view: of the block; `real` as it is there, one row for all queries or one for each.
        query: [B, H, R, d] the rows that ask.
        asking: [B, R] False at padding, which may hold anything; None if there is none.
        impl: as in `attention_rows`.
    """
    batch, heads, length, _ = query.shape
    total = torch.zeros(view.column.shape, device=view.key.device)
    size = max(1, _BLOCK // max(1, batch * heads * view.key.shape[2]))
    for start in range(0, length, size):
        part = slice(start, start + size)
        real = view.real if view.real is None or view.real.dim() == 2 else view.real[:, part]
        rows = attention_rows(
            query[:, :, part],
            view.key,
            view.scaling,
            softcap=view.softcap,
            real=real,
            column=view.column,
            impl=impl,
        )
        total = total + (rows if asking is None else rows.where(asking[:, part, None], 0.0)).sum(1)
    return total
