"""DivPrune: the subset whose closest pair is as far apart as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vtprune.contract import METHODS, Scorer, TokenView
from vtprune.plan import Site

__all__ = ["DivPrune"]

# elements of one block of cosines while the first token is sought
_BLOCK = 1 << 22


@METHODS.register("divprune")
@dataclass(frozen=True)
class DivPrune(Scorer):
    """Greedy max-min diversity of the projected visual tokens, before the decoder. Reads no attention and no text.

    Paper: DivPrune, arXiv 2503.02175. With D_ij = 1 - cos(x_i, x_j), the first token is the one farthest from its
    nearest neighbour, argmax_i min_{j != i} D_ij; each next one is the farthest from all that are kept, argmax_i
    min_{j kept} D_ij.
    Here distances are compared in steps of 2**-20: equal tokens (flat background) then tie exactly whatever the order
    of the sums, and a tie goes to the earlier token, so that the result does not depend on batch mates or device.
    Written from the formula; the authors' code was not used.
    Cost: O(V^2 D) in blocks for the first token and O(V D) for each further one; no [V, V] matrix is kept.
    """

    name: ClassVar[str] = "divprune"
    summary: ClassVar[str] = "greedy max-min diversity of the tokens before the decoder (arXiv 2503.02175)"
    site: ClassVar[Site | None] = Site("input")

    def select(self, view: TokenView) -> Tensor:
        """[B, V] True at the chosen tokens, `view.keep[b]` of them a sample."""
        valid = view.valid
        alive, wanted = valid.sum(1).tolist(), view.keep.tolist()
        steps = max((min(n, k) for n, k in zip(alive, wanted, strict=True)), default=0)
        if all(k >= n for n, k in zip(alive, wanted, strict=True)):
            return valid.clone()
        states = functional.normalize(view.hidden.detach().float().masked_fill(~valid[:, :, None], 0.0), dim=2)
        sample = torch.arange(valid.shape[0], device=valid.device)
        kept = torch.zeros_like(valid)
        spread = _nearest_other(states, valid)
        for step in range(steps):
            pick = spread.masked_fill(kept | ~valid, -1.0).argmax(1)
            kept[sample, pick] |= step < view.keep
            distance = _distance(torch.bmm(states, states[sample, pick][:, :, None])[:, :, 0])
            spread = distance if step == 0 else torch.minimum(spread, distance)
        return kept & valid


def _distance(cosine: Tensor) -> Tensor:
    """1 - cos in whole steps of 2**-20, at least 0; exact in fp32."""
    return ((1.0 - cosine) * 2**20).round().clamp(min=0.0)


def _nearest_other(states: Tensor, valid: Tensor) -> Tensor:
    """[B, V] distance of each token to its nearest other valid token; +inf if there is none.

    Args:
        states: [B, V, D] unit vectors.
        valid: [B, V].
    """
    batch, length = valid.shape
    size = max(1, _BLOCK // max(1, batch * length))
    nearest = []
    for start in range(0, length, size):
        rows = torch.arange(start, min(start + size, length), device=valid.device)
        cosine = states[:, rows] @ states.transpose(1, 2)
        other = valid[:, None, :] & (rows[:, None] != torch.arange(length, device=valid.device))
        nearest.append(cosine.masked_fill(~other, float("-inf")).amax(2))
    return _distance(torch.cat(nearest, dim=1))
