"""FlowCut: follow the information flow to the CLS token through the vision tower and cut in many small steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError, UnsupportedModelError
from vtprune.kernels.attention_rows import attention_rows
from vtprune.plan import Plan, Site, Stage

__all__ = ["FlowCut", "flowcut_drop_count", "flowcut_score", "flowcut_score_mean_query"]

# what the authors' code for towers without CLS adds inside the logarithm of the entropy
_LOG_EPSILON = 1e-7


def flowcut_score(
    cls_attention: Tensor, semantic_attention: Tensor | None, value: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Importance of each patch in one block: (a_j / sum a + s_j / sum s) * ||v_j||_1.

    Args:
        cls_attention: [B, V] attention a of the CLS row to the patches, mean over heads.
        semantic_attention: [B, V] softmax s of value-value products with CLS, mean over heads; None leaves it out.
        value: [B, V, d] values v, averaged over the heads first (so signs may cancel, as in the authors' code).
        valid: [B, V] patches that count; None is all.

    Returns:
        [B, V] fp32, higher is kept; 0 where not valid.
    """
    share = _shares(cls_attention, valid)
    if semantic_attention is not None:
        share = share + _shares(semantic_attention, valid)
    return flowcut_score_mean_query(share, value, valid)


def flowcut_score_mean_query(attention: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
    """The same for a tower without CLS: A_j * ||v_j||_1, A the attention of the mean query.

    Args:
        attention: [B, V].
        value: [B, V, d] averaged over the heads first.
        valid: [B, V] patches that count; None is all.

    Returns:
        [B, V] fp32, higher is kept; 0 where not valid.
    """
    score = attention.float() * value.float().abs().sum(-1)
    return score if valid is None else score.masked_fill(~valid, 0.0)


def flowcut_drop_count(
    attention: Tensor, remaining: int, target: Tensor | int, valid: Tensor | None = None, *, epsilon: float = 0.0
) -> Tensor:
    """How many patches to drop now: round((N - T) / sqrt(L) * (1 - e^2)), e the relative entropy of the attention.

    e = H / ln N is near 1 while the attention is spread out (early blocks: drop little) and falls as it concentrates.

    Args:
        attention: [B, V] attention to the patches, normalised here.
        remaining: L >= 1, blocks between this one and the last cut.
        target: T, patches that must be left in the end, an int or [B].
        valid: [B, V] patches that count, N of them a row; None is all.
        epsilon: added inside the logarithm.

    Returns:
        [B] int64 count P >= 0 (round half to even; 0 where N < 2). N - P may fall below T: the caller holds it there.
    """
    share = _shares(attention, valid)
    patches = torch.full_like(share[:, 0], share.shape[1]) if valid is None else valid.sum(1).float()
    # xlogy gives 0 ln 0 = 0, so that padding and patches without attention add nothing
    entropy = -torch.xlogy(share, share + epsilon).sum(1)
    relative = entropy / patches.clamp(min=2.0).log()
    drop = (patches - target) / math.sqrt(remaining) * (1.0 - relative.square())
    return drop.round().clamp(min=0.0).masked_fill(patches < 2, 0.0).long()


def _shares(weights: Tensor, valid: Tensor | None) -> Tensor:
    """[B, V] fp32 `weights` scaled to sum to 1 over the valid patches, 0 elsewhere; all 0 if their sum is 0."""
    weights = weights.float() if valid is None else weights.float().masked_fill(~valid, 0.0)
    total = weights.sum(1, keepdim=True)
    return weights / total.where(total > 0, 1.0)


@METHODS.register("flowcut")
@dataclass(frozen=True)
class FlowCut(Scorer):
    """Drops patches inside the vision tower, a few every second block and the rest at the last one before the features.

    Paper: FlowCut, arXiv 2505.19536. Each block scores its patches by the attention CLS pays them, by how
    close their value is to CLS's, and by the norm of their value (`flowcut_score`); the scores run along the blocks as
    C <- history C + (1 - history) score. How many go at an early cut follows from the entropy of the CLS attention
    (`flowcut_drop_count`); the last cut goes to the budget exactly, so every decoder layer sees the budget.
    Towers without CLS use the mean of the queries instead (`flowcut_score_mean_query`).

    Where paper and code differ this follows the code: the semantic softmax is not scaled and includes CLS, values are
    averaged over heads before their norm, the drop is a count and not a ratio.
    Differs from the code: counts are taken per image and not as the maximum over the batch; where the steps would start
    at block 0, which has no history, that cut is left out; the last cut comes before the feature block also in towers
    whose last block is the feature block (the code cuts after it); there is no second cut inside the decoder (compose
    with another method); patches of a padded batch never count.
    Cost: two attention rows a block.

    Attributes:
        history: weight of the earlier blocks in the running score, in [0, 1].
        every: blocks from one cut to the next, counted back from the last cut.
        semantic: use the semantic term; None follows the code, which has it only with CLS. With True, a tower without
            CLS uses the mean value, scaled by d ** -0.5 as the paper writes.
        remaining: blocks between this stage's cut and the last one. `plan` sets it; leave it alone.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "flowcut"
    summary: ClassVar[str] = "CLS attention, semantics and value norm along the vision tower (arXiv 2505.19536)"
    queries: ClassVar[Queries | None] = "cls"
    accumulates: ClassVar[bool] = True

    history: float = 0.5
    every: int = 2
    semantic: bool | None = None
    remaining: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.history, (int, float)) and not isinstance(self.history, bool)
        if not number or not 0.0 <= self.history <= 1.0:
            raise PlanError(f"flowcut history must be a number in [0, 1], got {self.history!r}. The paper uses 0.5.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise PlanError(f"flowcut every must be an int >= 1, got {self.every!r}. The paper uses 2.")
        if self.semantic is not None and not isinstance(self.semantic, bool):
            raise PlanError(f"flowcut semantic must be True, False or None, got {self.semantic!r}.")
        if isinstance(self.remaining, bool) or not isinstance(self.remaining, int) or self.remaining < 0:
            raise PlanError(f"flowcut remaining must be an int >= 0, got {self.remaining!r}. Leave it to the plan.")

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Fold one block into the running score.

        Returns:
            `cumulative`, the running score, and this block's attention to the patches, as `attention` in a tower with
            CLS and as `mean_attention` in one without (their entropies differ); each [B, V].
        """
        attention = attention_rows(view.query, view.key, view.scaling, real=view.real, column=view.column)[:, 0]
        semantics = None
        if self.semantic or (self.semantic is None and view.has_cls):
            scaling = 1.0 if view.has_cls else view.scaling
            rows = attention_rows(view.query_value, view.value, scaling, real=view.real, column=view.column)
            semantics = rows[:, 0]
        mean = view.value.mean(1, dtype=torch.float32)
        value = mean.gather(1, view.column[:, :, None].expand(-1, -1, mean.shape[2]))
        if view.has_cls or semantics is not None:
            score = flowcut_score(attention, semantics, value, view.valid)
        else:
            score = flowcut_score_mean_query(attention, value, view.valid)
        before = memory.get("cumulative")
        if before is not None:
            score = self.history * before + (1.0 - self.history) * score
        return {"cumulative": score, "attention" if view.has_cls else "mean_attention": attention}

    def score(self, view: TokenView) -> Tensor:
        """[B, V] running score, fp32, not negative."""
        return view.memory["cumulative"]

    def count(self, view: TokenView) -> Tensor:
        """[B] patches that stay: N - P, never below the target; the target itself at the last cut."""
        patches = view.valid.sum(1)
        if self.remaining == 0:
            return view.keep.minimum(patches)
        cls_attention = view.memory.get("attention")
        if cls_attention is None:
            drop = flowcut_drop_count(
                view.memory["mean_attention"], self.remaining, view.keep, view.valid, epsilon=_LOG_EPSILON
            )
        else:
            drop = flowcut_drop_count(cls_attention, self.remaining, view.keep, view.valid)
        return (patches - drop).maximum(view.keep).minimum(patches)

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """Adaptive cuts every `every` blocks, then one to the budget just before the feature block.

        A fraction stays a fraction in the stages, so that every image of a prompt gives up the same share.

        Raises:
            BudgetError: if the budget is missing or out of reach.
            UnsupportedModelError: if the family gives no access to a vision tower with a block to cut after.
        """
        tower = geometry.vision
        if tower is None or tower.feature_block < 1:
            raise UnsupportedModelError(
                f"flowcut cuts inside the vision tower, and the family {geometry.family!r} offers no tower block "
                "before its features. Use a method that cuts later, such as divprune or fastv."
            )
        last = tower.feature_block - 1

        def build(keep: int | float) -> Plan:
            stages = [
                Stage(Site("vision", last - left), dataclasses.replace(self, remaining=left), keep, adaptive=left > 0)
                for left in range(0, last + 1, self.every)
                if left == 0 or left < last
            ]
            return Plan(tuple(reversed(stages)))

        solved = solve(build, geometry, budget, method=self.name)
        if isinstance(budget.value, int):
            return solved
        if budget.basis != "flops" and budget.value is not None:
            return build(budget.value)
        return build(solved.stages[-1].keep / max(1, geometry.visual_tokens))
