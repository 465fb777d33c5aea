"""The rest is summed up around targets at an even stride."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.errors import PlanError
from vtprune.rules import REMAINDERS, Merge, Remainder, own_index
from vtprune.similarity import nearest_target, unit_states
from vtprune.views import TokenView

__all__ = ["Contextual"]


@REMAINDERS.register("contextual")
@dataclass(frozen=True)
class Contextual(Remainder):
    """Some survivors are made of the rest: evenly spaced targets that take in what is most like them.

    VisionZip's contextual tokens (arXiv 2412.04467). C = share T, rounded half up, of the T survivors are targets: of
    the rest in order those at 0, s, 2s, ..., s the rest divided by C, rounded down. Every other token of the rest goes
    to the target with the highest cosine of `memory["metric"]` (mean over heads of a block's keys, if the method
    remembers it) or else of the states; a target becomes itself plus the mean of what it takes in.
    That sum is what the authors' code computes; mean=True divides it as an average of all would.
    Targets keep their positions and count among the survivors. Cost: O(V C D).

    Attributes:
        share: of the survivors, in [0, 1). The paper's 10 of 64.
        mean: average target and members, each token once, instead of adding the members' mean.

    Raises:
        PlanError: if a knob is out of range.
    """

    name: ClassVar[str] = "contextual"
    summary: ClassVar[str] = "gathered by evenly spaced targets, which survive (arXiv 2412.04467)"

    share: float = 10 / 64
    mean: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0.0 <= self.share < 1.0:
            raise PlanError(f"contextual share must be a number in [0, 1), got {self.share!r}. The paper uses 10 / 64.")
        if not isinstance(self.mean, bool):
            raise PlanError(f"contextual mean must be True or False, got {self.mean!r}.")

    def places(self, view: TokenView) -> Tensor:
        """[B] targets."""
        alive = view.valid.sum(1).tolist()
        counts = [
            0 if k >= n else math.floor(self.share * k + 0.5) for k, n in zip(view.keep.tolist(), alive, strict=True)
        ]
        return torch.tensor(counts, device=view.keep.device, dtype=view.keep.dtype)

    def merge(self, view: TokenView, selected: Tensor, scores: Tensor | None) -> Merge:
        """See `Remainder.merge`."""
        rest, places = view.valid & ~selected, self.places(view)[:, None]
        stride = (rest.sum(1, keepdim=True) // places.clamp(min=1)).clamp(min=1)
        rank = rest.cumsum(1) - 1
        target = rest & (rank % stride == 0) & (rank // stride < places)
        metric = view.memory.get("metric", view.hidden)
        owner, own = nearest_target(unit_states(metric, view.valid), target), own_index(rest)
        owner = owner.where(rest & ~target, own)
        if self.mean:
            return Merge(selected | target, owner)
        taken = (rest & ~target & (places > 0)).float()
        members = torch.zeros_like(taken).scatter_add_(1, owner.where(view.valid, own), taken)
        weight = (1.0 / members.gather(1, owner).clamp(min=1.0)).where(taken > 0, 1.0)
        return Merge(selected | target, owner, weight, summed=True)
