"""PruMerge: patches that stand out in the attention of CLS, what is around them, and one token for the rest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry
from vtprune.contract import METHODS, AttentionView, Memory, TokenView
from vtprune.plan import Plan, Stage
from vtprune.remainders.neighbours import Neighbours
from vtprune.rules import top_k_mask
from vtprune.scorers.tower_end import TowerEndScorer, received_attention

__all__ = ["PruMerge", "PruMergePlus", "outliers", "single_head"]

# relative distance from the fence within which rounding could decide
_MARGIN = 1e-5


def single_head(view: AttentionView) -> AttentionView:
    """The view with its heads side by side as one: logits are products of whole queries and keys over sqrt(H d)."""
    heads = view.query.shape[1]
    key = view.key.repeat_interleave(heads // view.key.shape[1], 1)

    def joined(states: Tensor) -> Tensor:
        return states.transpose(1, 2).flatten(2)[:, None]

    every = None if view.every_query is None else joined(view.every_query)
    return dataclasses.replace(
        view, query=joined(view.query), key=joined(key), every_query=every, scaling=view.scaling * heads**-0.5
    )


def outliers(scores: Tensor, valid: Tensor) -> Tensor:
    """[B] how many of the valid scores lie above Q3 + 1.5 (Q3 - Q1); quartiles are interpolated between scores.

    Args:
        scores: [B, V].
        valid: [B, V].
    """
    if not scores.shape[1]:
        return valid.sum(1)
    ranked = scores.double().masked_fill(~valid, float("inf")).sort(dim=1).values
    last = (valid.sum(1, keepdim=True) - 1).clamp(min=0)

    def quantile(share: float) -> Tensor:
        place = share * last
        low = place.floor().long()
        below, above = ranked.gather(1, low), ranked.gather(1, (low + 1).minimum(last))
        return below + (place - low) * (above - below)

    first, third = quantile(0.25), quantile(0.75)
    fence = third + 1.5 * (third - first)
    return ((scores > fence + _MARGIN * fence.abs()) & valid).sum(1)


@METHODS.register("prumerge")
@dataclass(frozen=True)
class PruMerge(TowerEndScorer):
    """Keeps the patches that stand out in CLS's attention, merges the others into them, and sums up the rest in one.

    Paper: LLaVA-PruMerge, arXiv 2403.15388. Site: between tower and projector. Needs queries and keys of the block that
    the projector reads. Scores: a = softmax(q_CLS K^T / sqrt(C)) with queries and keys of full width C, that is one
    head. Without a budget it decides by itself, image by image (crop by crop): as many patches as lie above
    Q3 + 1.5 (Q3 - Q1) of the image's scores (`outliers`), and one token for the rest; only that one where nothing
    stands out. Then `vtprune.remainders.neighbours`: a survivor adds a-weighted its 32 nearest patches by keys, and one
    token is the a-weighted sum of all that do not survive. Neither sum is divided: the code's rule; the paper writes of
    a weighted average. Reads no text.
    With a budget of T it keeps the T - 1 best and the sum of the rest, whatever stands out.
    Differs from the code: attention and keys come from the block whose output the projector reads, where the code takes
    the block behind it (23, while LLaVA reads 22), which other towers do not have; counts are taken image by image,
    where the code takes one for a batch; tokens keep their order and positions, the sum takes the place of the best of
    the rest, where the code orders by attention, puts the sum last and closes the gaps up. A patch within 1e-5 of the
    fence is not an outlier, so that rounding decides nothing on an even picture.
    Towers without CLS: what a patch receives from all queries, on average; towers that merge patches: their mean.
    Cost: one attention row, and V x T cosines of keys in blocks.

    Attributes:
        neighbours: patches that a survivor takes in, >= 1. The authors' 32.

    Raises:
        PlanError: if the knob is out of range.
    """

    name: ClassVar[str] = "prumerge"
    summary: ClassVar[str] = "outliers of CLS attention with their neighbours, the rest summed up (arXiv 2403.15388)"
    adaptive: ClassVar[bool] = True

    neighbours: int = 32

    def __post_init__(self) -> None:
        _ = self.remainder

    @property
    def remainder(self) -> Neighbours:
        """What becomes of patches that do not stand out."""
        return Neighbours(self.neighbours)

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember `attention` [B, V], and the keys of all heads side by side, `metric` [B, V, C]."""
        # one head of this width does not fit the tiles of the fast kernel
        attention = received_attention(single_head(view), impl="torch")
        metric = view.visual(view.key).float().transpose(1, 2).flatten(2)
        return {"attention": attention, "metric": metric.masked_fill(~view.valid[..., None], 0.0)}

    def count(self, view: TokenView) -> Tensor:
        """[B] the outliers and the sum of the rest."""
        return outliers(self.score(view), view.valid) + 1

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """One stage between tower and projector; without a budget it is adaptive.

        Raises:
            BudgetError: if the budget is out of reach.
            UnsupportedModelError: if the family opens no tower.
        """
        if budget.value is not None:
            return super().plan(geometry, budget)
        # the fewest: one token of each image, whatever its size
        return Plan((Stage(self.end_of(geometry), self, min(0.5, 1 / max(1, geometry.visual_tokens)), adaptive=True),))


@METHODS.register("prumerge-plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge that also keeps patches at an even stride.

    Paper: PruMerge+ of arXiv 2403.15388; everything not said here is as in `PruMerge`. Without a budget: with n
    outliers (1 if there are none) of V patches it also keeps those at 0, s, 2s, ... up to the last but one, in raster
    order, s = floor(floor(V / n) / 3), at least 1: about three more for each outlier. The paper finds about 5.5 % of
    outliers in CLIP; where more than a sixth of the patches stand out, s is 1 and everything stays.
    With a budget of T, one of which is the sum: half of the others (rounded up) by attention, and the rest at an even
    stride among the patches that are left, as the code does where its ratio is fixed. A budget that happens to be
    what it would keep by itself keeps just that.

    Attributes:
        neighbours: patches that a survivor takes in, >= 1. The authors' 32.

    Raises:
        PlanError: if the knob is out of range.
    """

    name: ClassVar[str] = "prumerge-plus"
    summary: ClassVar[str] = "prumerge with patches at an even stride beside the outliers (arXiv 2403.15388)"

    def count(self, view: TokenView) -> Tensor:
        """[B] outliers, samples, and the sum of the rest."""
        return self._own(view).sum(1) + 1

    def select(self, view: TokenView) -> Tensor:
        """See `Scorer.select`."""
        valid, keep = view.valid, view.keep.minimum(view.valid.sum(1))
        best = top_k_mask(self.score(view), (keep + 1) // 2, valid)
        rest = valid & ~best
        found = best | _evenly(rest, keep // 2)
        own = self._own(view)
        return torch.where((own.sum(1) == keep)[:, None], own, found)

    def _own(self, view: TokenView) -> Tensor:
        """[B, V] outliers and samples."""
        attention, number = self.score(view), view.valid.sum(1, keepdim=True)
        standing = outliers(attention, view.valid)
        stride = (number // standing[:, None].clamp(min=1) // 3).clamp(min=1)
        place = view.valid.cumsum(1) - 1
        sampled = (place % stride == 0) & (place < number - 1) & view.valid
        return top_k_mask(attention, standing, view.valid) | sampled


def _evenly(marks: Tensor, number: Tensor) -> Tensor:
    """[B, V] `number` [B] of the marked tokens, no more than there are, the i-th at (i + 1/2) / number of them."""
    there = marks.sum(1, keepdim=True)
    wanted = number[:, None]

    def before(place: Tensor) -> Tensor:
        # how many lie before the place-th mark: those i with (2 i + 1) there < 2 wanted place
        above = 2 * wanted * place - there
        return (-(-above // (2 * there.clamp(min=1)))).clamp(min=0).minimum(wanted)

    place = marks.cumsum(1) - 1
    return marks & (before(place + 1) > before(place))
