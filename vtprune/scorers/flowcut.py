"""FlowCut: follow the information flow to the CLS token through the vision tower and cut in many small steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.budget import Budget, Geometry, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError, UnsupportedModelError
from vtprune.kernels.attention_rows import attention_rows
from vtprune.kernels.value_norms import ValueNorm, value_norms
from vtprune.plan import Plan, Site, Stage
from vtprune.scorers.flowcut_signals import (
    flowcut_drop_count,
    flowcut_score,
    flowcut_score_mean_query,
)
from vtprune.scorers.flowcut_text import FlowCutText

__all__ = ["FlowCut"]

# what the authors' code for towers without CLS adds inside the logarithm of the entropy
_LOG_EPSILON = 1e-7


# models of many tokens in the paper's sense: LLaVA-NeXT, Qwen2-VL and what followed them
_HIGH_TOKEN = ("llava_next", "llava_next_video", "llava_onevision", "qwen2_vl", "qwen3_vl")


@METHODS.register("flowcut")
@dataclass(frozen=True)
class FlowCut(Scorer):
    """Drops patches inside the vision tower, a few every second block and the rest at the last one before the features.

    Paper: FlowCut, arXiv 2505.19536. Each block scores its patches by the attention CLS pays them, by how
    close their value is to CLS's, and by the norm of their value (`flowcut_score`); the scores run along the blocks as
    C <- history C + (1 - history) score. How many go at an early cut follows from the entropy of the CLS attention
    (`flowcut_drop_count`); the last cut goes to the target exactly.
    Towers without CLS use the mean of the queries instead (`flowcut_score_mean_query`).
    Where images have many tokens (`text_cut`) the tower stops at `tower_factor` times the target, and a text-aware cut
    early in the decoder (`FlowCutText`) goes to the target.

    Where paper and code differ this follows the code unless a knob says "paper"; the drop is a count and not a ratio.
    Differs from the code: counts are taken per image and per crop, and not as the maximum over the batch (LLaVA-NeXT's
    crops are one batch there), so that no batch mate changes what is kept; where the steps would start at block 0,
    which has no history, that cut is left out; the last cut comes before the feature block also in towers whose last
    block is the feature block (the code cuts after it); patches of a padded batch never count; where a tower merges
    patches, whole merge cells leave and keep their true positions.
    Cost: two attention rows a block.

    Attributes:
        history: weight of the earlier blocks in the running score, in [0, 1].
        every: blocks from one cut to the next, counted back from the last cut.
        semantic: use the semantic term; None follows the code, which has it only with CLS. With True, a tower without
            CLS uses the mean value, always scaled by d ** -0.5.
        semantic_softmax: of CLS's value with the others: "code" has no scale and includes CLS, "paper" is scaled by
            d ** -0.5 and over patches only.
        value_norm: "head_mean" (the code's) or "all_heads" (the paper's), see `vtprune.kernels.value_norms`.
        text_cut: also cut in the decoder; None does so where the paper does, in LLaVA-NeXT and Qwen2-VL, and in the
            families that followed them (LLaVA-OneVision, Qwen2.5-VL, Qwen3-VL).
        tower_factor: what the tower keeps with the text cut, in units of the decoder's target; >= 1, the paper's is 2.
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
    semantic_softmax: Literal["code", "paper"] = "code"
    value_norm: ValueNorm = "head_mean"
    text_cut: bool | None = None
    tower_factor: float = 2.0
    remaining: int = dataclasses.field(default=0, metadata={"internal": True})

    def __post_init__(self) -> None:
        if not _is_number(self.history) or not 0.0 <= self.history <= 1.0:
            raise PlanError(f"flowcut history must be a number in [0, 1], got {self.history!r}. The paper uses 0.5.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise PlanError(f"flowcut every must be an int >= 1, got {self.every!r}. The paper uses 2.")
        for knob in ("semantic", "text_cut"):
            value = getattr(self, knob)
            if value is not None and not isinstance(value, bool):
                raise PlanError(f"flowcut {knob} must be True, False or None, got {value!r}.")
        if self.semantic_softmax not in ("code", "paper"):
            raise PlanError(f"flowcut semantic_softmax must be 'code' or 'paper', got {self.semantic_softmax!r}.")
        if self.value_norm not in ("head_mean", "all_heads"):
            raise PlanError(f"flowcut value_norm must be 'head_mean' or 'all_heads', got {self.value_norm!r}.")
        if not _is_number(self.tower_factor) or not 1.0 <= self.tower_factor < math.inf:
            raise PlanError(f"flowcut tower_factor must be a number >= 1, got {self.tower_factor!r}. The paper uses 2.")
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
            semantics = self._semantics(view)
        norm = value_norms(view.value, view.column, self.value_norm)
        if view.has_cls or semantics is not None:
            score = flowcut_score(attention, semantics, norm, view.valid)
        else:
            score = flowcut_score_mean_query(attention, norm, view.valid)
        before = memory.get("cumulative")
        if before is not None:
            score = self.history * before + (1.0 - self.history) * score
        return {"cumulative": score, "attention" if view.has_cls else "mean_attention": attention}

    def _semantics(self, view: AttentionView) -> Tensor:
        """[B, V] softmax of the products of each value with that of the query row, mean over heads."""
        if self.semantic_softmax == "paper":
            return attention_rows(view.query_value, view.visual(view.value), view.scaling, real=view.valid)[:, 0]
        scaling = 1.0 if view.has_cls else view.scaling
        return attention_rows(view.query_value, view.value, scaling, real=view.real, column=view.column)[:, 0]

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
        """Adaptive cuts every `every` blocks, one to the tower's target before the feature block, and the text cut.

        A fraction stays a fraction in the stages, so that every image of a prompt gives up the same share. With the
        text cut the target T solves the budget: the layers before it see `tower_factor` T, the others T.

        Raises:
            BudgetError: if the budget is missing or out of reach.
            PlanError: if the decoder has no layer for the text cut.
            UnsupportedModelError: if the family gives no access to a vision tower with a block to cut after.
        """
        tower = geometry.vision
        if tower is None or tower.feature_block < 1:
            raise UnsupportedModelError(
                f"flowcut cuts inside the vision tower, and the family {geometry.family!r} offers no tower block "
                "before its features. Use a method that cuts later, such as divprune or fastv."
            )
        last = tower.feature_block - 1
        text_cut = geometry.family in _HIGH_TOKEN if self.text_cut is None else self.text_cut
        factor = self.tower_factor if text_cut else 1.0
        text = FlowCutText(value_norm=self.value_norm)

        def build(keep: int | float) -> Plan:
            first = _times(factor, keep, geometry.visual_tokens)
            stages = [
                Stage(Site("vision", last - left), dataclasses.replace(self, remaining=left), first, adaptive=left > 0)
                for left in range(0, last + 1, self.every)
                if left == 0 or left < last
            ]
            return Plan((*reversed(stages), *([text.stage(geometry, keep)] if text_cut else [])))

        solved = solve(build, geometry, budget, method=self.name)
        if isinstance(budget.value, int):
            return solved
        target = solved.stages[-1]
        if budget.basis == "flops" or budget.value is None:
            return build(target.keep / max(1, geometry.visual_tokens))
        if budget.basis == "final" or not text_cut:
            return build(budget.value)
        return build(_final_share(budget.value, factor, target.site.index, geometry))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _times(factor: float, keep: int | float, total: int) -> int | float:
    """`keep` times `factor`, at most everything: 1.0, or `total` tokens. A count is rounded half up."""
    if isinstance(keep, float):
        return min(1.0, factor * keep)
    return max(keep, min(total, math.floor(factor * keep + 0.5)))


def _final_share(average: float, factor: float, layer: int, geometry: Geometry) -> float:
    """The share f of the text cut with which the decoder layers see `average` of the visual tokens in the mean.

    Layers before `layer` see min(1, factor f), the others f, and none more than enters it (`geometry.entering`).
    """
    share = [n / max(1, geometry.visual_tokens) for n in geometry.entering]

    def seen(f: float) -> float:
        first = min(1.0, factor * f)
        return sum(min(n, first if k < layer else f) for k, n in enumerate(share)) / len(share)

    low, high = 0.0, 1.0
    for _ in range(60):  # bisection: `seen` does not fall
        middle = (low + high) / 2
        low, high = (middle, high) if seen(middle) < average else (low, middle)
    return high
