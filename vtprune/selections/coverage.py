"""Greedy coverage: tokens that together have something like every other token, weighted by score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import SELECTIONS, Selection
from vtprune.similarity import blocks_of_rows, unit_states
from vtprune.views import TokenView

__all__ = ["Coverage"]

# cosines that are held at once
_HELD = 1 << 26


@SELECTIONS.register("coverage")
@dataclass(frozen=True)
class Coverage(Selection):
    """Greedy set S of large coverage f(S) = sum_u max_{s in S} cos(x_u, x_s), the gains weighted by score (SCOPE).

    SCOPE's rule (arXiv 2510.24214). With c_u how well S covers token u, 0 at first, each step takes the token v of
    largest gain times score, a_v^alpha sum_u max(0, cos(x_u, x_v) - c_u), and then raises c_u to cos(x_u, x_v) where
    that is more. Without a score, or with alpha = 0, coverage alone counts.
    Cosines are compared in steps of 2**-20 and gains are whole numbers of them, so that rounding decides nothing; a tie
    goes to the earlier token, also where nothing is left to gain.
    Cost: the rule needs all [V, V] cosines: O(V^2 D) once, then O(V m) for a step that covers m tokens better than
    before, by which alone the gains change; m falls as the set grows.

    Attributes:
        alpha: exponent of the score, not negative. The paper's 1.

    Raises:
        PlanError: if alpha is out of range.
    """

    name: ClassVar[str] = "coverage"
    summary: ClassVar[str] = "greedy coverage of all tokens, times the score (arXiv 2510.24214)"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not number or not 0.0 <= self.alpha < float("inf"):
            raise PlanError(f"coverage alpha must be a number >= 0, got {self.alpha!r}. The paper uses 1.")

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        valid = view.valid
        alive, wanted = valid.sum(1).tolist(), view.keep.tolist()
        if all(k >= n for n, k in zip(alive, wanted, strict=True)):
            return valid.clone()
        weight = torch.ones(valid.shape, dtype=torch.float64, device=valid.device)
        if scores is not None:
            weight = scores.double().nan_to_num(nan=0.0).clamp(min=0.0).pow(self.alpha)
        states = unit_states(view.hidden, valid)
        group = max(1, _HELD // max(1, valid.shape[1] ** 2))
        parts = [
            _cover(states[at : at + group], weight[at : at + group], valid[at : at + group], view.keep[at : at + group])
            for at in range(0, len(alive), group)
        ]
        return torch.cat(parts)


def _cover(states: Tensor, weight: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
    """[B, V] the greedy set of `keep` [B] tokens; `states` are unit vectors, 0 at padding."""
    batch, length = valid.shape
    # cosines below 0 cover nothing
    cosine = torch.cat(
        [
            ((states[:, rows] @ states.transpose(1, 2)) * 2**20).round().clamp(min=0.0)
            for rows in blocks_of_rows(batch, length, length, valid.device)
        ],
        1,
    )
    sample = torch.arange(batch, device=valid.device)
    gain = cosine.sum(1, dtype=torch.float64)
    covered, kept = torch.zeros_like(cosine[:, 0]), torch.zeros_like(valid)
    for step in range(int(keep.minimum(valid.sum(1)).max())):
        pick = (gain * weight).masked_fill(kept | ~valid, -1.0).argmax(1)
        kept[sample, pick] |= step < keep
        after = torch.maximum(covered, cosine[sample, :, pick])
        better = after > covered
        most = int(better.sum(1).max())
        if most:
            rows = torch.argsort((~better).to(torch.uint8), dim=1, stable=True)[:, :most]
            to = cosine.gather(1, rows[..., None].expand(-1, -1, length))
            lost = (to - covered.gather(1, rows)[..., None]).clamp_(min=0.0)
            lost -= (to - after.gather(1, rows)[..., None]).clamp_(min=0.0)
            gain = gain - lost.sum(1, dtype=torch.float64)
        covered = after
    return kept & valid
