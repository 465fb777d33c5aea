"""HoloV's set: a quota for each run of the picture, by attention and by how much its tokens differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import SELECTIONS, Selection, require_scores, top_k_mask
from vtprune.selections.strata import split_by_weight
from vtprune.similarity import STEP, unit_states
from vtprune.views import TokenView

__all__ = ["Crops"]

# what the authors multiply attention by before the sum
_SCALE = 1e3


@SELECTIONS.register("crops")
@dataclass(frozen=True)
class Crops(Selection):
    """Deals the survivors to runs of the tokens in raster order, then keeps the best by score in each (HoloV).

    The tokens of a sample, in order, are cut into `number` runs of equal length (to one). In a run, with a_i the score
    of token i times 1000 and v_i the variance of its cosines with the other tokens of the run,

        h_i = a_i + balance v_i mean|a| / mean|v|

    with means over the sample (over a run the variance would cancel out of its quota), and a run gets T mean(h) / (the
    sum of these means) of the T survivors: the floor, then one more to the heaviest runs; what a run has no tokens for
    goes to the others (the authors' code fills up with zero vectors).
    Inside a run the score alone decides, as in the authors' code.
    The variance is that of a sample (divided by n - 1), 0 in runs of fewer than three tokens.
    Cost: O(V^2 D / number).

    Attributes:
        number: runs, >= 1. The authors' 16.
        balance: weight of the variance, >= 0. The authors' 0.09.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "crops"
    summary: ClassVar[str] = "the best of each run, quotas by score and variety (HoloV, NeurIPS 2025)"

    number: int = 16
    balance: float = 0.09

    def __post_init__(self) -> None:
        if isinstance(self.number, bool) or not isinstance(self.number, int) or self.number < 1:
            raise PlanError(f"crops number must be an int >= 1, got {self.number!r}. The authors use 16.")
        number = isinstance(self.balance, (int, float)) and not isinstance(self.balance, bool)
        if not number or not 0.0 <= self.balance < float("inf"):
            raise PlanError(f"crops balance must be a number >= 0, got {self.balance!r}. The authors use 0.09.")

    @property
    def needs_scores(self) -> bool:
        """See `Selection.needs_scores`."""
        return True

    def select(self, view: TokenView, scores: Tensor | None) -> Tensor:
        """See `Selection.select`."""
        score, valid = require_scores(scores, self.name).float(), view.valid
        if not valid.numel():
            return valid.clone()
        alive = valid.sum(1)
        keep = [min(k, n) for k, n in zip(view.keep.tolist(), alive.tolist(), strict=True)]
        # [B, number] where each run begins and ends; runs of a sample with few tokens may be empty
        edges = torch.arange(self.number + 1, device=valid.device) * alive[:, None] // self.number
        sizes = edges.diff(dim=1)
        inside = torch.arange(int(sizes.max()), device=valid.device)
        index = (edges[:, :-1, None] + inside).clamp(max=valid.shape[1] - 1)
        there = inside < sizes[..., None]
        place = index.flatten(1)
        mine = score.gather(1, place).view(index.shape).masked_fill(~there, 0.0)
        weight = self._weights(unit_states(view.hidden, valid), mine, place, there).tolist()
        quotas = [split_by_weight(n, w, s) for n, w, s in zip(keep, weight, sizes.tolist(), strict=True)]
        quota = torch.tensor(quotas, device=valid.device).flatten()
        chosen = top_k_mask(mine.flatten(0, 1), quota, there.flatten(0, 1)).view(index.shape).flatten(1)
        return torch.zeros_like(place.new_zeros(valid.shape)).scatter_add_(1, place, chosen.long()) > 0

    def _weights(self, states: Tensor, score: Tensor, place: Tensor, there: Tensor) -> Tensor:
        """[B, number] mean of h in each run, fp64."""
        count = there.sum(2).double()
        runs = states.gather(1, place[..., None].expand(-1, -1, states.shape[2])).unflatten(1, there.shape[1:])
        cosine = ((runs @ runs.transpose(2, 3)).double() / STEP).round() * STEP
        other = there[:, :, None] & there[..., None] & ~torch.eye(there.shape[2], dtype=torch.bool, device=there.device)
        number = (count - 1.0)[..., None]
        mean = cosine.masked_fill(~other, 0.0).sum(3) / number.clamp(min=1.0)
        spread = (cosine - mean[..., None]).square().masked_fill(~other, 0.0).sum(3)
        variance = (spread / (number - 1.0).clamp(min=1.0)).masked_fill(~there | (number < 2.0), 0.0)
        whole, total = count.clamp(min=1.0), count.sum(1, keepdim=True).clamp(min=1.0)
        attention = _SCALE * score.double()
        typical, variety = (each.abs().sum((1, 2))[:, None] / total for each in (attention, variance))
        scale = typical / variety.where(variety > 0, 1.0)
        return attention.sum(2) / whole + self.balance * scale * variance.sum(2) / whole
