"""Greedy MAP of a determinantal point process: tokens that score high and are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import SELECTIONS, Selection
from vtprune.similarity import STEP, unit_states
from vtprune.views import TokenView

__all__ = ["DPP"]

# what a quality of 0 becomes: the range is (0, 1]
_LEAST = 1e-6


@SELECTIONS.register("dpp")
@dataclass(frozen=True)
class DPP(Selection):
    """The greedy set S of largest det(L_S), L_ij = r_i cos(x_i, x_j) r_j; r is the score, scaled to (0, 1] a sample.

    Fast greedy MAP of Chen et al., arXiv 1709.05135; a conditional DPP of visual tokens as in CDPruner, 2506.10967.
    Each step takes argmax_i r_i^2 v_i, v_i being what of token i the chosen ones do not span, and then, for the chosen
    j and every i, e_i = (cos_ij - <c_i, c_j>) / sqrt(v_j), v_i -= e_i^2, where c_i holds the e_i of earlier steps: this
    is the recursion of the paper with the factors r taken out, which cancel.
    Without a score, or if all are equal, r = 1 and only diversity counts. When the states span no more (more tokens are
    asked than the states have dimensions), the best by score follow. v is computed in fp64 and compared in steps of
    2**-20, so that rounding decides nothing; a tie goes to the earlier token.
    Cost: O(V (D + t)) for step t, [T, V] numbers a sample; no [V, V] matrix.

    Attributes:
        theta: weight of the score against diversity, in [0, 1): r becomes exp(theta / (2 (1 - theta)) r), so that 0 is
            diversity alone; None takes r as it is.

    Raises:
        PlanError: if theta is out of range.
    """

    name: ClassVar[str] = "dpp"
    summary: ClassVar[str] = "greedy DPP: score times diversity (arXiv 1709.05135, 2506.10967)"

    theta: float | None = None

    def __post_init__(self) -> None:
        theta = self.theta
        number = isinstance(theta, (int, float)) and not isinstance(theta, bool)
        if theta is not None and not (number and 0.0 <= theta < 1.0):
            raise PlanError(f"dpp theta must be a number in [0, 1) or None, got {theta!r}.")

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        valid = view.valid
        alive, wanted = valid.sum(1).tolist(), view.keep.tolist()
        steps = max((min(n, k) for n, k in zip(alive, wanted, strict=True)), default=0)
        if all(k >= n for n, k in zip(alive, wanted, strict=True)):
            return valid.clone()
        states = unit_states(view.hidden, valid).double()
        quality = self._quality(scores, valid)
        sample = torch.arange(valid.shape[0], device=valid.device)
        kept = torch.zeros_like(valid)
        # a zero vector spans nothing
        rest = states.square().sum(2).gt(0).double()
        basis = states.new_zeros(valid.shape[0], steps, valid.shape[1])
        for step in range(steps):
            # behind the last dimension the score alone decides
            gain = quality.square() * ((rest / STEP).round() * STEP + STEP**2)
            pick = gain.masked_fill(kept | ~valid, -1.0).argmax(1)
            kept[sample, pick] |= step < view.keep
            cosine = torch.bmm(states, states[sample, pick][:, :, None])[:, :, 0]
            seen = basis[:, :step]
            spanned = torch.bmm(seen[sample, :, pick][:, None], seen)[:, 0]
            left = rest[sample, pick][:, None]
            basis[:, step] = ((cosine - spanned) / left.clamp(min=STEP).sqrt()).where(left > STEP / 2, 0.0)
            rest = (rest - basis[:, step].square()).clamp(min=0.0)
        return kept & valid

    def _quality(self, scores: Tensor | None, valid: Tensor) -> Tensor:
        """[B, V] r, fp64."""
        if scores is None:
            return torch.ones(valid.shape, dtype=torch.float64, device=valid.device)
        score = scores.double().nan_to_num(nan=0.0)
        low = score.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
        span = score.masked_fill(~valid, float("-inf")).amax(1, keepdim=True) - low
        share = ((score - low) / span).where(span > 0, 1.0).clamp(_LEAST, 1.0)
        if self.theta is None:
            return share
        return (self.theta / (2.0 * (1.0 - self.theta)) * share).exp()
