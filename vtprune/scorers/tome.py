"""ToMe: look-alikes among alternating tokens merge, a few in every block of the vision tower."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.budget import Budget, Geometry, solve
from vtprune.contract import METHODS, AttentionView, Memory, Queries, Scorer, TokenView
from vtprune.errors import PlanError, UnsupportedModelError
from vtprune.kernels.merge_tokens import merge_tokens
from vtprune.plan import Plan, Site, Stage
from vtprune.rules import Merge, own_index, top_k_mask
from vtprune.similarity import cosine_distance, nearest_target, unit_states

__all__ = ["ToMe", "match_pairs"]


@METHODS.register("tome")
@dataclass(frozen=True)
class ToMe(Scorer):
    """Merges the most similar pairs in every block of the vision tower; or, `where="end"`, all at once behind it.

    Paper: ToMe, arXiv 2210.09461. A token is described by its key of the block, mean over heads. Tokens are dealt in
    turn to two sets; each of the first links to the one of the second with the highest cosine, and the r strongest
    links merge by the mean weighted by how many patches a token stands for. From then on attention is proportional:
    softmax(q K^T / sqrt(d) + log s), s the patches that each key stands for. CLS never merges.
    Schedule: the paper takes the same r everywhere. Here the counts fall on a straight line, rounded, from all patches
    to the budget at the block that the projector reads, so that any budget is met exactly; where halves would not
    suffice, earlier blocks take more. Only blocks up to that one count (23 of 24 in LLaVA-1.5: r = 17, 20 and 22 leave
    185, 116 and 70 of 576).
    `where="end"` cuts once between tower and projector and repeats the matching until the budget is reached, at most
    halving each time; from the second round on a merged token is described by the weighted mean of its keys.
    Differs from the paper: a block merges behind its MLP and not between attention and MLP, because that is where this
    engine cuts in all towers alike, so that a block's MLP sees the tokens before the merge; a merged token keeps the
    place of the token it merged into and tokens stay in order (the authors' code puts what did not merge first, which
    deals the next block's tokens otherwise); the 2nd, 4th, ... patch links to the 1st, 3rd, ..., which is the paper's
    deal where CLS stands in front; where keys turn with their place (rotary towers) they are compared as they are.
    Where a tower merges patches into cells, whole cells merge: a cell is described by the mean of its patches' keys,
    each of its patches merges with its like, and each weighs as many keys as cells were merged.
    Positions: those of the tokens that are merged into.
    Cost: V^2 d / 2 a block and round. Proportional attention needs the `sdpa` or `eager` backend, for its mask.

    Attributes:
        where: "tower" merges behind every block, "end" behind the last one alone.
        proportional: later blocks of the tower weigh keys by their patches. The paper's True.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "tome"
    summary: ClassVar[str] = "look-alikes merge in every block of the vision tower (arXiv 2210.09461)"
    queries: ClassVar[Queries | None] = "cls"
    merges: ClassVar[bool] = True

    where: Literal["tower", "end"] = "tower"
    proportional: bool = True

    def __post_init__(self) -> None:
        if self.where not in ("tower", "end"):
            raise PlanError(f"tome where must be 'tower' or 'end', got {self.where!r}.")
        if not isinstance(self.proportional, bool):
            raise PlanError(f"tome proportional must be True or False, got {self.proportional!r}.")

    @property
    def weighs_sizes(self) -> bool:
        """See `Scorer.weighs_sizes`."""
        return self.proportional and self.where == "tower"

    def observe(self, view: AttentionView, memory: Memory) -> Memory:
        """Remember the block's keys, mean over heads, `metric` [B, V, d]."""
        metric = view.visual(view.key).float().mean(1)
        return {"metric": metric.masked_fill(~view.valid[..., None], 0.0)}

    def merge(self, view: TokenView) -> Merge:
        """See `Scorer.merge`."""
        return Merge(*match_pairs(view.memory["metric"], view.valid, view.keep, view.size))

    def select(self, view: TokenView) -> Tensor:
        """See `Scorer.select`."""
        return self.merge(view).kept

    def assign(self, view: TokenView, kept: Tensor) -> Tensor:
        """See `Scorer.assign`."""
        return self.merge(view).owner

    def plan(self, geometry: Geometry, budget: Budget) -> Plan:
        """A stage behind each block up to the one that the projector reads. A fraction stays one.

        Raises:
            BudgetError: if the budget is missing or out of reach.
            UnsupportedModelError: if the family opens no tower.
        """
        if geometry.vision is None:
            raise UnsupportedModelError(
                f"tome merges tokens of the vision tower, which the family {geometry.family!r} does not open. Use a "
                "method that cuts later, such as divprune/nearest or pool."
            )
        last, total = geometry.vision.feature_block, max(1, geometry.visual_tokens)
        blocks = range(last, last + 1) if self.where == "end" else range(last + 1)

        def build(keep: int | float) -> Plan:
            shares = [
                min(1.0, share) for share in _line(keep if isinstance(keep, float) else keep / total, len(blocks))
            ]
            counts = shares if isinstance(keep, float) else [max(keep, math.floor(s * total + 0.5)) for s in shares]
            # the last count is what was asked, and not a sum that comes near it
            counts = [*counts[:-1], keep]
            return Plan(tuple(Stage(Site("vision", k), self, n) for k, n in zip(blocks, counts, strict=True)))

        solved = solve(build, geometry, budget, method=self.name)
        if isinstance(budget.value, int):
            return solved
        if budget.basis == "flops" or budget.value is None:
            return build(min(1.0, solved.stages[-1].keep / total))
        return build(budget.value)


def _line(last: float, steps: int) -> list[float]:
    """Shares behind each of `steps` cuts: even ones, but never more than twice the next."""
    return [min(1.0 - (1.0 - last) * (i + 1) / steps, last * 2.0 ** (steps - 1 - i)) for i in range(steps)]


def match_pairs(metric: Tensor, valid: Tensor, keep: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bipartite matching, in rounds that take at most half of the tokens.

    In each round the 2nd, 4th, ... token that is left links to the most similar (highest cosine) of the 1st, 3rd, ...;
    the strongest links merge, as many as must leave. Ties of links go to the earlier partner; of equally strong ones
    the later token leaves. Tokens that took in others are described by the mean weighted by `size` in the next round.
    Cost: O(V^2 d / 2) in the first round and a quarter of that in each further one, in blocks.

    Args:
        metric: [B, V, d] what describes a token.
        valid: [B, V].
        keep: [B] tokens that stay.
        size: [B, V] how many original tokens each stands for, or None for one.

    Returns:
        [B, V] bool the tokens that stay, and [B, V] int64 index on the V axis of the one that each merged into.
    """
    own = own_index(valid)
    kept, owner, now = valid.clone(), own.clone(), metric
    left = valid.sum(1).tolist()
    goal = [min(k, n) for k, n in zip(keep.tolist(), left, strict=True)]
    while left != goal:
        # one token has no partner
        leave = [min(n - g, n // 2) for n, g in zip(left, goal, strict=True)]
        odd = (kept.cumsum(1) - 1) % 2 == 1
        links, partners = kept & odd, kept & ~odd
        states = unit_states(now, valid)
        partner = nearest_target(states, partners)
        other = states.gather(1, partner[..., None].expand_as(states))
        stay = links.sum(1) - torch.tensor(leave, device=valid.device)
        going = links & ~top_k_mask(cosine_distance((states * other).sum(2)), stay, links)
        # what had merged into a token that goes now follows it
        owner = own.where(~going, partner).gather(1, owner)
        kept = kept & ~going
        left = [n - r for n, r in zip(left, leave, strict=True)]
        if left != goal:
            now = merge_tokens(metric, owner, valid, size)
    return kept, owner
