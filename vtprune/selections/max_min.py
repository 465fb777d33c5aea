"""Greedy max-min: tokens that are as far from each other as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.rules import SELECTIONS, Selection
from vtprune.similarity import blocks_of_rows, cosine_distance, unit_states
from vtprune.views import TokenView

__all__ = ["MaxMin"]


@SELECTIONS.register("maxmin")
@dataclass(frozen=True)
class MaxMin(Selection):
    """Greedy max-min diversity of the tokens' states; scores are not read.

    With D_ij = 1 - cos(x_i, x_j), the first token is the one farthest from its nearest neighbour, argmax_i min_{j != i}
    D_ij; each next one is the farthest from all that are chosen, argmax_i min_{j chosen} D_ij (DivPrune, arXiv
    2503.02175). Distances are compared in steps of 2**-20 (see `vtprune.similarity`); a tie goes to the earlier token.
    Cost: O(V^2 D) in blocks for the first token and O(V D) for each further one; no [V, V] matrix is kept.
    """

    name: ClassVar[str] = "maxmin"
    summary: ClassVar[str] = "greedy max-min diversity, whatever the score (arXiv 2503.02175)"

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        valid = view.valid
        alive, wanted = valid.sum(1).tolist(), view.keep.tolist()
        steps = max((min(n, k) for n, k in zip(alive, wanted, strict=True)), default=0)
        if all(k >= n for n, k in zip(alive, wanted, strict=True)):
            return valid.clone()
        states = unit_states(view.hidden, valid)
        sample = torch.arange(valid.shape[0], device=valid.device)
        kept = torch.zeros_like(valid)
        spread = _nearest_other(states, valid)
        for step in range(steps):
            pick = spread.masked_fill(kept | ~valid, -1.0).argmax(1)
            kept[sample, pick] |= step < view.keep
            distance = cosine_distance(torch.bmm(states, states[sample, pick][:, :, None])[:, :, 0])
            spread = distance if step == 0 else torch.minimum(spread, distance)
        return kept & valid


def _nearest_other(states: Tensor, valid: Tensor) -> Tensor:
    """[B, V] distance of each token to its nearest other valid token; +inf if there is none.

    Args:
        states: [B, V, D] unit vectors.
        valid: [B, V].
    """
    batch, length = valid.shape
    nearest = []
    for rows in blocks_of_rows(batch, length, length, valid.device):
        cosine = states[:, rows] @ states.transpose(1, 2)
        other = valid[:, None, :] & (rows[:, None] != torch.arange(length, device=valid.device))
        nearest.append(cosine.masked_fill(~other, float("-inf")).amax(2))
    return cosine_distance(torch.cat(nearest, dim=1))
